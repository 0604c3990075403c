"""A run's machine: rented once, reliably released, and looked after even if the run is gone.

``rent_machine`` and ``release_machines`` may be killed at any instant and called again. ``look_after`` is for a
process that runs every few minutes, independently of the runs.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastcpt.recipe_sections import Rent
from fastcpt.rent import ledger, provider
from fastcpt.rent.ledger import Rental
from fastcpt.rent.provider import PROJECT, AnswerRefused, ProviderError

# A provider may take a while to report that a machine is gone.
VERIFY_S, VERIFY_POLL_S = 120.0, 5.0
# A killed process may have left a command behind that still rents.
LATE_S = provider.PATIENCE_S["acquire"] + 300.0
# The share of the money at which people are notified.
TOLD_SHARE = 0.8

What = Literal[
    "not given back",
    "80 % of the money is spent",
    "the money is spent",
    "the provider took the machine away",
]
BEGUN_AGAIN = "the run begins again"
TAKEN_AWAY: What = "the provider took the machine away"

log = logging.getLogger(__name__)


class MoneySpent(ValueError):
    """The run has spent its money: no further machine is rented for it."""


class NotReleased(OSError):
    """The provider does not say that a machine is gone; the message has the command to type."""


class NoMachine(ValueError):
    """The run has no machine now."""


class MachineLost(OSError):
    """The provider took the run's machine away; the run begins again with another."""


def rent_machine(
    home: Path,
    dag: str,
    run: str,
    rent: Rent,
    needs: dict[str, Any],
    money: float | None = None,
    connection: str = "",
) -> Rental:
    """The run's machine: the existing one if there is one, otherwise newly rented; never a second one.

    ``money`` is the limit for all of the run's machines together, in USD; ``connection`` is stored with
    the machine. Raises ``ProviderError`` and ``NotReleased`` (try again later), or ``MoneySpent``.
    """
    with ledger.locked(home, dag, run):
        for rental in _not_released(home, dag, run):
            if rental.state == "asked":
                # the same key again, so that the provider finds a machine rented by a killed try
                return _ask(home, rental)
            if rental.state == "held" and _is_there(rental):
                return ledger.write(home, rental, keep_until=None, money=money)
            _give_back(home, rental, rental.why or TAKEN_AWAY)
        before = ledger.of_run(home, dag, run)
        if money is not None and ledger.spent(before, time.time()) >= money:
            raise MoneySpent(
                f"the {money:,.2f} USD of budget.money are spent: raise it in a recipe, and run again"
            )
        rental = Rental(
            key=ledger.next_key(home, dag, run),
            dag=dag,
            run=run,
            connection=connection,
            commands={"acquire": rent.acquire, "release": rent.release, "status": rent.status},
            needs=needs,
            money=money,
            asked=time.time(),
        )
        return _ask(home, ledger.write(home, rental))


def _is_there(rental: Rental) -> bool:
    return rental.machine is not None and rental.machine.id in provider.machines(rental)


def _ask(home: Path, rental: Rental) -> Rental:
    try:
        machine = provider.acquire(rental)
    except AnswerRefused as error:
        # a machine that nobody can use may have been rented
        _give_back(home, rental, str(error))
        raise
    rental = ledger.write(home, rental, state="held", machine=machine)
    for other in provider.machines(rental) - {machine.id}:
        log.warning("%s: %s was rented beside it, and is given back", rental.key, other)
        provider.release(rental, other)
    return rental


def release_machines(
    home: Path, dag: str, run: str, why: str, offered: dict[str, Any] | None = None
) -> list[Rental]:
    """Release the run's machines, and return when the provider says that they are gone.

    ``offered`` describes a machine that differs from the plan. Raises ``ProviderError`` or ``NotReleased``;
    the ledger then has the state ``unverified``.
    """
    with ledger.locked(home, dag, run):
        left = [ledger.write(home, one, offered=offered) for one in _not_released(home, dag, run)]
        return [_give_back(home, rental, why) for rental in left]


def keep(home: Path, dag: str, run: str, minutes: float) -> None:
    """Keep the ended run's machine for this long; then ``look_after`` releases it."""
    with ledger.locked(home, dag, run):
        for rental in _not_released(home, dag, run):
            ledger.write(home, rental, keep_until=time.time() + minutes * 60)


def machine_of(home: Path, name: str) -> Rental:
    """The machine of the run with this ``name_of_run``. Raises ``NoMachine`` or ``MachineLost``."""
    rentals = ledger.of_name(home, name)
    if rentals and rentals[-1].state == "held":
        return rentals[-1]
    if rentals and rentals[-1].why == TAKEN_AWAY:
        raise MachineLost(f"{TAKEN_AWAY}: within minutes the run begins again with another")
    why = f" ({rentals[-1].why})" if rentals and rentals[-1].why else ""
    raise NoMachine(f"the run has no rented machine{why}: clear this task, it takes one again")


def _not_released(home: Path, dag: str, run: str) -> list[Rental]:
    return [one for one in ledger.of_run(home, dag, run) if one.state != "released"]


