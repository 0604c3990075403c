"""An Airflow with the recipe ``rented``, which takes its host from the tests' provider."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

import provider
from e2e.conftest import Stack
from fastcpt.rent import ledger
from fastcpt.rent.ledger import Rental
from faults.machines import REPOSITORY, descendants
from stack_module import own_checkout

DAG = "fast_cpt"
SEEN_SOON = ("TIMEOUT",)


class Renting(Stack):
    """Runs of ``rented``; what the provider has, and what the ledger says."""

    @property
    def provider(self) -> Path:
        return self.home / "provider"

    def form(self) -> dict[str, Any]:
        return {**super().form(), "recipe": "rented", "instructions": None}

    def rentals(self, run_id: str) -> list[Rental]:
        return ledger.of_run(self.home, DAG, run_id)

    def machines(self, run_id: str) -> list[dict[str, Any]]:
        """What the provider has rented out for the run, the oldest first."""
        keys = {rental.key for rental in self.rentals(run_id)}
        return [one for one in provider.machines(self.provider) if one["key"] in keys]

    def running(self) -> list[str]:
        return [str(one["id"]) for one in provider.machines(self.provider, running=True)]

    def left(self) -> list[str]:
        """What is still there of machines that the provider calls ended, and its running ones."""
        ended = provider.machines(self.provider, running=False)
        return [*self.running(), *(one["id"] for one in ended if provider.processes(one))]

    def delete(self, run_id: str) -> None:
        """As a person does it: Airflow deletes no run that goes on, and a marked one does until its teardowns end."""
        self.mark(run_id, "failed")
        path = f"/api/v2/dags/{DAG}/dagRuns/{run_id}"
        until(lambda: self.api.client.delete(path).status_code != 409, 600, "it goes on")

    def answer(self, run_id: str, choice: str) -> None:
        """Approve or reject the plan of a run that waits for it."""
        self.api.client.patch(
            f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/approve_plan/-1/hitlDetails",
            json={"chosen_options": [choice], "params_input": {}},
        ).raise_for_status()


def until(holds: Callable[[], object], seconds: float, what: object = "") -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.5)


def recipe(checkout: Path, folder: Path, **sections: dict[str, Any]) -> None:
    """Add ``rented`` to the recipes: the sample on a machine of the provider in ``folder``."""
    configs = checkout / "include" / "configs"
    values = yaml.safe_load((configs / "sample.yaml").read_text())
    rent = {**provider.commands(folder), **sections.pop("rent", {})}
    values["cluster"] |= {"connection": "rented_login", "root": "fast_cpt", "rent": rent}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    (configs / "rented.yaml").write_text(yaml.safe_dump(values))


def kill_and_start(stack: Renting, command: str) -> None:
    """SIGKILL to one of Airflow's processes and all that it started, and the same one again."""
    entry = next(one for one in stack.state["processes"] if one["command"] == f"airflow {command}")
    pairs = Path(f"/proc/{entry['pid']}/environ").read_bytes().split(b"\0")
    own = dict(pair.decode().split("=", 1) for pair in pairs if b"=" in pair)
    for pid in [entry["pid"], *descendants(entry["pid"])]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    airflow = str(REPOSITORY / ".env/airflow/bin/airflow")
    with (stack.home / "logs" / f"{command}.log").open("ab") as log:
        process = subprocess.Popen(
            [airflow, command], env=own, stdout=log, stderr=log, start_new_session=True
        )
    entry |= stack.module.process_groups.entry(process.pid, entry["command"])


@contextmanager
def renting(home: Path, **sections: dict[str, Any]) -> Iterator[Renting]:
    """Start it; ``sections`` are what the recipe has besides the sample's."""
    checkout = own_checkout(home / "checkout")
    folder = provider.create(home / "provider")
    recipe(checkout, folder, **sections)
    extra = {"key_file": str(folder / "client_key")}
    extra["python"] = str(checkout / ".env/cluster/bin/python")
    login = {"conn_type": "gpuhost", "extra": extra}
    os.environ["AIRFLOW_CONN_RENTED_LOGIN"] = json.dumps(login)
    # a task whose process is gone is missed within a minute
    os.environ |= {
        f"AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_{name}": "60" for name in SEEN_SOON
    }
    try:
        with Renting.started(home, checkout / "include" / "scripts") as one:
            yield one
    finally:
        del os.environ["AIRFLOW_CONN_RENTED_LOGIN"]
        for name in SEEN_SOON:
            del os.environ[f"AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_{name}"]
        for machine in provider.machines(folder):
            provider.end(folder, machine["id"])
