"""Checks a cluster before anything is sent to it, and reports everything that is missing at once."""

from __future__ import annotations

import subprocess
from typing import Any

from fastcpt.cluster.first_contact import first_contact
from fastcpt.cluster.remote import ClusterError, Remote, ask
from fastcpt.recipe_sections import Cluster

OLDEST_PYTHON = (3, 8)


def check_host(remote: Remote, root: str) -> dict[str, Any]:
    """Log in for the first time and return the host's facts (``agent.host.check``).

    Memory and disk are in GB. Raises ``ClusterError`` if something is missing that every recipe
    needs, and ``ConnectionLost`` if the host does not answer.
    """
    facts = _facts(remote, root)
    _require(remote, _missing(facts))
    return facts


def check_cluster(remote: Remote, cluster: Cluster) -> dict[str, Any]:
    """``check_host``, plus what this recipe needs. With ``cpu_only``, cores count instead of GPUs."""
    facts = _facts(remote, cluster.root)
    _require(remote, [*_missing(facts), *_missing_for(facts, cluster)])
    return facts


def _facts(remote: Remote, root: str) -> dict[str, Any]:
    _check_rsync()
    first_contact(remote)
    return ask(remote, "check", root=root)


def _check_rsync() -> None:
    """Raise ``ClusterError`` if this machine's rsync is missing or is Apple's openrsync.

    openrsync cannot fetch a list of files, and passes the quotes in its ssh command on to ssh.
    """
    try:
        version = subprocess.run(["rsync", "--version"], capture_output=True, text=True)
    except FileNotFoundError:
        raise ClusterError("this machine has no rsync: install the package rsync") from None
    if "openrsync" in version.stdout + version.stderr:
        raise ClusterError("this machine's rsync is Apple's openrsync: brew install rsync")


def _require(remote: Remote, missing: list[str]) -> None:
    if missing:
        raise ClusterError(f"{remote.host} cannot take this run:\n" + "\n".join(missing))


def _missing(facts: dict[str, Any]) -> list[str]:
    missing = []
    if tuple(int(part) for part in facts["python"].split(".")[:2]) < OLDEST_PYTHON:
        missing.append(f"- python3 is {facts['python']}: install 3.8 or newer")
    for program, package in (("rsync", "rsync"), ("bash", "bash")):
        if not facts[program]:
            missing.append(f"- no {program} there: install the package {package}")
    if why := facts["unwritable"].get(facts["root"]):
        missing.append(
            f"- nothing can be written to {facts['root']}: {why}. Choose another root "
            "(in the connection, or cluster.root)"
        )
    return missing


def _missing_for(facts: dict[str, Any], cluster: Cluster) -> list[str]:
    missing = []
    homes = {folder: why for folder, why in facts["unwritable"].items() if folder != facts["root"]}
    for folder, why in homes.items():
        if not cluster.cpu_only:
            missing.append(
                f"- nothing can be written to {folder}: {why}. Jobs take turns on the GPUs by a "
                "file there: give the login a home that it may write to"
            )
    if facts["root"] not in facts["unwritable"] and facts["disk_free_gb"] < cluster.min_free_gb:
        missing.append(
            f"- {facts['disk_free_gb']:.1f} GB free under {facts['root']}, the recipe needs "
            f"{cluster.min_free_gb:g} (cluster.min_free_gb): free some, or choose another cluster.root"
        )
    if cluster.launcher == "slurm" and not facts["slurm"]:
        missing.append("- no sbatch there, but cluster.launcher is slurm: set it to process")
    hosts = 1 + len(cluster.hosts)
    wanted = -(-cluster.gpus // hosts)
    if cluster.launcher == "slurm":
        return missing  # a login host need not have the GPUs
    if cluster.cpu_only:
        if facts["cores"] < wanted:
            missing.append(
                f"- {facts['cores']} CPU cores, the recipe wants {wanted} ranks: lower cluster.gpus"
            )
    elif len(facts["gpus"]) < wanted:
        found = ", ".join(gpu["name"] for gpu in facts["gpus"]) or "none that nvidia-smi shows"
        missing.append(
            f"- {len(facts['gpus'])} GPUs ({found}), the recipe wants {wanted} a host: "
            "lower cluster.gpus, or choose another host"
        )
    return missing
