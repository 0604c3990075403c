"""The cluster a plan is for: by a name such as ``4xB200``, or by what ``check_cluster`` found.

``gpus.yaml`` beside this file holds what is known of each chip; it is meant to be edited.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastcpt.recipe_sections import Cluster
from fastcpt.yaml_files import read_yaml

TABLE = Path(__file__).with_name("gpus.yaml")


class HardwareError(ValueError):
    """The cluster cannot be planned for; the message says what is missing and where to add it."""


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


@dataclass(frozen=True)
class Host:
    """What is around the GPUs; units as in ``gpus.yaml``."""

    pcie_gb_s: float
    cpu_memory_gb_s: float
    memory_gb: float
    disk_gb_s: float
    ssh_mbit_s: tuple[float, float]


@dataclass(frozen=True)
class Hardware:
    """``count`` equal GPUs over hosts of at most ``per_host``; ``gpu`` None: CPUs, ``count`` ranks."""

    gpu: Gpu | None
    count: int
    per_host: int
    host: Host
    seen: bool = False  # by check_cluster, not only named
    disk_free_gb: float | None = None

    @property
    def hosts(self) -> int:
        return math.ceil(self.count / self.per_host)

    @property
    def name(self) -> str:
        return f"{self.count}x{self.gpu.name if self.gpu else 'CPU'}"

    @property
    def host_memory_gb(self) -> float:
        """Main memory of all hosts."""
        return self.host.memory_gb * self.hosts

    def with_count(self, count: int) -> Hardware:
        """The same machines, more or fewer of them; hosts that were seen hold as many as they do."""
        usual = self.gpu.per_host if self.gpu and not self.seen else self.per_host
        return replace(self, count=count, per_host=usual if self.seen else min(count, usual))


@cache
def _table() -> dict[str, Any]:
    content: dict[str, Any] = read_yaml(TABLE)
    return content


def gpu_table() -> dict[str, Gpu]:
    """Every chip of ``gpus.yaml``, by name."""
    return {name: Gpu(name=name, **facts) for name, facts in _table()["gpus"].items()}


def prices_source() -> str:
    """Date and source of the prices."""
    prices = _table()["prices"]
    return f"prices of {prices['date']}, {prices['source']}"


def usual_host() -> Host:
    facts = dict(_table()["host"])
    return Host(**{**facts, "ssh_mbit_s": tuple(facts["ssh_mbit_s"])})


# Words of nvidia-smi's and shops' names that tell no card from another.
NO_NEWS = re.compile(r"nvidia|tesla|gpu|sxm\d?|hbm3e?")


def find_gpu(name: str) -> Gpu:
    """A chip by the table's name or nvidia-smi's (``NVIDIA H100 80GB HBM3``).

    Every word counts: ``H100 NVL`` and ``A100 40GB`` are cards of their own, and a word that no card
    of the table has is refused (``HardwareError``).
    """
    table = gpu_table()
    words = _words(name)
    best = max((known for known in table if _words(known) <= words), key=len, default=None)
    odd = set()
    if best is not None:
        memory = table[best].memory_gb
        unread = words - _words(best)
        odd = {w for w in unread if not (NO_NEWS.fullmatch(w) or _is_memory(w, memory))}
    if best is None or odd:
        why = f" ('{' '.join(sorted(odd))}' is not known of {best})" if odd else ""
        raise HardwareError(
            f"GPU '{name}' is not in {TABLE.name}{why} (there: {', '.join(table)}): add its figures there"
        )
    return table[best]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(\d)[ -]+gb\b", r"\1gb", name.lower())))


def _is_memory(word: str, memory_gb: float) -> bool:
    """Whether ``80gb`` is what a card of so many 10^9 bytes is sold as."""
    size = re.fullmatch(r"(\d+)gb", word)
    return size is not None and memory_gb / 1.08 < int(size[1]) < memory_gb * 1.01


def named_hardware(name: str) -> Hardware:
    """The cluster behind ``16xB200``; ``HardwareError`` where that is not its form."""
    match = re.fullmatch(r"(\d{1,4})\s*[x×*]\s*([A-Za-z0-9 _-]+)", name.strip())
    if not match or int(match[1]) < 1:
        raise HardwareError(f"cluster '{name}': give it as COUNTxGPU, for example 4xB200")
    gpu = find_gpu(match[2])
    count = int(match[1])
    return Hardware(gpu, count, min(count, gpu.per_host), usual_host())


def seen_hardware(facts: Mapping[str, Any], cluster: Cluster) -> Hardware:
    """The cluster as ``check_cluster`` found it, of which the recipe uses ``cluster.gpus``.

    ``facts``: ``gpus`` [{``name``, ``memory_gb``}], ``memory_gb`` of the host, ``disk_free_gb``.
    """
    host = replace(usual_host(), memory_gb=float(facts.get("memory_gb") or 0.0))
    disk = facts.get("disk_free_gb")
    if cluster.cpu_only:
        return Hardware(None, cluster.gpus, cluster.gpus, host, True, disk)
    found = facts["gpus"]
    if not found:  # a Slurm login host: the recipe's word for it
        return replace(named_hardware(f"{cluster.gpus}x{cluster.gpu}"), disk_free_gb=disk)
    names = sorted({gpu["name"] for gpu in found})
    if len(names) > 1:
        raise HardwareError(
            f"the cluster mixes {' and '.join(names)}: the slowest would set the pace"
        )
    memory = min(float(gpu["memory_gb"]) for gpu in found)
    gpu = find_gpu(names[0])
    if not 0.9 < memory / gpu.memory_gb < 1.1:
        raise HardwareError(
            f"the cluster's {names[0]} has {memory:.1f} GB, a {gpu.name} {gpu.memory_gb:.1f}: it is "
            f"another card; add its figures to {TABLE.name}"
        )
    gpu = replace(gpu, memory_gb=memory)
    return Hardware(gpu, cluster.gpus, len(found), host, True, disk)


def hardware_of(cluster: Cluster, given: Mapping[str, Any] | str | None) -> Hardware:
    """The hardware of a plan: ``given`` by facts or name, else the recipe's own words."""
    if isinstance(given, str):
        return named_hardware(given)
    if given is not None:
        return seen_hardware(given, cluster)
    if cluster.cpu_only:
        return Hardware(None, cluster.gpus, cluster.gpus, usual_host())
    if cluster.gpu is None:
        raise HardwareError(
            "cluster.gpu is empty: name the GPU (for example B200), or see the cluster"
        )
    return named_hardware(f"{cluster.gpus}x{cluster.gpu}")
