"""How well the cost model predicts measurements, including those it was not fitted on.

    python benchmarks/planning.py [--fit]

Fits the efficiencies of ``fastcpt.planning.costs`` on the rows of ``measured.yaml`` and, for each
row, on all other rows: the left-out error is the expected error for something new. Similar rows help
each other, so whole groups are left out too (a model size, a number of GPUs): how often does the
resulting range contain the measurement? It also shows the earlier range, which did not
widen with distance, and the rates of other programs: published, and measured on the trainer's hosts
(``other_programs.yaml``). No GPU; a minute. ``--fit`` prints the efficiencies to put into ``costs.Efficiency`` after a new row. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include"))

from fastcpt.planning.costs import EFFICIENCY, Efficiency, Job, tokens_per_second
from fastcpt.planning.hardware import Hardware
from fastcpt.planning.jobs import best_job, changed
from fastcpt.planning.measured import (
    RATE_TOLERANCE,
    Published,
    Row,
    check_rows,
    measured_rows,
    published_rows,
)
from fastcpt.planning.ranges import OF_MEASUREMENTS, Range, called, measured_range, published_rate
from fastcpt.recipe import DEFAULT_RECIPE, load_recipe

# Prior estimates: typical shares of peak for such kernels, passes counted by hand. An efficiency that
# few rows determine stays near its prior.
BEFORE = Efficiency(
    bf16=0.65, fp8=0.5, flash=0.5, sdpa=0.2, cudnn=0.6,
    passes_liger=8.0, passes_fused=6.0, passes_fp8=2.0,
    passes_lora=40.0, passes_lora_fused=10.0, passes_fp8_weights=6.0, micro_batch_ms=20.0,
    memory=0.85, link=0.3, hidden=0.25, hidden_fused=0.6,
)  # fmt: skip
FIXED = ("network", "memory")  # not determined by any row
TRUST, DOUBT = 0.03, 0.2  # spread of a measurement, and of a prior estimate, in logarithms


def fit(rows: list[Row]) -> Efficiency:
    """The efficiencies that predict the rows best: damped Gauss-Newton on logarithms."""
    names = [name for name in asdict(BEFORE) if name not in FIXED]
    start = np.log([getattr(BEFORE, name) for name in names])

    def efficiency(x: np.ndarray) -> Efficiency:
        values = dict(zip(names, np.exp(x).tolist(), strict=True))
        shares = {name for name in names if not name.startswith(("passes", "micro"))}
        return replace(BEFORE, **{k: min(v, 0.97) if k in shares else v for k, v in values.items()})

    def errors(x: np.ndarray) -> np.ndarray:
        found = efficiency(x)
        rates = [
            np.log(tokens_per_second(job, hardware, found) / facts["rate"])
            / max(TRUST, facts.get("spread", 0.0))
            for job, hardware, facts in rows
        ]
        return np.concatenate([np.array(rates), (x - start) / DOUBT])

    x, damping, now = start, 1.0, errors(start)
    for _ in range(60):
        slopes = np.column_stack(
            [(errors(x + step) - now) / 1e-4 for step in 1e-4 * np.eye(len(x))]
        )
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ now)
        then = errors(x + move)
        if then @ then < now @ now:
            small = now @ now - then @ then < 1e-6 * (now @ now)
            x, now, damping = x + move, then, damping / 3
            if small:
                break
        else:
            damping *= 4
    return efficiency(x)


# Whole groups left out

GROUPS: dict[str, Callable[[Job], Any]] = {
    "model size": lambda job: job.shape.parameters,
    "GPUs": lambda job: job.ranks,
}


@dataclass(frozen=True)
class LeftOut:
    """A measured or published rate (tokens/s per GPU) that was not used for the range."""

    group: str
    what: str
    rate: float
    predicted: float
    range: Range
    earlier: Range

    @property
    def inside(self) -> bool:
        return self.range.low <= self.rate <= self.range.high

    @property
    def inside_earlier(self) -> bool:
        return self.earlier.low <= self.rate <= self.earlier.high


def left_out_groups(rows: list[Row]) -> list[LeftOut]:
    """The trainer's rows, each with the range of a plan without it and its group.

    For every model size and every number of GPUs among the trainer's rows, all its rows are left out
    (also other programs'); the efficiencies are fitted on the rest, and the range is made from it.
    """
    found = []
    for group, key in GROUPS.items():
        for value in sorted({key(job) for job, _, facts in rows if _trainers(facts)}):
            kept = [row for row in rows if key(row[0]) != value]
            efficiency = fit(kept)
            for job, hardware, facts in rows:
                if key(job) != value or not _trainers(facts):
                    continue
                likely = tokens_per_second(job, hardware, efficiency)
                now, _ = measured_range(job, hardware, likely, kept, published_rows())
                before = earlier_range(job, hardware, likely, kept, published_rows())
                name = called(job.shape) if group == "model size" else f"{value} GPU(s)"
                found.append(LeftOut(name, facts["what"], facts["rate"], likely, now, before))
    return found


def _trainers(facts: dict[str, Any]) -> bool:
    return str(facts["what"]).startswith("trainer")


OTHER_PROGRAMS = Path(__file__).with_name("other_programs.yaml")


def peers(rows: list[Row], of_others: list[Published]) -> list[LeftOut]:
    """Each rate of another program and the range of a plan for its model, method, GPUs and sequence,
    made from the other published rates only."""
    found = []
    published = published_rows()
    for row in of_others:
        job = _planned(row)
        if job is None:
            continue
        likely = tokens_per_second(job, row.hardware)
        others = [other for other in published if other != row]
        now, _ = measured_range(job, row.hardware, likely, rows, others)
        before = earlier_range(job, row.hardware, likely, rows, others)
        what = f"{called(row.shape)} {row.method}, {job.precision}, {row.source}"
        found.append(LeftOut(row.hardware.name, what, row.rate, likely, now, before))
    return found


def _planned(row: Published) -> Job | None:
    """How the trainer would run a published row's job; None if it does not fit."""
    assert row.hardware.gpu is not None
    recipe = changed(
        load_recipe(DEFAULT_RECIPE),
        {
            "lora": {} if row.method == "lora" else None,
            "corpus.max_seq_length": row.sequence,
            "training.use_fp8": row.fp8,
        },
    )
    return best_job(recipe, row.shape, row.hardware)


def earlier_range(
    job: Job, hardware: Hardware, likely: float, rows: list[Row], published: list[Published]
) -> Range:
    """The range before it widened with distance: 15 % either way wherever method and precision were
    measured on the chip, whatever the size and the number of GPUs; else from a quarter below up to
    the best published rate."""
    assert hardware.gpu is not None
    for row, there, _ in rows:
        same = (row.method, row.fp8) == (job.method, job.fp8)
        if same and there.gpu == hardware.gpu and hardware.hosts == 1:
            return Range(0.85 * likely, 1.15 * likely)
    # a chip's own published rate came before those of others, whatever it was measured on
    own = [row for row in published if row.hardware.gpu == hardware.gpu]
    one = [replace(row, hardware=hardware) for row in own]
    best = published_rate(job, hardware, one)
    if best is None and (other := published_rate(job, hardware, published)):
        best = (other[0] / (1 + OF_MEASUREMENTS), other[1])
    high = best[0] if best and hardware.hosts == 1 else 1.15 * likely
    return Range(0.75 * min(likely, high), high)


def print_left_out(rows: list[LeftOut], title: str) -> dict[str, Any]:
    """Prints one line per row and the share inside; returns both for JSON."""
    print(f"\n{title:<72}{'rate':>9}{'range':>20}{'':>4}{'earlier range':>20}")
    for row in rows:
        ends = [f"{r.low:,.0f} to {r.high:,.0f}" for r in (row.range, row.earlier)]
        inside = ["in" if inside else "out" for inside in (row.inside, row.inside_earlier)]
        print(
            f"{row.group + ': ' + row.what:<72.72}{row.rate:>9,.0f}{ends[0]:>20} {inside[0]:<3}"
            f"{ends[1]:>20} {inside[1]}"
        )
    inside, earlier = sum(row.inside for row in rows), sum(row.inside_earlier for row in rows)
    widths = [
        float(np.median([r.high / r.low for r in ranges]))
        for ranges in ([row.range for row in rows], [row.earlier for row in rows])
    ]
    print(
        f"{inside} of {len(rows)} inside, {earlier} before; the range's ends lie {widths[0]:.2f} times "
        f"apart, {widths[1]:.2f} before (median)"
    )
    return {
        "rows": len(rows),
        "inside": inside,
        "inside_before": earlier,
        "median_width": round(widths[0], 3),
        "median_width_before": round(widths[1], 3),
        "outside": [f"{row.group}: {row.what}" for row in rows if not row.inside],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print the efficiencies fitted on all")
    arguments = parser.parse_args()
    rows = measured_rows()
    if arguments.fit:
        for name, value in asdict(fit(rows)).items():
            print(f"    {name}: float = {value:.3g}")
        return
    checked = check_rows(EFFICIENCY)
    print(f"{'job':<58}{'tokens/s':>9}{'fitted':>8}{'left out':>10}{'memory':>8}")
    results = []
    for n, row in enumerate(checked):
        job, hardware, _ = rows[n]
        others = fit(rows[:n] + rows[n + 1 :])
        left_out = tokens_per_second(job, hardware, others) / row.rate - 1
        memory = "" if row.memory_error is None else f"{row.memory_error:+.1%}"
        print(
            f"{row.what:<58}{row.rate:>9,.0f}{row.rate_error:>+8.1%}{left_out:>+10.1%}{memory:>8}"
            f"{'' if abs(left_out) <= RATE_TOLERANCE else '  OUTSIDE'}",
            flush=True,
        )
        results.append(
            {
                "what": row.what,
                "cluster": row.cluster,
                "rate": row.rate,
                "error": round(row.rate_error, 4),
                "error_left_out": round(left_out, 4),
                "memory_error": None if row.memory_error is None else round(row.memory_error, 4),
            }
        )
    inside = sum(abs(row["error_left_out"]) <= RATE_TOLERANCE for row in results)
    print(f"{inside} of {len(results)} rows within {RATE_TOLERANCE:.0%} when left out")
    groups = print_left_out(left_out_groups(rows), "left out by group: the trainer's rows")
    published = print_left_out(
        peers(rows, published_rows()), "published by others, of their own programs"
    )
    measured = print_left_out(
        peers(rows, published_rows(OTHER_PROGRAMS)), "other programs, measured on these hosts"
    )
    summary = {"within_left_out": inside, "groups": groups}
    summary |= {"published": published, "other_programs": measured}
    print(json.dumps({"benchmark": "planning", "rows": results, **summary}))


if __name__ == "__main__":
    main()
