"""The range of a planned rate, by how much the plan differs from a measurement.

If a job like the planned one was measured, the range is the cost model's rate plus or minus
``OF_MEASUREMENTS``, or a run's own rate plus or minus ``OF_LAST_RUN``. Each difference between plan and
measurement widens the range by a factor: one per doubling of GPUs, hosts, parameters or sequence, one for
another chip, family, method, precision or kernels. Differences are treated as independent, so the squares of
their factors' logarithms add up. The measurement with the narrowest range is used, and named.

``benchmarks/planning.py`` leaves out whole model sizes and GPU counts and counts how often the range contains
the measurements left out. Those groups are one doubling of GPUs and up to six of size away; the factors for
more GPUs, hosts, chips and methods are judged, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastcpt.planning.costs import Job, model_flops
from fastcpt.planning.hardware import Hardware
from fastcpt.planning.measured import Published, Row
from fastcpt.planning.models import KNOWN
from fastcpt.recipe_sections import Lora
from fastcpt.shapes import Shape

OF_LAST_RUN, OF_MEASUREMENTS = 0.07, 0.15  # half-widths without any difference
A_DOUBLING_OF_GPUS, A_DOUBLING_OF_HOSTS = 1.10, 1.15
A_DOUBLING_OF_SIZE, A_DOUBLING_OF_SEQUENCE = 1.03, 1.03
ANOTHER_CHIP = 0.2  # exponent for the largest ratio of peaks, memory bandwidths or links
NVLINK = 100  # GB/s of a link; PCIe cards have less
# For 8B in FP8 at micro-batch 1 the plan is 1.25 (two GPUs) and 1.36 (four) times as fast as measured: such
# a small micro-batch does not hide ZeRO-3's communication
A_MICRO_BATCH_OF_ONE = 1.2
ANOTHER_WAY = (
    1.15  # full instead of LoRA, FP8 instead of bf16, other kernels, another family's layers
)


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def plus(self, more: float) -> Range:
        return Range(self.low + more, self.high + more)

    def words(self, digits: int = 1) -> str:
        low, high = f"{self.low:,.{digits}f}", f"{self.high:,.{digits}f}"
        return low if low == high else f"{low} to {high}"


def measured_range(
    job: Job,
    hardware: Hardware,
    likely: float,
    rows: Iterable[Row],
    published: Iterable[Published] = (),
) -> tuple[Range, str]:
    """Tokens/s per GPU around the cost model's ``likely``, and their basis in words.

    On a chip without measurements, the range goes up to the best rate shown for that model and method, here
    or elsewhere: nobody reached more, and with NVLink it can be reached.
    """
    rows = list(rows)
    differences = [differing(job, hardware, row, there) for row, there, _ in rows]
    nearest = min(range(len(rows)), key=lambda n: _together(differences[n]))
    row, there, _ = rows[nearest]
    assert hardware.gpu is not None
    assert there.gpu is not None
    found, best = widened(likely, OF_MEASUREMENTS, differences[nearest]), None
    chips = {other.gpu.name for _, other, _ in rows if other.gpu is not None}
    if hardware.gpu.name not in chips:
        own = [
            Published(row.shape, row.method, row.fp8, there, row.sequence, facts["rate"], "here")
            for row, there, facts in rows
            if row.kernels == "fused"
        ]
        best = published_rate(job, hardware, [*published, *own])
    if best is not None:
        joined = hardware.hosts == 1 and (hardware.count == 1 or hardware.gpu.link_gb_s >= NVLINK)
        high = best[0] if joined else min(found.high, best[0])
        found = Range(found.low * min(1.0, best[0] / likely), high)
    source = (
        f"this project's measurements on {there.gpu.name} ({_gpus(there.count)}, "
        f"{called(row.shape)}, {row.method}, {row.precision}), scaled by its cost model"
        f"{range_words(found, likely, differences[nearest])}"
    )
    return found, f"{source}; at best {best[1]}" if best else source


def widened(likely: float, half_width: float, differences: dict[str, float]) -> Range:
    """``likely`` plus or minus ``half_width``, widened by the differences' factors."""
    factor = _together(differences)
    return Range(likely * (1 - half_width) / factor, likely * (1 + half_width) * factor)


