"""What a run's tasks are doing, for its page: Airflow's states, the GPU queue, news of the jobs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import gpu_turns
from fastcpt.reporting.record import read
from fastcpt.reporting.summary import duration

WAITING = ("awaiting_input", "deferred", "up_for_retry", "running", "queued")


@dataclass(frozen=True)
class TaskNow:
    """A task's state in Airflow, and since when, if known."""

    task: str
    state: str
    since: datetime | None = None


@dataclass(frozen=True)
class Line:
    """What one task is doing."""

    task: str
    words: str
    link: str = ""


def tasks_of(dag: str, run: str) -> list[TaskNow]:
    """The tasks of a run in Airflow's database; empty if there is no such run. For the API server."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    columns = (TaskInstance.task_id, TaskInstance.state, TaskInstance.start_date)
    wanted = select(*columns).where(TaskInstance.dag_id == dag, TaskInstance.run_id == run)
    with create_session(scoped=False) as session:
        return [
            TaskNow(task, str(state or ""), since) for task, state, since in session.execute(wanted)
        ]


def task_lines(
    record: Path, dag: str, run: str, tasks: Sequence[TaskNow], links: Mapping[str, str]
) -> list[Line]:
    """What runs and what waits, and for what; tasks that wait for a person come first."""
    now = [task for state in WAITING for task in tasks if task.state == state]
    mapped: dict[tuple[str, str], int] = {}
    for task in now:  # the instances of a mapped task share one line
        mapped[task.task, task.state] = mapped.get((task.task, task.state), 0) + 1
    return [
        Line(task, _words(record, dag, run, task, state, count), links.get(task, ""))
        for (task, state), count in mapped.items()
    ]


def _words(record: Path, dag: str, run: str, task: str, state: str, count: int) -> str:
    pieces = f" ({count} at a time)" if count > 1 else ""
    if state == "awaiting_input":
        return f"{task} waits for a person to approve the plan, before money is spent."
    if state == "up_for_retry":
        return f"{task} was interrupted and is tried again in a moment."
    if state == "queued":
        return f"{task} waits for a worker{pieces}."
    if state == "running":
        return f"{task} runs{pieces}."
    if holder := _before_in_queue(dag, run):
        return f"{task} waits for the GPUs: {holder}."
    news = read(record, f"live/{task}.json")
    if not news:
        return f"{task} runs on the GPU host."
    ago = f"{duration(max(0.0, time.time() - news['at']))} ago"
    if news["state"] != "running":
        return f"{task} waits on the GPU host: {news['why'] or news['state']} ({ago})."
    return f"{task} runs on the GPU host. Its last line, {ago}: {news['line']}"


def _before_in_queue(dag: str, run: str) -> str:
    """Who has the GPUs that the run is waiting for; empty if it has them or did not ask."""
    for place in gpu_turns.ahead(dag, run):
        return f"run {place['run']} of {place['dag']} has them since {place.get('since', 'now')}"
    return ""
