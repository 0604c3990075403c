"""The plan against what was measured: every row of ``measured.yaml``, predicted beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from fastcpt.planning.costs import Job, memory_parts, tokens_per_second
from fastcpt.planning.hardware import named_hardware
from fastcpt.planning.plan import MEASURED
from fastcpt.planning.shapes import KNOWN
from fastcpt.recipe import Lora

RATE_TOLERANCE, MEMORY_TOLERANCE = 0.15, 0.10
SEQUENCE = 3072  # of every row, unless it says otherwise


@dataclass(frozen=True)
class Checked:
    """One row: tokens/s a GPU, and GiB of torch's allocator where it was read."""

    what: str
    cluster: str
    rate: float
    predicted_rate: float
    memory_gib: float | None
    predicted_memory_gib: float

    @property
    def rate_error(self) -> float:
        return self.predicted_rate / self.rate - 1

    @property
    def memory_error(self) -> float | None:
        return None if self.memory_gib is None else self.predicted_memory_gib / self.memory_gib - 1

    @property
    def holds(self) -> bool:
        return (
            abs(self.rate_error) <= RATE_TOLERANCE
            and abs(self.memory_error or 0.0) <= MEMORY_TOLERANCE
        )


def check_rows() -> list[Checked]:
    """Every measured row with the cost model's answer."""
    return [_checked(dict(row)) for row in yaml.safe_load(MEASURED.read_text("utf-8"))["rows"]]


def _checked(row: dict[str, Any]) -> Checked:
    what, cluster, rate = row.pop("what"), row.pop("cluster"), float(row.pop("rate"))
    memory = row.pop("memory_gib", None)
    hardware = named_hardware(cluster)
    job = Job(
        shape=KNOWN[row.pop("model")],
        lora=Lora() if row.pop("lora", False) else None,
        sequence=row.pop("sequence", SEQUENCE),
        accumulation=row.pop("accumulation", 1),
        ranks=hardware.count,
        **row,
    )
    bytes_there = sum(memory_parts(job).values())
    predicted = tokens_per_second(job, hardware)
    return Checked(what, cluster, rate, predicted, memory, bytes_there / 2**30)


def check_text(rows: list[Checked]) -> str:
    """The table, a line a row, and how many hold."""
    lines = [
        f"{'job':<58}{'cluster':<9}{'tokens/s a GPU':>22}{'':>8}{'GiB a GPU':>16}",
        f"{'':<67}{'measured':>11}{'predicted':>11}{'':>8}{'meas.':>8}{'pred.':>8}",
    ]
    for row in rows:
        memory = f"{row.memory_gib:>8.0f}" if row.memory_gib else f"{'':>8}"
        error = f"{row.memory_error:+7.1%}" if row.memory_error is not None else ""
        lines.append(
            f"{row.what:<58}{row.cluster:<9}{row.rate:>11,.0f}{row.predicted_rate:>11,.0f}"
            f"{row.rate_error:>+8.1%}{memory}{row.predicted_memory_gib:>8.1f} {error}"
            f"{'' if row.holds else '  OUTSIDE'}"
        )
    held = sum(row.holds for row in rows)
    lines.append(
        f"{held} of {len(rows)} rows within {RATE_TOLERANCE:.0%} of the rate and "
        f"{MEMORY_TOLERANCE:.0%} of the memory"
    )
    return "\n".join(lines)