def _together(differences: dict[str, float]) -> float:
    return math.exp(math.hypot(*(math.log(factor) for factor in differences.values())))


def range_words(found: Range, likely: float, differences: dict[str, float]) -> str:
    """The range's ends relative to ``likely``, and the reasons for widening it."""
    ends = f": {found.low / likely - 1:+.0%} to {found.high / likely - 1:+.0%}"
    return f"{ends}, wider for {', '.join(differences)}" if differences else ends


def differing(job: Job, hardware: Hardware, row: Job, there: Hardware) -> dict[str, float]:
    """How the job differs from a measured row, in words, each with the factor (above 1) by which it widens
    the range."""
    assert hardware.gpu is not None
    assert there.gpu is not None
    gpu, other = hardware.gpu, there.gpu
    ratios = [gpu.memory_tb_s / other.memory_tb_s, gpu.peak(False) / other.peak(False)]
    if hardware.count > 1:
        ratios.append(gpu.link_gb_s / other.link_gb_s)
    farthest = max(abs(math.log(ratio)) for ratio in ratios)
    kernels = (job.kernels, job.attention == "sdpa")
    found = {
        _gpus(hardware.count): A_DOUBLING_OF_GPUS ** _doublings(hardware.count, there.count),
        f"{hardware.hosts} hosts": A_DOUBLING_OF_HOSTS ** _doublings(hardware.hosts, there.hosts),
        called(job.shape): A_DOUBLING_OF_SIZE
        ** _doublings(job.shape.parameters, row.shape.parameters),
        f"sequences of {job.sequence}": A_DOUBLING_OF_SEQUENCE
        ** _doublings(job.sequence, row.sequence),
        "micro-batch 1": A_MICRO_BATCH_OF_ONE
        if hardware.count > 1 and job.micro_batch == 1 < row.micro_batch
        else 1.0,
        gpu.name: math.exp(ANOTHER_CHIP * farthest),
        job.method: ANOTHER_WAY if job.method != row.method else 1.0,
        job.precision: ANOTHER_WAY if job.fp8 != row.fp8 else 1.0,
        f"{job.kernels} kernels": ANOTHER_WAY
        if kernels != (row.kernels, row.attention == "sdpa")
        else 1.0,
        f"{job.shape.family.words}'s layers": ANOTHER_WAY
        if job.shape.model_type != row.shape.model_type
        else 1.0,
        "offload": ANOTHER_WAY if job.offload != row.offload else 1.0,
    }
    return {words: factor for words, factor in found.items() if factor > 1.005}


def _doublings(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def called(shape: Shape) -> str:
    """A shape's name if known, else its size."""
    name = next((known for known, other in KNOWN.items() if other == shape), None)
    return name or f"{shape.parameters / 1e9:.2g} B parameters"


def published_rate(
    job: Job, hardware: Hardware, published: Iterable[Published]
) -> tuple[float, str] | None:
    """The best published tokens/s per GPU for the same model and method, scaled by operations and peak to
    this sequence and chip, with its source in words. None if there is none.

    A figure for the same chip in one host takes precedence over other chips or many hosts, which are less
    comparable and get ``OF_MEASUREMENTS`` added.
    """
    assert hardware.gpu is not None
    same: list[tuple[float, str]] = []
    others: list[tuple[float, str]] = []
    for row in published:
        alike = (row.shape, row.method, row.fp8) == (job.shape, job.method, job.fp8)
        if not alike or not row.bound:
            continue
        gpu = row.hardware.gpu
        assert gpu is not None
        scale = hardware.gpu.peak(job.fp8) / gpu.peak(job.fp8)
        lora = Lora() if job.lora else None
        scale *= model_flops(job.shape, row.sequence, lora)
        scale /= model_flops(job.shape, job.sequence, job.lora)
        words = f"{row.rate:,} tokens/s per GPU on {gpu.name} ({row.source}, {_gpus(row.hardware.count)})"
        here = gpu.name == hardware.gpu.name and row.hardware.hosts == 1
        if here:
            same.append((row.rate * scale, words))
        else:
            others.append((row.rate * scale * (1 + OF_MEASUREMENTS), words))
    return max(same or others, default=None)
