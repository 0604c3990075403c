"""The table of GPUs, ``gpus.yaml``, which users may edit.

Plans use a chip's figures, the trainer its peak; no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastcpt.yaml_files import read_yaml

TABLE = Path(__file__).with_name("gpus.yaml")


class HardwareError(ValueError):
    """An unknown GPU or cluster; the message says what is missing and where to add it."""


@dataclass(frozen=True)
class Gpu:
    """One chip; units as in ``gpus.yaml``."""

    name: str
    memory_gb: float
    bf16: float
    fp8: float | None
    memory_tb_s: float
    link_gb_s: float
    network_gb_s: float
    per_host: int
    usd_hour: float | None

    def peak(self, fp8: bool) -> float:
        """Dense FLOP/s; ``HardwareError`` for FP8 on a chip without it."""
        if fp8 and self.fp8 is None:
            raise HardwareError(f"{self.name} has no FP8: set training.use_fp8 to false")
        return 1e15 * ((self.fp8 or 0.0) if fp8 else self.bf16)


@cache
def table() -> dict[str, Any]:
    """The content of ``gpus.yaml``."""
    content: dict[str, Any] = read_yaml(TABLE)
    return content


def gpu_table() -> dict[str, Gpu]:
    """Every chip of ``gpus.yaml``, by name."""
    return {name: Gpu(name=name, **facts) for name, facts in table()["gpus"].items()}


# Words in the names of nvidia-smi and vendors that do not distinguish cards.
NO_NEWS = re.compile(r"nvidia|tesla|gpu|sxm\d?|hbm3e?")


def find_gpu(name: str) -> Gpu:
    """A chip by the table's name or nvidia-smi's (``NVIDIA H100 80GB HBM3``).

    Every word counts: ``H100 NVL`` and ``A100 40GB`` are different cards. A word that no card of the table
    has raises ``HardwareError``.
    """
    known = gpu_table()
    words = _words(name)
    best = max((chip for chip in known if _words(chip) <= words), key=len, default=None)
    odd = set()
    if best is not None:
        memory = known[best].memory_gb
        unread = words - _words(best)
        odd = {w for w in unread if not (NO_NEWS.fullmatch(w) or _is_memory(w, memory))}
    if best is None or odd:
        why = f" ('{' '.join(sorted(odd))}' is not known of {best})" if odd else ""
        raise HardwareError(
            f"GPU '{name}' is not in {TABLE.name}{why} (there: {', '.join(known)}): add its figures there"
        )
    return known[best]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(\d)[ -]+gb\b", r"\1gb", name.lower())))


def _is_memory(word: str, memory_gb: float) -> bool:
    """Whether a word like ``80gb`` is the nominal size of a card with ``memory_gb`` (10^9 bytes)."""
    size = re.fullmatch(r"(\d+)gb", word)
    return size is not None and memory_gb / 1.08 < int(size[1]) < memory_gb * 1.01
