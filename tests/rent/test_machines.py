"""A run's machine under a provider's faults: one at a time, released, and paid for by the second."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

import provider as of_tests
from fastcpt.rent import ledger, machines, provider
from fastcpt.rent.machines import MoneySpent, NoMachine, NotReleased
from fastcpt.rent.provider import AnswerRefused, NoCapacity, ProviderError

if TYPE_CHECKING:
    from conftest import Renting

from rent.conftest import DAG, RUN

pytestmark = pytest.mark.linux("a machine's processes are found by their environment")


def ssh(renting: Renting, rental: ledger.Rental, command: str) -> subprocess.CompletedProcess[str]:
    """A command on the machine, with the key that the ledger pins and no other."""
    assert rental.machine is not None
    known = ledger.known_hosts(renting.home, rental)
    options = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={known}", "BatchMode=yes"]
    words = [word for option in options for word in ("-o", option)]
    machine = rental.machine
    login = [
        "-p",
        str(machine.port),
        "-l",
        machine.user,
        "-i",
        str(renting.provider / "client_key"),
    ]
    return subprocess.run(
        ["ssh", *words, *login, machine.host, command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_a_machine_is_rented_reached_found_again_and_given_back(renting: Renting) -> None:
    rental = renting.take()
    assert (rental.state, renting.running()) == ("held", ["m1"])
    (rented,) = of_tests.machines(renting.provider)
    # what the run needs came to the provider, with the key that makes the request one
    assert rented["needs"]["gpus"] == 2
    assert rented["needs"]["gpu"] == "H100"
    assert rented["needs"]["run"] == RUN
    assert rented["key"].startswith("fast-cpt-manual-2026-11-28t01-")
    assert (
        ssh(renting, rental, "sleep 300 < /dev/null > /dev/null 2>&1 & echo here").stdout
        == "here\n"
    )
    assert len(of_tests.processes(rented)) == 2
    assert renting.take().machine == rental.machine
    (ended,) = renting.give_back()
    assert ended.state == "released"
    assert renting.running() == []
    # what ran on the machine is gone with it
    assert of_tests.processes(rented) == []
    assert renting.give_back() == []
    with pytest.raises(NoMachine, match=r"the run has ended.*clear this task"):
        machines.machine_of(renting.home, ledger.name_of_run(DAG, RUN))


def test_another_host_key_than_the_providers_word_is_not_believed(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["another key"])
    refused = ssh(renting, renting.take(), "true")
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr


def test_no_capacity_is_said_and_costs_nothing(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["no capacity"])
    with pytest.raises(NoCapacity, match="no such GPU is free in any zone"):
        renting.take()
    assert ledger.spent(renting.rentals(), time.time()) == 0
    assert renting.take().state == "held"
    assert len(renting.rentals()) == 1


def test_a_try_that_was_killed_after_the_provider_had_begun_leaves_a_name(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["killed"])
    with pytest.raises(ProviderError, match="ended with -9"):
        renting.take()
    assert (renting.states(), renting.running()) == (["asked"], ["m1"])
    # the next try finds that machine, and rents no other
    rental = renting.take()
    assert rental.machine is not None
    assert (rental.machine.id, renting.running()) == ("m1", ["m1"])


def test_a_machine_without_an_answer_goes_when_its_run_is_gone(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["killed"])
    with pytest.raises(ProviderError):
        renting.take()
    renting.goes_on = False
    assert renting.look_after() == []
    assert renting.running() == []
    # a command that was left behind may rent it yet: it is looked for until it cannot
    assert renting.states() == ["unverified"]
    (asked,) = renting.rentals()
    ledger.write(renting.home, asked, asked=asked.asked - machines.LATE_S)
    renting.look_after()
    assert renting.states() == ["released"]


def test_of_two_machines_one_is_given_back_at_once(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["twice"])
    rental = renting.take()
    assert rental.machine is not None
    assert renting.running() == [rental.machine.id]


def test_two_tries_at_once_rent_one_machine(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["late"])
    found = []
    tries = [threading.Thread(target=lambda: found.append(renting.take())) for _ in range(2)]
    for one in tries:
        one.start()
    for one in tries:
        one.join()
    assert [rental.machine and rental.machine.id for rental in found] == ["m1", "m1"]
    assert len(of_tests.machines(renting.provider)) == 1


def test_a_machine_that_was_taken_away_is_replaced(renting: Renting) -> None:
    renting.take()
    of_tests.end(renting.provider, "m1")
    rental = renting.take()
    assert rental.machine is not None
    assert (rental.machine.id, renting.running()) == ("m2", ["m2"])
    assert renting.states() == ["released", "held"]
    assert renting.rentals()[0].why == "the provider took the machine away"


def test_people_are_told_of_a_machine_that_was_taken_away(renting: Renting) -> None:
    renting.take()
    of_tests.end(renting.provider, "m1")
    (news,) = renting.look_after()
    assert news.what == "the provider took the machine away"
    assert renting.states() == ["released"]
    assert renting.look_after() == []


def test_an_answer_that_is_none_is_refused_and_its_machine_given_back(renting: Renting) -> None:
    of_tests.fail(renting.provider, acquire=["garbage"])
    with pytest.raises(AnswerRefused, match=r"host: String should match.*port: .*host_key: Field"):
        renting.take()
    assert renting.running() == []
    assert renting.take().state == "held"


@pytest.mark.parametrize("fault", ["API down", "lies"])
def test_a_release_that_did_not_happen_is_told_once_and_tried_again(
    renting: Renting, fault: str
) -> None:
    renting.take()
    of_tests.fail(renting.provider, release=[fault] * 3)
    with pytest.raises((ProviderError, NotReleased)):
        renting.give_back()
    assert (renting.states(), renting.running()) == (["unverified"], ["m1"])
    renting.goes_on = False
    (news,) = renting.look_after()
    assert news.what == "not given back"
    assert renting.look_after() == []
    # the command that people are told to type does it
    _, _, command = news.reason.partition("or type: ")
    assert shlex.split(command)[0] == "cd"
    subprocess.run(command, shell=True, check=True, executable="/bin/sh")  # noqa: S602
    assert renting.running() == []
    assert renting.look_after() == []
    assert renting.states() == ["released"]


def test_a_status_that_does_not_answer_is_no_release(renting: Renting) -> None:
    renting.take()
    of_tests.fail(renting.provider, status=["API down"])
    with pytest.raises(ProviderError, match="503 Service Unavailable"):
        renting.give_back()
    # it was given back all the same, and is asked about again
    assert (renting.states(), renting.running()) == (["unverified"], [])
    renting.look_after()
    assert renting.states() == ["released"]


def test_a_failed_runs_machine_is_kept_for_a_while_and_found_by_a_retry(renting: Renting) -> None:
    renting.take()
    machines.keep(renting.home, DAG, RUN, minutes=1)
    renting.goes_on = False
    renting.look_after()
    assert renting.running() == ["m1"]
    due = machines.next_due(renting.home)
    assert due == pytest.approx(time.time() + 60, abs=10)
    renting.goes_on = True
    assert renting.take().keep_until is None
    machines.keep(renting.home, DAG, RUN, minutes=0)
    renting.goes_on = False
    renting.look_after()
    assert renting.running() == []


def test_a_deleted_runs_machine_is_not_kept(renting: Renting) -> None:
    renting.take()
    machines.keep(renting.home, DAG, RUN, minutes=60)
    assert list(machines.look_after(renting.home, lambda *_: None)) == []
    assert (renting.running(), renting.rentals()[0].why) == ([], "its run was deleted")


def test_the_machine_of_another_run_is_left_alone(renting: Renting) -> None:
    renting.take()
    assert machines.release_machines(renting.home, DAG, "another", "it has ended") == []
    assert list(machines.look_after(renting.home, lambda dag, run: run == RUN)) == []
    assert renting.running() == ["m1"]


def test_money_counts_from_the_question_to_the_end_over_all_machines(renting: Renting) -> None:
    first = renting.take(money=36.0)
    # 36 USD an hour: an hour's worth
    deadline = ledger.deadline(renting.rentals(), first)
    assert deadline == pytest.approx(first.asked + 3600)
    assert machines.next_due(renting.home) == deadline
    renting.give_back()
    (first,) = renting.rentals()
    # as if it had been there for three quarters of it
    ledger.write(renting.home, first, asked=first.asked - 7200, released=first.asked - 4500)
    assert ledger.spent(renting.rentals(), time.time()) == pytest.approx(27.0)
    second = renting.take(money=36.0)
    assert ledger.deadline(renting.rentals(), second) == pytest.approx(second.asked + 900, abs=0.01)
    assert renting.look_after() == []
    ledger.write(renting.home, second, asked=second.asked - 300)
    (news,) = renting.look_after()
    assert news.what == "80 % of the money is spent"
    assert news.reason.endswith(" of 36.00 USD (budget.money)")
    assert renting.look_after() == []
    ledger.write(renting.home, renting.rentals()[-1], asked=second.asked - 900)
    (news,) = renting.look_after()
    assert news.what == "the money is spent"
    assert renting.running() == []
    with pytest.raises(MoneySpent, match=r"36\.00 USD of budget\.money are spent"):
        renting.take(money=36.0)
    assert renting.take(money=400.0).state == "held"


def test_the_ledger_counts_what_the_provider_bills(renting: Renting) -> None:
    for _ in range(2):
        renting.take()
        time.sleep(0.5)
        renting.give_back()
    now = time.time()
    billed, counted = of_tests.bill(renting.provider, now), ledger.spent(renting.rentals(), now)
    # never less: it has the seconds, too, in which the provider was asked and answered
    assert billed <= counted < billed + 2 * 60.0 / 3600 * of_tests.PRICE


def test_a_damaged_line_keeps_no_other_machine_from_being_given_back(renting: Renting) -> None:
    renting.take()
    (renting.home / "rented" / "other-1.json").write_text("{")
    renting.goes_on = False
    renting.look_after()
    assert renting.running() == []


def test_a_command_that_does_not_end_is_ended_with_what_it_started(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(provider.PATIENCE_S, "acquire", 0.5)
    rent = renting.rent.model_copy(update={"acquire": ["sh", "-c", "sleep 321 & sleep 321"]})
    began = time.monotonic()
    with pytest.raises(ProviderError, match=r"did not end in 0 s|did not end in 1 s"):
        machines.rent_machine(renting.home, DAG, RUN, rent, {})
    assert time.monotonic() - began < 5
    with pytest.raises(ProviderError, match="no-such-program cannot be run"):
        rent = renting.rent.model_copy(update={"acquire": ["no-such-program"]})
        machines.rent_machine(renting.home, DAG, "other", rent, {})
