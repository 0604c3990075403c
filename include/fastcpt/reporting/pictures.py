"""Pictures of a run as SVG, drawn by matplotlib: its curves, and perplexities beside the gate."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
