"""Jobs on the cluster that outlive the connection: start once, find again, end for sure.

The agent (``agent.jobs``) keeps one folder per job, with ``job.sh``, a lock, a status and a log. A
job's name does not depend on the try, so a retry finds the job of the previous try.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastcpt.cluster.agent.job_folder import ACTIVE as ACTIVE  # others ask for jobs.ACTIVE
from fastcpt.cluster.remote import ClusterError, Remote, ask_through
from fastcpt.exit_codes import CANNOT_HEAL
from fastcpt.files import digest_of
from fastcpt.recipe_sections import Cluster

Alone = Literal["no", "root", "host"]


class JobRefused(ValueError):
    """The job says that its input is wrong; trying again would end the same way."""


class JobCancelled(ValueError):
    """Somebody ended the job on the cluster; it is not restarted automatically."""


class JobFailed(RuntimeError):
    """The job ended with an error; a retry resumes from its last checkpoint."""


class JobLost(OSError):
    """The job vanished without a final status (a reboot); a retry resumes from its last checkpoint."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options for sbatch; ``extra_lines`` go into the batch file as #SBATCH lines, as written."""

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

    If the file ``result`` exists, the job is already done. ``secrets`` become environment variables
    through a 0600 file that is removed once the job has started. ``alone`` jobs run one after
    another: all under one root, or all of this login on the host.
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
    """Which jobs a training excludes: a host's GPUs take one job at a time, whatever its root."""
    return "root" if cluster.cpu_only else "host"


def job_name(*parts: object) -> str:
    """A readable, unique folder name for a job, from DAG, run, task and map index."""
    readable = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(part)) for part in parts)
    return f"{readable[:120]}-{digest_of(*map(str, parts))[:8]}"


def watch(remote: Remote, root: str, rent: Mapping[str, Any]) -> None:
    """Have a rented host give itself back when nobody else does (``agent.rent.watch``).

    ``rent``: ``deadline_unix`` (by this machine's clock) and ``orphan_hours``, None for no limit;
    ``reserve_seconds`` before the deadline in which no job runs; ``release_command``, a list of words.
    A second call replaces them; without deadline and hours it ends the watch.
    """
    # the first request may have waited for the host, so only the second one's `now` is fresh
    for _ in range(2):
        ask_through(remote, "watch", root=root, rent=dict(rent), now=time.time())


def submit(remote: Remote, root: str, job: Job, owner: str = "") -> str:
    """Start the job or find it: ``started``, ``running`` or ``complete``.

    ``owner`` names the try that asks; that try may later end the job.
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
    """Whether the job exists and has not ended."""
    answer = ask_through(remote, "poll", root=root, jobs=[{"name": name, "seen": None}])
    return answer["jobs"][0].get("status", {}).get("state") in ACTIVE


def stop(remote: Remote, root: str, name: str, owner: str | None = None) -> None:
    """End the job and all its processes; ``ClusterError`` if one is left."""
    answer = ask_through(remote, "stop", root=root, name=name, owner=owner)
    if not answer["ended"]:
        raise ClusterError(f"{remote.host}: job {name} could not be ended; end it there by hand")


def outcome(
    remote: Remote, name: str, status: Mapping[str, Any], last_lines: Sequence[str]
) -> None:
    """Turn a job's final status into an exception; return if it succeeded."""
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
    """The last error that a command printed: the text after ``<Something>Error: ``."""
    for position in range(len(last_lines) - 1, -1, -1):
        if re.match(r"^\S*(Error|error): ", last_lines[position]):
            return last_lines[position].partition(": ")[2]
    return "\n".join(last_lines[-5:])
