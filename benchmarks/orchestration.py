"""The cost of orchestration: a run of empty tasks, a wait of hours, a hundred waits at once.

    .env/airflow/bin/python benchmarks/orchestration.py [--jobs 100] [--watch 60]

Starts its own Airflow (SQLite) and OpenSSH server. ``overhead_s`` is the time from
triggering to the end of a run with as many tasks as the main DAG, all of them empty.
``triggerer_cpu_s_per_hour`` is the CPU time of the triggerer and its ssh processes while one
job is watched, minus that of the idle triggerer, scaled to an hour. ``jobs_watched`` is how many of
``--jobs`` jobs one triggerer watched to their end at once. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(REPOSITORY / part) for part in ("include", "include/scripts", "plugins", "tests")
]

import local_sshd  # noqa: E402

import remote_job  # noqa: E402
from faults import machines  # noqa: E402

TASKS = 20  # of dags/fast_cpt.py
DAGS = f"""
from airflow.sdk import dag, task
from remote_job import RemoteJob, RemoteJobOperator

@dag(schedule=None)
def interrupted():  # the stack waits for a DAG with this name
    @task
    def nothing():
        pass
    before = None
    for number in range({TASKS}):
        one = nothing.override(task_id="nothing_%d" % number)()
        if before is not None:
            before >> one
        before = one
interrupted()

def job(context):
    conf = context["dag_run"].conf
    # one line per second, until the benchmark ends it
    beat = 'i=0; until [ -e "$0" ]; do i=$((i + 1)); echo step $i; sleep 1; done'
    command = ["bash", "-c", beat, conf["enough"]]
    return RemoteJob("local_cluster", conf["root"], [command], alone="no")

class Watched(RemoteJobOperator):
    def __init__(self, *, number=0, **options):
        super().__init__(job=job, **options)

@dag(schedule=None, max_active_tasks=1000)
def watched():
    Watched.partial(task_id="train").expand_kwargs(numbers())

@task
def numbers(params=None, dag_run=None):
    return [{{"number": number}} for number in range(dag_run.conf["jobs"])]

watched()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--watch", type=int, default=60, help="seconds to watch one job")
    arguments = parser.parse_args()
    machines.DAGS = DAGS
    machines.SEEN_SOON = {}  # Airflow's own thresholds: nothing is killed here
    with tempfile.TemporaryDirectory(prefix="fast_cpt-orchestration-") as folder:
        server = local_sshd.start_server(Path(folder) / "sshd")
        airflow = machines.Airflow(Path(folder) / "home", server)
        try:
            measure_overheads(airflow, Path(folder) / "cluster", arguments)
        finally:
            airflow.end()
            os.killpg(server["pid"], signal.SIGTERM)


def measure_overheads(airflow: machines.Airflow, root: Path, arguments: argparse.Namespace) -> None:
    overheads = []
    for _ in range(2):
        began = time.monotonic()
        run = airflow.trigger("interrupted", {})
        ended(run, 300)
        overheads.append(time.monotonic() - began)
        print(f"{TASKS} tasks that do nothing: {overheads[-1]:.1f} s", flush=True)

    idle = watched_cpu(airflow, arguments.watch)
    print(f"idle triggerer: {idle:.2f} s of CPU in {arguments.watch} s", flush=True)
    one, many = root.parent / "one-is-enough", root.parent / "many-are-enough"
    conf = {"root": str(root), "jobs": 1, "enough": str(one)}
    run = airflow.trigger("watched", conf)
    states(run, "deferred", 1, 120)
    time.sleep(remote_job.SHORT_S)  # after this, a job is polled at the long interval
    busy = watched_cpu(airflow, arguments.watch)
    print(f"one job watched: {busy:.2f} s of CPU in {arguments.watch} s", flush=True)
    one.touch()
    ended(run, 300)

    run = airflow.trigger("watched", {**conf, "jobs": arguments.jobs, "enough": str(many)})
    at_once = states(run, "deferred", arguments.jobs, 900)
    spent = watched_cpu(airflow, 20)
    print(f"{at_once} jobs watched at once: {spent:.2f} s of CPU in 20 s", flush=True)
    many.touch()
    ended(run, 900)
    instances = [task for task in tasks(run) if task["map_index"] >= 0]
    succeeded = sum(task["state"] == "success" for task in instances)
    # check the log: every step once, in order
    sample = range(0, arguments.jobs, max(1, arguments.jobs // 10))
    logs = [[line for line in log(run, number) if line.startswith("step ")] for number in sample]
    complete = sum(
        len(lines) > 0 and lines == [f"step {step}" for step in range(1, len(lines) + 1)]
        for lines in logs
    )
    print(
        json.dumps(
            {
                "overhead_s": round(min(overheads), 1),
                "triggerer_cpu_s_per_hour": round((busy - idle) * 3600 / arguments.watch, 1),
                "jobs_watched": min(at_once, succeeded),
                "logs_in_order": f"{complete} of {len(logs)}",
                "tasks": TASKS,
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[1], 1),
            }
        )
    )


def tasks(run: machines.Run) -> list[dict[str, Any]]:
    """Every task of a run; Airflow hands out a hundred at a time."""
    found: list[dict[str, Any]] = []
    while True:
        answer = run.airflow.client.get(
            f"{run.path}/taskInstances", params={"limit": 100, "offset": len(found)}
        )
        answer.raise_for_status()
        page = answer.json()
        found += page["task_instances"]
        if len(found) >= page["total_entries"]:
            return found


def log(run: machines.Run, number: int) -> list[str]:
    answer = run.airflow.client.get(
        f"{run.path}/taskInstances/train/logs/1",
        params={"full_content": True, "map_index": number},
        headers={"Accept": "application/json"},
    )
    return [str(event.get("event", "")) for event in answer.json()["content"]]


def ended(run: machines.Run, seconds: float) -> None:
    machines.eventually(
        lambda: run.airflow.client.get(run.path).json()["state"] in ("success", "failed"),
        seconds,
        0.3,
    )


def states(run: machines.Run, state: str, count: int, seconds: float) -> int:
    """The most tasks that were in ``state`` at the same time, until ``count`` are."""
    most, until = 0, time.monotonic() + seconds
    while most < count and time.monotonic() < until:
        most = max(most, sum(task["state"] == state for task in tasks(run)))
        time.sleep(1)
    return most


def watched_cpu(airflow: machines.Airflow, seconds: float) -> float:
    """CPU seconds of the triggerer and its child processes, over ``seconds``."""
    before = cpu(airflow)
    time.sleep(seconds)
    return cpu(airflow) - before


def cpu(airflow: machines.Airflow) -> float:
    pid = airflow.processes["triggerer"].pid
    ticks = 0
    for one in [pid, *machines._descendants(pid)]:
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # its own, and that of its ended children
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
