"""The cluster of a plan, given by a name such as ``4xB200`` or by the facts of ``check_cluster``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastcpt.gpus import TABLE, Gpu, HardwareError, find_gpu, table
from fastcpt.recipe_sections import Cluster


@dataclass(frozen=True)
class Host:
    """A host apart from its GPUs; units as in ``gpus.yaml``."""

    pcie_gb_s: float
    cpu_memory_gb_s: float
    memory_gb: float
    disk_gb_s: float
    ssh_mbit_s: tuple[float, float]


@dataclass(frozen=True)
class Hardware:
    """``count`` equal GPUs on hosts with at most ``per_host`` each; ``gpu`` None: ``count`` CPU ranks."""

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
        """The same kind of machines with another ``count``; checked hosts keep their number of GPUs."""
        usual = self.gpu.per_host if self.gpu and not self.seen else self.per_host
        return replace(self, count=count, per_host=usual if self.seen else min(count, usual))


def prices_source() -> str:
    """Date and source of the prices."""
    prices = table()["prices"]
    return f"prices of {prices['date']}, {prices['source']}"


def usual_host() -> Host:
    facts = dict(table()["host"])
    return Host(**{**facts, "ssh_mbit_s": tuple(facts["ssh_mbit_s"])})


def named_hardware(name: str) -> Hardware:
    """The cluster for a name like ``16xB200``; ``HardwareError`` for another format."""
    match = re.fullmatch(r"(\d{1,4})\s*[x×*]\s*([A-Za-z0-9 _-]+)", name.strip())
    if not match or int(match[1]) < 1:
        raise HardwareError(f"cluster '{name}': give it as COUNTxGPU, for example 4xB200")
    gpu = find_gpu(match[2])
    count = int(match[1])
    return Hardware(gpu, count, min(count, gpu.per_host), usual_host())


def seen_hardware(facts: Mapping[str, Any], cluster: Cluster) -> Hardware:
    """The cluster that ``check_cluster`` found; the recipe uses ``cluster.gpus`` of it.

    ``facts``: ``gpus`` [{``name``, ``memory_gb``}], ``memory_gb`` of the host, ``disk_free_gb``.
    """
    host = replace(usual_host(), memory_gb=float(facts.get("memory_gb") or 0.0))
    disk = facts.get("disk_free_gb")
    if cluster.cpu_only:
        return Hardware(None, cluster.gpus, cluster.gpus, host, True, disk)
    found = facts["gpus"]
    if not found:  # a Slurm login host: trust the recipe
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
    """The hardware of a plan: ``given`` by facts or name, else as named in the recipe."""
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
