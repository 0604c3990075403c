"""Pictures as SVG: the DAG, and the curves of a run.

The DAG is drawn here, without graphviz: tasks in layers from top to bottom, each below all it
waits for. Edges that skip layers pass through places kept free for them, so no line crosses a
box. The curves are matplotlib's.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastcpt.files import whole_file

Edge = tuple[str, str]
Node = str | tuple[str, str, int]  # a task, or where an edge passes a layer
Nodes = list[Node]

BOX_WIDTH, BOX_HEIGHT = 176, 36
LANE_WIDTH = 44  # of an edge that passes a layer
GAP_X, GAP_Y = 26, 40
MARGIN = 16


def dag_picture(
    tasks: Sequence[str],
    edges: Sequence[Edge],
    path: Path,
    labels: Mapping[Edge, str] | None = None,
) -> None:
    """Draw a DAG as SVG. ``edges`` are (before, after); ``labels`` are words on some of them.

    Raises ``ValueError`` for an edge to an unknown task and for a cycle.
    """
    labels = labels or {}
    # What a longer way says already is left out, unless it is a branch of its own.
    drawn = [edge for edge in edges if edge in labels or not _is_implied(edge, edges)]
    layers, chains = _layers(tasks, drawn)
    places = _places(layers, chains)
    width = max(
        *(x + BOX_WIDTH / 2 for x, _ in places.values()),
        *(
            _label_place(chain, places)[0] + 7 * len(labels.get(_ends(chain), ""))
            for chain in chains
        ),
    )
    width += MARGIN
    height = len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    shapes = [_edge(chain, places) for chain in chains]
    for task in tasks:
        x, y = places[task]
        shapes.append(
            f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="#eef3fb" stroke="#3b5b92"/>'
            f'<text x="{x:.0f}" y="{y + BOX_HEIGHT / 2 + 5:.0f}" text-anchor="middle" '
            f'fill="#16233b">{escape(task)}</text>'
        )
    for chain in chains:
        if label := labels.get(_ends(chain)):
            x, y, anchor = _label_place(chain, places)
            shapes.append(
                f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="13" '
                f'fill="#44546f">{escape(label)}</text>'
            )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="15">\n<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" '
        f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" '
        f'fill="#5b6b85"/></marker></defs>\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
    with whole_file(path) as aside:
        aside.write_text(svg, encoding="utf-8")


def _is_implied(edge: Edge, edges: Sequence[Edge]) -> bool:
    """Whether a longer way leads along the edges from one end of ``edge`` to the other."""
    start, end = edge
    seen: set[str] = set()
    waiting = [after for before, after in edges if before == start and after != end]
    while waiting:
        task = waiting.pop()
        if task == end:
            return True
        if task not in seen:
            seen.add(task)
            waiting += [after for before, after in edges if before == task]
    return False


def _layers(
    tasks: Sequence[str], edges: Sequence[Edge]
) -> tuple[list[list[Node]], list[list[Node]]]:
    """Each task one layer below the lowest it waits for; and each edge as the nodes it passes."""
    unknown = {task for edge in edges for task in edge} - set(tasks)
    if unknown:
        raise ValueError(f"edges name tasks that are not in the list: {', '.join(sorted(unknown))}")
    depth: dict[str, int] = {}
    waiting = list(tasks)
    while waiting:
        ready = [
            task
            for task in waiting
            if all(before in depth for before, after in edges if after == task)
        ]
        if not ready:
            raise ValueError(f"the tasks wait for one another in a circle: {', '.join(waiting)}")
        for task in ready:
            before = [depth[one] for one, after in edges if after == task]
            depth[task] = max(before, default=-1) + 1
        waiting = [task for task in waiting if task not in depth]
    layers: list[list[Node]] = [[] for _ in range(max(depth.values()) + 1)]
    for task in tasks:
        layers[depth[task]].append(task)
    chains: list[list[Node]] = []
    for one, other in edges:
        lanes: list[Node] = [(one, other, n) for n in range(depth[one] + 1, depth[other])]
        for n, lane in enumerate(lanes, depth[one] + 1):
            layers[n].append(lane)
        chains.append([one, *lanes, other])
    return layers, chains


def _places(
    layers: Sequence[list[Node]], chains: Sequence[list[Node]]
) -> dict[Node, tuple[float, float]]:
    """The top middle of every node. Nodes are drawn towards their neighbours, layer by layer."""
    neighbours: dict[Node, list[Node]] = {node: [] for layer in layers for node in layer}
    for chain in chains:
        for one, other in pairwise(chain):
            neighbours[one].append(other)
            neighbours[other].append(one)
    x: dict[Node, float] = {}
    for layer in layers:
        x.update(_spread(layer, [n * (BOX_WIDTH + GAP_X) for n in range(len(layer))]))
    for _ in range(300):
        for layer in (*layers, *reversed(layers)):
            wanted = {
                node: sum(x[other] for other in neighbours[node]) / max(1, len(neighbours[node]))
                for node in layer
            }
            layer.sort(key=lambda node: wanted[node])
            x.update(_spread(layer, [wanted[node] for node in layer]))
    left = min(x[node] - _width(node) / 2 for node in x) - MARGIN
    return {
        node: (x[node] - left, MARGIN + n * (BOX_HEIGHT + GAP_Y))
        for n, layer in enumerate(layers)
        for node in layer
    }


def _spread(layer: Sequence[Node], wanted: Sequence[float]) -> dict[Node, float]:
    """Positions in order, no two nodes overlapping, around where they are wanted on average."""
    placed: list[float] = []
    for n, (node, want) in enumerate(zip(layer, wanted, strict=True)):
        if n:
            room = (_width(layer[n - 1]) + _width(node)) / 2 + GAP_X
            want = max(want, placed[-1] + room)
        placed.append(want)
    shift = sum(wanted) / len(wanted) - sum(placed) / len(placed)
    return {node: at + shift for node, at in zip(layer, placed, strict=True)}


def _width(node: Node) -> float:
    return BOX_WIDTH if isinstance(node, str) else LANE_WIDTH


def _edge(chain: Sequence[Node], places: Mapping[Node, tuple[float, float]]) -> str:
    """A smooth line from the foot of the first box through its lanes to the head of the last."""
    x, top = places[chain[0]]
    y = top + BOX_HEIGHT
    path = f"M{x:.0f} {y:.0f}"
    for node in chain[1:]:
        to_x, to_y = places[node]
        middle = (y + to_y) / 2
        path += f" C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
        x, y = to_x, to_y
        if not isinstance(node, str):
            y = to_y + BOX_HEIGHT
            path += f" L{x:.0f} {y:.0f}"
    look = 'fill="none" stroke="#5b6b85" stroke-width="1.6" marker-end="url(#arrow)"'
    return f'<path d="{path}" {look}/>'


def _ends(chain: Sequence[Node]) -> Edge:
    return str(chain[0]), str(chain[-1])


def _label_place(
    chain: Sequence[Node], places: Mapping[Node, tuple[float, float]]
) -> tuple[float, float, str]:
    """Where an edge's words stand and how: beside its first lane, or beside its arrow's head."""
    from_x, _ = places[chain[0]]
    x, y = places[chain[1]]
    if not isinstance(chain[1], str):
        return x + 10, y + BOX_HEIGHT / 2 + 5, "start"
    return (x - 12, y - 10, "end") if x < from_x else (x + 12, y - 10, "start")


def curves(metrics: Mapping[str, Path]) -> str | None:
    """Loss and learning rate of each training over its steps, as SVG; None without any points.

    ``metrics`` maps a training's name to its ``metrics.jsonl`` (keys ``step``, ``loss``,
    ``learning_rate``). Values that are no numbers are left out.
    """
    points = {name: _points(path) for name, path in metrics.items()}
    points = {name: rows for name, rows in points.items() if rows}
    if not points:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.2, 4.2 * len(points)), 4.6), layout="constrained")
    axes = figure.subplots(2, len(points), sharex="col", squeeze=False, height_ratios=(2, 1))
    for column, (name, rows) in enumerate(points.items()):
        loss, rate = axes[0, column], axes[1, column]
        # One curve of a few points reads better with the points marked.
        marker = "o" if len(rows) < 25 else ""
        for axis, key in ((loss, "loss"), (rate, "learning_rate")):
            pairs = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
            axis.plot(*zip(*pairs, strict=True), color="#2f5da8", lw=1.6, marker=marker, ms=3.5)
            axis.grid(color="#dddddd", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        loss.set_title(name, fontsize=11)
        rate.set_xlabel("step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss (nats a token)")
    axes[1, 0].set_ylabel("learning rate")
    return _svg(figure)


def perplexities(figures: Mapping[str, float], threshold: float) -> str | None:
    """Perplexities as bars on a logarithmic scale, with the gate as a line; None without any."""
    usable = {name: value for name, value in figures.items() if _is_number(value)}
    if not usable:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 0.9 + 0.42 * len(usable)), layout="constrained")
    axis = figure.subplots()
    names = list(usable)[::-1]
    values = [usable[name] for name in names]
    colours = ["#2f5da8" if value < threshold else "#a9b4c6" for value in values]
    bars = axis.barh(names, values, color=colours, height=0.62)
    axis.axvline(threshold, color="#b3372f", lw=1.6, zorder=2)
    texts = axis.bar_label(bars, labels=[f"{value:,.2f}" for value in values], padding=6, zorder=3)
    for text in texts:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(1, max(*values, threshold) * 3)
    axis.set_title(f"perplexity; the gate is at {threshold:g}", fontsize=11, color="#b3372f")
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _points(path: Path, most: int = 600) -> list[dict[str, Any]]:
    """At most ``most`` rows of a metrics file, evenly spread, the last among them."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows = [row for row in rows if _is_number(row.get("step")) and _is_number(row.get("loss"))]
    stride = max(1, math.ceil(len(rows) / most))
    return rows[::-stride][::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _svg(figure: Any) -> str:
    """The figure as an SVG element to put into a page, its words kept as words."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastcpt"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
