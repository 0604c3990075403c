"""Plans the eight published options for a user's model, corpus and cluster, beside the guide's claims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcpt.files import whole_file
from fastcpt.planning.hardware import hardware_of
from fastcpt.planning.jobs import changed
from fastcpt.planning.plan import plan, selected_tokens
from fastcpt.planning.ranges import Range
from fastcpt.planning.result import Plan
from fastcpt.recipe import load_recipe

# The guide's number, its name for the option, the recipe.
OPTIONS = (
    (0, "full", "cpt_config"),
    (1, "reduced steps", "cpt_config_reduced_steps"),
    (2, "filtered corpus", "cpt_config_filtered"),
    (3, "sixteen GPUs", "cpt_config_16gpu"),
    (4, "LoRA", "cpt_lora_config"),
    (5, "short sequences", "cpt_config_short"),
    (6, "hybrid (default)", "cpt_config_fast"),
    (7, "two stages", "cpt_stage1_fast"),
)


@dataclass(frozen=True)
class Option:
    """One row: the published option and its plan."""

    number: int
    name: str
    plan: Plan

    @property
    def hours(self) -> Range | None:
        return self.plan.hours

    @property
    def missing(self) -> str:
        """What it does not fit, one word each; empty if it fits."""
        found = self.plan
        checks = [
            (not found.problems, "cannot run"),
            (found.fits_memory, "memory"),
            (found.fits_time, "time"),
            (found.fits_money, "money"),
            (found.fits_disk, "disk"),
            (found.fits_bringing, "checkpoints"),
            (found.fits_passes, "passes"),
        ]
        return ", ".join(word for fits, word in checks if not fits)

    def to_json(self) -> dict[str, Any]:
        return {"option": self.number, "name": self.name, **self.plan.to_json()}


def matrix(
    tokens: int | None = None,
    cluster: Mapping[str, Any] | str | None = None,
    model: str | None = None,
    history: Path | None = None,
) -> list[Option]:
    """Plan all eight.

    ``tokens``: of the whole corpus, from which each recipe takes its share; None: the guide's.
    ``cluster``: None: the guide's; option 3 always uses sixteen of its GPUs. ``model``: a name or folder
    instead of the guide's 70B. Budgets are those of the claims.
    """
    rows = []
    for number, name, recipe_name in OPTIONS:
        recipe = load_recipe(recipe_name)
        if model is not None:
            recipe = changed(recipe, {"model.name_or_path": model, "model.config": None})
        there = cluster
        if cluster is not None:
            hardware = hardware_of(recipe.cluster, cluster)
            count = recipe.cluster.gpus if recipe_name == "cpt_config_16gpu" else hardware.count
            if hardware.gpu is not None and recipe.global_batch_size % count == 0:
                there = f"{count}x{hardware.gpu.name}" if count != hardware.count else cluster
        corpus = None if tokens is None else selected_tokens(tokens, recipe)
        rows.append(Option(number, name, plan(recipe, corpus, there, history)))
    return rows


HEADER = (
    "#",
    "option",
    "cluster",
    "tokens (B)",
    "passes",
    "GB per GPU",
    "hours",
    "cost ($)",
    "fits",
    "it claims",
)


def cells(option: Option) -> tuple[str, ...]:
    """One row, in the columns of ``HEADER``."""
    found = option.plan
    hours = found.hours.words() if found.hours else "unknown"
    cost = found.cost.words(0) if found.cost else "unknown"
    if option.name == "two stages" and found.stage2_hours:
        hours += f", then {found.stage2_hours.words()}"
        cost += f", then {found.stage2_cost.words(0)}" if found.stage2_cost else ""
    claim = found.claim or {"hours": "", "cost": "", "quality": ""}
    memory = (
        f"{found.memory_gb['total']:,.0f} of {found.available_gb:,.0f}"
        if found.memory_gb
        else "unknown"
    )
    return (
        str(option.number),
        option.name,
        found.cluster,
        f"{found.tokens / 1e9:.2f}",
        f"{found.passes:.1f}" if found.passes else "?",
        memory,
        hours,
        cost,
        f"no: {option.missing}" if option.missing else "yes",
        f"{claim['hours']} h, {claim['cost']}, {claim['quality']}",
    )


def matrix_text(rows: Sequence[Option]) -> str:
    table = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*lines, "", _note(rows)])


def matrix_markdown(rows: Sequence[Option]) -> str:
    table = [HEADER, tuple("---" for _ in HEADER), *map(cells, rows)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([*lines, "", _note(rows)])


def _note(rows: Sequence[Option]) -> str:
    first = rows[0].plan
    words = "Claims are the published guide's; all other figures are planned here"
    return f"{words} for {first.model}. {(first.price_source or '').capitalize()}"


FITS, MISSES, CLAIMED = "#1a7f37", "#b3261e", "#5f6b7a"
LABEL_GAP = 15.0  # points between two labels, above each other


def matrix_picture(rows: Sequence[Option], path: Path) -> None:
    """Draw time against money with the range of each option and whether it fits; claims are numbers.

    ``path``'s suffix sets the format (.svg, .png). Rows without hours or money are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(figsize=(10, 6.4), layout="constrained")
    points: list[tuple[float, float, Option]] = []
    claims: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        hours, cost = row.plan.hours, row.plan.cost
        if hours is None or cost is None:
            continue
        x, y = math.sqrt(hours.low * hours.high), math.sqrt(cost.low * cost.high)
        points.append((x, y, row))
        colour = FITS if row.plan.fits else MISSES
        ends = [hours.low, hours.high], [cost.low, cost.high]
        axes.plot(*ends, color=colour, linewidth=7, alpha=0.25, solid_capstyle="round")
        axes.plot(x, y, "o" if row.plan.fits else "X", color=colour, markersize=9)
        claim = _claim_point(row.plan)
        if claim:
            axes.plot([claim[0], x], [claim[1], y], ":", color=CLAIMED, linewidth=0.8, zorder=1)
            claims.setdefault(claim, []).append(str(row.number))
    for claim, numbers in claims.items():
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": CLAIMED}
        words = ",".join(numbers)
        axes.text(*claim, words, fontsize=7, ha="center", va="center", color=CLAIMED, bbox=box)
    axes.set(xscale="log", yscale="log", xlabel="hours", ylabel="cost (USD)")
    ticks = [n * 10.0**power for power in range(-2, 6) for n in (1, 2, 5)]
    for axis, form in ((axes.xaxis, "{x:,g}"), (axes.yaxis, "${x:,g}")):
        low, high = axis.get_view_interval()
        low, high = low / 1.4, high * 1.6
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())
        axis.set_view_interval(low, high, ignore=True)
    axes.grid(alpha=0.15)
    axes.set_title(f"The eight options, {rows[0].plan.model}: planned and claimed", loc="left")
    marks = [("o", FITS, "planned: fits"), ("X", MISSES, "planned: does not fit")]
    handles = [
        Line2D([], [], marker=m, linestyle="", color=c, label=words) for m, c, words in marks
    ]
    claim_mark = Line2D([], [], marker="s", linestyle="", markerfacecolor="white", color=CLAIMED)
    claim_mark.set_label("published claim, by number")
    axes.legend(handles=[*handles, claim_mark], loc="upper left", frameon=False)
    figure.draw_without_rendering()  # the labels need the final scale
    _label(axes, points)
    with whole_file(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."), dpi=150)
    pyplot.close(figure)


def _label(axes: Any, points: Sequence[tuple[float, float, Option]]) -> None:
    """Label the points, alternately above and below, without overlaps."""
    to_points = 72 / axes.figure.dpi
    ordered = sorted(points, key=lambda point: (point[1], point[0]))
    for above in (True, False):
        # above, a label is pushed up by the previous one; below, down, starting from the last
        side = ordered[0::2] if above else ordered[1::2][::-1]
        last: float | None = None
        for x, y, row in side:
            place = axes.transData.transform((x, y))[1] * to_points
            shift = 14.0 if above else -18.0
            if last is not None:
                gap = place + shift - last if above else last - place - shift
                shift += max(0.0, LABEL_GAP - gap) * (1 if above else -1)
            last = place + shift
            axes.annotate(
                f"{row.number} {row.name}",
                (x, y),
                (-14 if above else 14, shift),
                textcoords="offset points",
                ha="right" if above else "left",
                color=FITS if row.plan.fits else MISSES,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": CLAIMED},
            )


def _claim_point(found: Plan) -> tuple[float, float] | None:
    """Hours and USD of a claim such as ``4-6`` and ``$150+``: the middle of its first range."""
    if found.claim is None:
        return None
    hours = [float(word) for word in re.findall(r"[\d.]+", found.claim["hours"].split(",")[0])]
    money = [float(word) for word in re.findall(r"[\d.]+", found.claim["cost"].replace(",", ""))]
    return (sum(hours) / len(hours), sum(money) / len(money)) if hours and money else None
