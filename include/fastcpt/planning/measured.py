"""Compares the cost model with every measured row of ``measured.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastcpt.planning.costs import (
    EFFICIENCY,
    Efficiency,
    Job,
    memory_parts,
    tokens_per_second,
)
from fastcpt.planning.hardware import Hardware, named_hardware
from fastcpt.planning.models import KNOWN
from fastcpt.recipe_sections import Lora
from fastcpt.shapes import Shape
from fastcpt.yaml_files import read_yaml

MEASURED = Path(__file__).with_name("measured.yaml")
RATE_TOLERANCE, MEMORY_TOLERANCE = 0.15, 0.10
SEQUENCE = 3072  # of a row that does not set it


@dataclass(frozen=True)
class Checked:
    """One row: tokens/s per GPU, and 10^9 bytes of torch's allocator if known."""

    what: str
    cluster: str
    rate: float
    predicted_rate: float
    memory_gb: float | None
    predicted_memory_gb: float

    @property
    def rate_error(self) -> float:
        return self.predicted_rate / self.rate - 1

    @property
    def memory_error(self) -> float | None:
        return None if self.memory_gb is None else self.predicted_memory_gb / self.memory_gb - 1

    @property
    def holds(self) -> bool:
        return (
            abs(self.rate_error) <= RATE_TOLERANCE
            and abs(self.memory_error or 0.0) <= MEMORY_TOLERANCE
        )


Row = tuple[Job, Hardware, dict[str, Any]]


@dataclass(frozen=True)
class Published:
    """A rate that others published for their own program, in tokens/s per GPU.

    ``bound`` is False if the cards were power-limited, so that it is no bound for the chip.
    """

    shape: Shape
    method: str
    fp8: bool
    hardware: Hardware
    sequence: int
    rate: int
    source: str
    bound: bool = True


@cache
def measured_rows() -> list[Row]:
    """Every measured row: its job, its machines and its facts."""
    content: dict[str, Any] = read_yaml(MEASURED)
    return [_read(row) for row in content["rows"]]


@cache
def published_rows(file: Path = MEASURED) -> list[Published]:
    """Every rate in a file's list ``published``."""
    content: dict[str, Any] = read_yaml(file)
    return [
        Published(
            _shape(row),
            row["method"],
            row["precision"] == "fp8",
            named_hardware(row["cluster"]),
            row["sequence"],
            row["rate"],
            row["source"],
            row.get("bound", True),
        )
        for row in content["published"]
    ]


def check_rows(efficiency: Efficiency = EFFICIENCY) -> list[Checked]:
    """Every measured row with the cost model's prediction."""
    rows = []
    for job, hardware, facts in measured_rows():
        memory = facts.get("memory_gb")
        if "memory_gib" in facts:
            memory = facts["memory_gib"] * 2**30 / 1e9
        rows.append(
            Checked(
                facts["what"],
                hardware.name,
                float(facts["rate"]),
                tokens_per_second(job, hardware, efficiency),
                memory,
                sum(memory_parts(job).values()) / 1e9,
            )
        )
    return rows


FACTS = ("what", "cluster", "rate", "spread", "memory_gb", "memory_gib", "model", "shape", "lora")


def _read(row: dict[str, Any]) -> Row:
    hardware = named_hardware(row["cluster"])
    # ``lora`` is the dropout of adapters of rank 64 on q, k, v, o
    lora = Lora(lora_dropout=row["lora"]) if "lora" in row else None
    settings = {key: value for key, value in row.items() if key not in FACTS}
    defaults = {"sequence": SEQUENCE, "accumulation": 1, "ranks": hardware.count}
    job = Job(shape=_shape(row), lora=lora, **{**defaults, **settings})
    return job, hardware, row


def _shape(row: dict[str, Any]) -> Shape:
    return Shape(*row["shape"]) if "shape" in row else KNOWN[row["model"]]


def check_text(rows: list[Checked]) -> str:
    """The table, one line per row, and how many rows are within the tolerances."""
    lines = [
        f"{'job':<58}{'cluster':<9}{'tokens/s per GPU':>22}{'':>8}{'GB per GPU':>16}",
        f"{'':<67}{'measured':>11}{'predicted':>11}{'':>8}{'meas.':>8}{'pred.':>8}",
    ]
    for row in rows:
        memory = f"{row.memory_gb:>8.0f}" if row.memory_gb else f"{'':>8}"
        error = f"{row.memory_error:+7.1%}" if row.memory_error is not None else ""
        lines.append(
            f"{row.what:<58}{row.cluster:<9}{row.rate:>11,.0f}{row.predicted_rate:>11,.0f}"
            f"{row.rate_error:>+8.1%}{memory}{row.predicted_memory_gb:>8.1f} {error}"
            f"{'' if row.holds else '  OUTSIDE'}"
        )
    held = sum(row.holds for row in rows)
    lines.append(
        f"{held} of {len(rows)} rows within {RATE_TOLERANCE:.0%} of the rate and "
        f"{MEMORY_TOLERANCE:.0%} of the memory"
    )
    return "\n".join(lines)
