"""Jobs on the cluster that outlive the connection: started once, found again, ended for sure.

The protocol is the agent's (``agent.jobs``): a folder a job with ``job.sh``, a lock, a status and a
log. A job's name does not depend on the try, so that a retry finds the job of the try before.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastcpt.cluster.remote import ClusterError, Remote, ask_through
from fastcpt.exit_codes import CANNOT_HEAL
from fastcpt.files import digest_of
from fastcpt.recipe_sections import Cluster

ACTIVE = ("starting", "waiting", "running")
Alone = Literal["no", "root", "host"]


class JobRefused(ValueError):
    """The job says that its input is wrong; the same again would end the same."""


class JobCancelled(ValueError):
    """Somebody ended the job on the cluster; it is not started again unasked."""


class JobFailed(RuntimeError):
    """The job ended with an error; it goes on from its last checkpoint when it is tried again."""


class JobLost(OSError):
    """The job vanished without a word (a reboot); trying again goes on from its last checkpoint."""


@dataclass(frozen=True)
class SlurmOptions:
    """What sbatch is told beyond the job itself; ``extra_lines`` are #SBATCH options as written."""

    account: str | None = None
    partition: str | None = None
    time_limit: str | None = None
    extra_lines: Sequence[str] = ()
    gpus: int = 0

    @property
    def arguments(self) -> list[str]:
        given = {
            "account": self.account,
            "partition": self.partition,
            "time": self.time_limit,
            "gpus": self.gpus or None,
        }
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


@dataclass(frozen=True)
class Job:
    """Commands to run one after another, until one fails.

    ``result`` is the file whose presence means that all is done already. ``secrets`` become
    environment variables by way of a 0600 file that is gone once the job has started. Jobs that
    are ``alone`` run one after another: those under one root, or all of the login's on the host.
    """

    name: str
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    result: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    alone: Alone = "root"
    slurm: SlurmOptions | None = None

    @property
    def script(self) -> str:
        """``job.sh``: every word quoted, so that a value is never more than a value."""
        lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.folder:
            lines.append(f"cd {shlex.quote(self.folder)}")
        lines += [shlex.join(command) for command in self.commands]
        return "\n".join(lines) + "\n"


def alone(cluster: Cluster) -> Alone:
    """Beside what a training does not run: a host's GPUs are for one at a time, whatever its root."""
    return "root" if cluster.cpu_only else "host"


def job_name(*parts: object) -> str:
    """A folder name for a job from DAG, run, task and map index: readable, and unlike any other."""
    readable = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(part)) for part in parts)
    return f"{readable[:120]}-{digest_of(*map(str, parts))[:8]}"


def watch(remote: Remote, root: str, rent: Mapping[str, Any]) -> None:
    """Have a rented host give itself back when nobody else does (``agent.rent.watch``).

    ``rent``: ``deadline_unix`` (by this machine's clock) and ``orphan_hours``, None where there is none;
    ``reserve_seconds`` before the deadline in which no job runs; ``release_command``, a list of words.
    Asked again it renews them; without deadline and hours it ends the watch.
    """
    # the first may have had to wait for the host: the second compares the clocks
    for _ in range(2):
        ask_through(remote, "watch", root=root, rent=dict(rent), now=time.time())


def submit(remote: Remote, root: str, job: Job, owner: str = "") -> str:
    """Start the job or find it: ``started``, ``running`` or ``complete``.

    ``owner`` names the try that asks: it may end later what it started or found here.
    """
    if bad := [line for line in (job.slurm.extra_lines if job.slurm else ()) if "\n" in line]:
        raise ClusterError(f"cluster.slurm.extra_lines: {bad[0]!r} is more than one line")
    answer = ask_through(
        remote,
        "submit",
        root=root,
        name=job.name,
        script=job.script,
        digest=digest_of(job.script, job.slurm and [job.slurm.arguments, *job.slurm.extra_lines]),
        secrets=dict(job.secrets),
        result=job.result,
        alone="no" if job.slurm else job.alone,  # Slurm shares out the GPUs itself
        owner=owner,
        slurm=job.slurm and job.slurm.arguments,
        extra_lines=job.slurm and list(job.slurm.extra_lines),
    )
    return str(answer["found"])


def runs(remote: Remote, root: str, name: str) -> bool:
    """Whether the job is there and has not ended."""
    answer = ask_through(remote, "poll", root=root, jobs=[{"name": name, "seen": None}])
    return answer["jobs"][0].get("status", {}).get("state") in ACTIVE


def stop(remote: Remote, root: str, name: str, owner: str | None = None) -> None:
    """End the job and every process of it; ``ClusterError`` when one is left."""
    answer = ask_through(remote, "stop", root=root, name=name, owner=owner)
    if not answer["ended"]:
        raise ClusterError(f"{remote.host}: job {name} could not be ended; end it there by hand")


def outcome(
    remote: Remote, name: str, status: Mapping[str, Any], last_lines: Sequence[str]
) -> None:
    """Raise what a job's final status means; returns when it succeeded."""
    state = status["state"]
    if state == "succeeded":
        return
    said = "\n".join(last_lines)
    if state == "failed" and status.get("exit_code") == CANNOT_HEAL:
        raise JobRefused(_reason(last_lines) or f"{name}: its input is wrong; see its log")
    if state == "failed":
        raise JobFailed(
            f"job {name} on {remote.host} ended with {status.get('exit_code')}:\n{said}"
        )
    if state == "cancelled":
        raise JobCancelled(
            f"job {name} was ended on {remote.host} by somebody there: clear the task to start it again"
        )
    raise JobLost(f"job {name} on {remote.host} is gone: {status.get('why', state)}")


def _reason(last_lines: Sequence[str]) -> str:
    """The error a command printed last: ``<Something>Error: ...`` to its end."""
    for position in range(len(last_lines) - 1, -1, -1):
        if re.match(r"^\S*(Error|error): ", last_lines[position]):
            return last_lines[position].partition(": ")[2]
    return "\n".join(last_lines[-5:])
