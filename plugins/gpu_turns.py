"""A queue per cluster: one run at a time has the GPUs, from its first step there to its end.

The queue is a file under ``HOME/turns/`` with the runs in the order of asking; the first has the GPUs. A run
keeps its place from step to step, so that its evaluation precedes another run's training. It leaves the
queue when it ends (``run_state``); a run that disappeared otherwise, for example by deletion, is removed
when Airflow no longer lists it as active. The cluster's own lock (``agent.gpu_locks``) protects against other
users.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseTrigger, TriggerEvent

from fastcpt.cluster.jobs import job_name
from fastcpt.cluster.remote import Remote
from fastcpt.files import HOME, read_json, write_json

POLL_S = 5.0

Place = dict[str, str]


def cluster_of(remote: Remote) -> str:
    """The name of a cluster's queue: its host and port, without the login."""
    return f"{remote.host}:{remote.port or 22}"


def goes_on(dag: str, run: str) -> bool:
    """Whether a run is still active according to Airflow; for a task or a thread of the triggerer."""
    states = ["queued", "running"]
    return bool(RuntimeTaskInstance.get_dr_count(dag, run_ids=[run], states=states))


def take(
    cluster: str, dag: str, run: str, goes_on: Callable[[str, str], bool] = goes_on
) -> Place | None:
    """Ask for the GPUs: None if the run has them now, otherwise the place of the run that has them.

    A run that has to wait stays in the queue.
    """
    with _queue(_file(cluster)) as queue:
        if not any(_is(place, dag, run) for place in queue):
            queue.append({"dag": dag, "run": run})
        while not _is(queue[0], dag, run) and not goes_on(queue[0]["dag"], queue[0]["run"]):
            del queue[0]
        queue[0].setdefault("since", datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
        return None if _is(queue[0], dag, run) else queue[0]


def ahead(dag: str, run: str) -> list[Place]:
    """The places before the run's in its queue, starting with the one that has the GPUs."""
    for file in sorted((HOME / "turns").glob("*.json")):
        queue: list[Place] = read_json(file)
        own = next((n for n, place in enumerate(queue) if _is(place, dag, run)), 0)
        if own:
            return queue[:own]
    return []


def give_back(dag: str, run: str) -> None:
    """Remove an ended run from all queues."""
    for file in (HOME / "turns").glob("*.json"):
        with _queue(file) as queue:
            queue[:] = [place for place in queue if not _is(place, dag, run)]


def _is(place: Place, dag: str, run: str) -> bool:
    return (place["dag"], place["run"]) == (dag, run)


def _file(cluster: str) -> Path:
    return HOME / "turns" / f"{job_name(cluster)}.json"


@contextmanager
def _queue(file: Path) -> Iterator[list[Place]]:
    """A cluster's queue, locked for changes by one process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        queue: list[Place] = read_json(file) if file.exists() else []
        before = [dict(place) for place in queue]
        yield queue
        if queue != before:
            write_json(file, queue)


class TurnTrigger(BaseTrigger):
    """Fires when the run has the GPUs of a cluster; until then the task's log says who has them.

    It also fires at ``tell_at`` (seconds since the epoch), with the reason as ``waiting``.
    """

    def __init__(self, cluster: str, dag: str, run: str, tell_at: float | None = None) -> None:
        super().__init__()
        self.cluster = cluster
        self.dag = dag
        self.run_id = run
        self.tell_at = tell_at

    def serialize(self) -> tuple[str, dict[str, Any]]:
        kwargs = {
            "cluster": self.cluster,
            "dag": self.dag,
            "run": self.run_id,
            "tell_at": self.tell_at,
        }
        return ("gpu_turns.TurnTrigger", kwargs)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        told: Place | None = None
        while True:
            try:
                # not asgiref's threads: see RemoteJobTrigger
                first = await asyncio.to_thread(take, self.cluster, self.dag, self.run_id)
            except Exception:
                # the database or disk may recover, and the wait may last days
                self.log.exception("who has the GPUs of %s is not known: asked again", self.cluster)
                await asyncio.sleep(60)
                continue
            if first is None:
                break
            words = f"run {first['run']} of {first['dag']} has them since {first['since']}"
            if first != told:
                told = first
                self.log.info("waiting for the GPUs of %s: %s", self.cluster, words)
            if self.tell_at and time.time() > self.tell_at:
                yield TriggerEvent({"waiting": words})
                return
            await asyncio.sleep(POLL_S)
        yield TriggerEvent({})
