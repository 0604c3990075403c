"""Pictures of runs as SVG, drawn by matplotlib: curves, perplexities beside the gate, the funnel."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Colours of a picture, each replaced by a variable of the page, so that dark pages can use another.
THEME = {"#2f5da8": "accent", "#dddddd": "grid", "#a9b4c6": "pale", "#b3372f": "bad"}
# Distinguishable by colour-blind readers (Okabe and Ito 2008), on light and on dark.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a7a00")


def curves(metrics: Mapping[str, Path]) -> str | None:
    """Loss and learning rate of each training over its steps, as SVG; None without any points.

    ``metrics`` maps a training's name to its ``metrics.jsonl`` (keys ``step``, ``loss``,
    ``learning_rate``). Values that are not numbers are left out.
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
        # a curve with few points is easier to read with the points marked
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
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("learning rate")
    return _svg(figure)


def curves_together(metrics: Mapping[str, Path]) -> str | None:
    """The losses of one training in several runs in one picture; None without any points."""
    points = {name: rows for name, path in metrics.items() if (rows := _points(path))}
    if not points:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, rows), colour in zip(points.items(), RUNS, strict=False):
        steps, losses = zip(*((row["step"], row["loss"]) for row in rows), strict=True)
        axis.plot(steps, losses, color=colour, lw=1.6, marker="o" if len(rows) < 25 else "", ms=3.5)
        axis.lines[-1].set_label(name if not name.startswith("_") else f" {name}")
    axis.grid(color="#dddddd", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False, fontsize=9)
    return _svg(figure)


def funnel(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The tokens removed by each step of a corpus's funnel, from those read to those kept.

    ``rows`` are those of a corpus manifest; None if nothing was read.
    """
    read = next((row["tokens"] for row in rows if row["stage"] == "read" and not row["reason"]), 0)
    kept = [row for row in rows if row["stage"] == "kept" and row["tokens"]]
    out = [row for row in rows if row["stage"] not in ("read", "kept") and row["tokens"]]
    if not read:
        return None
    from matplotlib.figure import Figure

    bars, left = [("read", 0.0, float(read), "#2f5da8")], float(read)
    for row in out:
        left -= row["tokens"]
        bars.append((f"{row['stage']}: {row['reason']}", left, float(row["tokens"]), "#a9b4c6"))
    bars += [(f"kept: {row['reason']}", 0.0, float(row["tokens"]), "#2f5da8") for row in kept]
    figure = Figure(figsize=(7.4, 0.7 + 0.3 * len(bars)), layout="constrained")
    axis = figure.subplots()
    names, starts, widths, colours = zip(*bars[::-1], strict=True)
    drawn = axis.barh(range(len(bars)), widths, left=starts, color=colours, height=0.66)
    axis.set_yticks(range(len(bars)), names)
    axis.bar_label(drawn, labels=[f"{width:,.0f}" for width in widths], padding=4, fontsize=9)
    axis.set_xlim(0, read * 1.2)
    axis.xaxis.set_visible(False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
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
    axis.bar_label(bars, labels=[f"{value:,.2f}" for value in values], padding=6, zorder=3)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(1, max(*values, threshold) * 3)
    axis.set_title(f"perplexity; the gate is at {threshold:g}", fontsize=11, color="#b3372f")
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a training's ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _points(path: Path, most: int = 600) -> list[dict[str, Any]]:
    """At most ``most`` evenly spaced rows of a metrics file, including the last."""
    rows = read_metrics(path)
    rows = [row for row in rows if _is_number(row.get("step")) and _is_number(row.get("loss"))]
    stride = max(1, math.ceil(len(rows) / most))
    return rows[::-stride][::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _svg(figure: Any) -> str:
    """The figure as an SVG element for a page, with its text kept as text."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastcpt"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    for colour, variable in THEME.items():
        svg = svg.replace(f": {colour}", f": var(--{variable}, {colour})")
    # text and axes: black in a separate file, the page's colour in a page
    return svg.replace(": #000000", ": currentColor").replace(
        "<text ", '<text fill="currentColor" '
    )
