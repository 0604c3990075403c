"""A test provider, a ledger, and a run that rents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import provider as of_tests
from fastcpt.recipe_sections import Rent
from fastcpt.rent import ledger, machines
from fastcpt.rent.ledger import Rental
from fastcpt.rent.machines import News

DAG, RUN = "fast_cpt", "manual__2026-11-28T01:00:00+00:00"


class Renting:
    """A run, its ledger and its provider."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.provider = of_tests.create(folder / "provider")
        self.rent = Rent(**of_tests.commands(self.provider))
        self.goes_on = True

    def take(self, money: float | None = None) -> Rental:
        needs = {"gpus": 2, "gpu": "H100", "disk_gb": 50.0}
        return machines.rent_machine(self.home, DAG, RUN, self.rent, needs, money)

    def give_back(self) -> list[Rental]:
        return machines.release_machines(self.home, DAG, RUN, "the run has ended")

    def look_after(self) -> list[News]:
        return list(machines.look_after(self.home, lambda dag, run: self.goes_on))

    def rentals(self) -> list[Rental]:
        return ledger.of_run(self.home, DAG, RUN)

    def states(self) -> list[str]:
        return [rental.state for rental in self.rentals()]

    def running(self) -> list[str]:
        """What the provider has running, by its own books and by the processes that are there."""
        ids = [str(one["id"]) for one in of_tests.machines(self.provider, running=True)]
        for ended in of_tests.machines(self.provider, running=False):
            assert of_tests.processes(ended) == []
        return ids


@pytest.fixture
def renting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renting]:
    monkeypatch.setattr(machines, "VERIFY_S", 0.3)
    monkeypatch.setattr(machines, "VERIFY_POLL_S", 0.1)
    one = Renting(tmp_path)
    yield one
    for machine in of_tests.machines(one.provider):
        of_tests.end(one.provider, machine["id"])
