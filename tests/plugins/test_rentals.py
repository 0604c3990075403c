"""The DAG that looks after rented machines: what it gives back, and what people are told by mail and webhook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.sdk import DAG
from airflow.sdk.execution_time.context import set_current_context
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

import rentals
from fastcpt.rent import ledger
from receivers import MailServer, WebServer, receivers, settings_of
from rent.conftest import RUN, Renting, renting

pytestmark = pytest.mark.linux("a machine's processes are found by their environment")

__all__ = ["renting"]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MailServer, WebServer]]:
    with receivers() as (mail, web):
        for name, value in settings_of(mail, web).items():
            monkeypatch.setenv(name, value)
        yield mail, web


class Round:
    """A round of the DAG's task; ``state`` is the run's in Airflow, None if it was deleted."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: str | None = "running"
        monkeypatch.setattr(rentals, "HOME", home)
        monkeypatch.setattr(RuntimeTaskInstance, "get_dr_count", self._count)

    def _count(self, dag: str, run_ids: list[str], states: list[str] | None = None) -> int:
        assert run_ids == [RUN]
        return int(self.state is not None and (states is None or self.state in states))

    def __call__(self) -> None:
        names = {"dag_id": "fast_cpt_rentals", "run_id": "a", "task_id": "look_after"}
        task = SimpleNamespace(**names, log_url="http://airflow.example/")
        with set_current_context({"ti": task, "dag": DAG("fast_cpt_rentals")}):  # type: ignore[typeddict-item]
            rentals.look_after()


@pytest.fixture
def look(renting: Renting, monkeypatch: pytest.MonkeyPatch) -> Round:
    return Round(renting.home, monkeypatch)


def test_80_percent_of_the_money_arrives_once_by_mail_and_webhook(
    renting: Renting, look: Round, received: tuple[MailServer, WebServer]
) -> None:
    mail, web = received
    rental = renting.take(money=36.0)
    look()
    assert (mail.received, web.received) == ([], [])
    # 50 minutes ago, at 36 USD an hour: 30 of the 36 USD
    ledger.write(renting.home, rental, asked=rental.asked - 3000)
    look()
    look()
    ((_, message),) = mail.received
    assert f"rented machine of {RUN}: 80 % of the money is spent" in message["Subject"]
    body = message.get_body(("html",))
    assert body is not None
    assert " of 36.00 USD (budget.money)" in body.get_content()
    assert len(web.received) == 1
    # it trains on
    assert renting.running() == ["m1"]


def test_a_run_that_airflow_ended_for_its_time_gives_its_machine_back(
    renting: Renting, look: Round
) -> None:
    # dagrun_timeout skips the run's teardowns: this DAG is who gives the machine back
    renting.take()
    look()
    assert renting.running() == ["m1"]
    look.state = "failed"
    look()
    assert (renting.states(), renting.running()) == (["released"], [])


def test_a_machine_that_is_taken_again_after_a_clear_is_looked_after_too(
    renting: Renting, look: Round
) -> None:
    renting.take()
    look.state = "failed"
    look()
    look.state = "running"  # cleared
    renting.take()
    look()
    assert (renting.states(), renting.running()) == (["released", "held"], ["m2"])
    look.state = None  # deleted
    look()
    assert (renting.states(), renting.running()) == (["released", "released"], [])
