"""How well the cost model predicts what was measured, also what it was not fitted on.

    python benchmarks/planning.py [--fit]

Fits the efficiencies of ``fastcpt.planning.costs`` on the rows of ``measured.yaml`` and, for each
row, on all others alone: the error left out is what a plan of something new has to expect. No GPU;
half a minute. ``--fit`` prints the efficiencies to put into ``costs.Efficiency`` after a new row.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include"))

from fastcpt.planning.costs import EFFICIENCY, Efficiency, tokens_per_second
from fastcpt.planning.measured import RATE_TOLERANCE, Row, check_rows, measured_rows

# What one would say before any run: shares of peak that kernels of the kind are known for, passes
# counted by hand. A number that few rows speak of stays near it.
BEFORE = Efficiency(
    bf16=0.65, fp8=0.5, flash=0.5, sdpa=0.2, cudnn=0.6,
    passes_liger=8.0, passes_te=8.0, passes_compile=2.0, passes_fused=6.0, passes_fp8=2.0,
    passes_lora=40.0, passes_lora_fused=10.0, passes_fp8_weights=6.0, micro_batch_ms=20.0,
    memory=0.85, link=0.3, hidden=0.25, hidden_fused=0.6,
)  # fmt: skip
FIXED = ("network", "memory")  # no row tells them
TRUST, DOUBT = 0.03, 0.2  # spread of a measurement, and of what is said before, in logarithms


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
    print(json.dumps({"benchmark": "planning", "rows": results, "within_left_out": inside}))


if __name__ == "__main__":
    main()