def _give_back(home: Path, rental: Rental, why: str) -> Rental:
    """Release the machine; it is ``released`` when the provider lists none under its key.

    A machine that was never named stays ``unverified`` while a late answer may still rent it.
    """
    machine = rental.machine.id if rental.machine else None
    rental = ledger.write(home, rental, state="unverified", why=why)
    provider.release(rental, machine)
    left = provider.machines(rental)
    for other in left - {machine}:
        provider.release(rental, other)
    until = time.monotonic() + VERIFY_S
    while left:
        if time.monotonic() > until:
            raise NotReleased(f"the provider still names {', '.join(sorted(left))} of {rental.key}")
        time.sleep(VERIFY_POLL_S)
        left = provider.machines(rental)
    if machine is None and time.time() - rental.asked < LATE_S:
        return rental
    return ledger.write(home, rental, state="released", released=time.time(), keep_until=None)


def command_to_type(rental: Rental) -> str:
    """The command that releases a machine from a shell."""
    machine = rental.machine.id if rental.machine else None
    request = json.dumps({"key": rental.key, "run": rental.run, "id": machine})
    words = shlex.join(rental.commands["release"])
    return f"cd {shlex.quote(str(PROJECT))} && echo {shlex.quote(request)} | {words}"


@dataclass(frozen=True)
class News:
    """A notification about a machine."""

    rental: Rental
    what: What
    reason: str


def look_after(home: Path, goes_on: Callable[[str, str], bool | None]) -> Iterator[News]:
    """Release each machine of a run that has ended, was deleted, or has spent its money.

    ``goes_on(dag, run)`` says whether the run is running in Airflow; None if it was deleted, in which
    case no machine is kept. A machine that another process has locked is left to it.
    """
    for listed in ledger.not_released(home):
        with ledger.locked(home, listed.dag, listed.run, wait=False) as mine:
            rental = ledger.rental_of(home, listed.key)
            if not mine or rental.state == "released":
                continue
            try:
                yield from _look_at(home, rental, goes_on(rental.dag, rental.run))
            except (ProviderError, NotReleased) as error:
                if ledger.rental_of(home, rental.key).state == "unverified":
                    reason = f"{error}. Look there, or type: {command_to_type(rental)}"
                    yield from _once(home, rental, "not given back", reason)
                else:
                    log.warning("%s: %s", rental.key, error)


def _look_at(home: Path, rental: Rental, goes_on: bool | None) -> Iterator[News]:
    now = time.time()
    spent = ledger.spent(ledger.of_run(home, rental.dag, rental.run), now)
    money = rental.money
    words = f"{spent:,.2f} of {money:,.2f} USD (budget.money)" if money else ""
    if money and spent >= money:
        _give_back(home, rental, f"the money is spent: {words}")
        yield from _once(home, rental, "the money is spent", f"{words}: its machine is gone")
    elif rental.state == "unverified":
        _give_back(home, rental, rental.why)
    elif goes_on is None:
        _give_back(home, rental, "its run was deleted")
    elif not goes_on and now >= (rental.keep_until or 0.0):
        _give_back(home, rental, "its run has ended")
    elif goes_on and rental.state == "held" and not _is_there(rental):
        _give_back(home, rental, TAKEN_AWAY)
        yield from _once(home, rental, TAKEN_AWAY, "the run begins again with another")
    elif money and spent >= TOLD_SHARE * money:
        yield from _once(home, rental, "80 % of the money is spent", words)


def to_begin_again(home: Path, goes_on: Callable[[str, str], bool | None]) -> list[Rental]:
    """The last machines of runs that need another, as it was taken away or differed from the plan.

    A run ends when its machine differs from the plan; a run that ended for another reason needs
    no machine. ``begun_again`` marks these as done.
    """
    last = {(rental.dag, rental.run): rental for rental in ledger.every(home)}
    return [
        rental
        for (dag, run), rental in last.items()
        if rental.state == "released"
        and (rental.offered or rental.why == TAKEN_AWAY)
        and BEGUN_AGAIN not in rental.told
        and goes_on(dag, run) is (rental.offered is None)
    ]


def begun_again(home: Path, rental: Rental) -> None:
    """Mark the run of this machine, its last, as begun again."""
    with ledger.locked(home, rental.dag, rental.run):
        ledger.write(home, rental, told=(*rental.told, BEGUN_AGAIN))


def _once(home: Path, rental: Rental, what: What, reason: str) -> Iterator[News]:
    rental = ledger.rental_of(home, rental.key)
    if what not in rental.told:
        yield News(rental, what, reason)
        ledger.write(home, rental, told=(*rental.told, what))


def next_due(home: Path) -> float | None:
    """When the next machine has to be released: its money is spent, or its keep time is over."""
    due = []
    for rental in ledger.not_released(home):
        if rental.state == "held":
            rentals = ledger.of_run(home, rental.dag, rental.run)
            due += [rental.keep_until, ledger.deadline(rentals, rental)]
    return min((moment for moment in due if moment is not None), default=None)
