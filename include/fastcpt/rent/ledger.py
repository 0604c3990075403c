"""The ledger of rented machines: one file per machine under ``HOME/rented/``, each written atomically.

The entry is written before the provider is asked, so that a killed process leaves a key to look for.
A run has one machine at a time: a process that changes the run's entries holds the run's lock.
"""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fastcpt.files import digest_of, read_json, whole_file, write_json

log = logging.getLogger(__name__)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\[\]][A-Za-z0-9_.:\[\]-]{0,252}$")]
# the content of sshd's .pub file, without the comment
HostKey = Annotated[
    str, StringConstraints(pattern=r"^(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]{40,}={0,2}$")
]


class Machine(BaseModel):
    """A provider's description of a machine; other keys are ignored. Price: USD, whole machine."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(min_length=1, max_length=500)
    host: Name
    port: int = Field(22, ge=1, le=65535)
    user: Name
    host_key: HostKey
    price_per_hour: float = Field(ge=0.0, allow_inf_nan=False)
    gpus: int = Field(ge=0)
    # arguments of a command that ends the machine from inside; None: only the provider can
    release_command: list[str] | None = None


class Rental(BaseModel):
    """An entry of the ledger. Times are seconds since the epoch.

    asked: the provider may have begun; held: it has answered; unverified: released, but the
    provider still lists it or does not answer; released: the provider says that it is gone.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    dag: str
    run: str
    connection: str = ""  # Airflow's, with the login key
    state: Literal["asked", "held", "unverified", "released"] = "asked"
    commands: dict[str, list[str]]
    needs: dict[str, Any]
    money: float | None = None
    asked: float
    machine: Machine | None = None
    released: float | None = None
    keep_until: float | None = None
    why: str = ""
    # if it differs from the plan: its ``gpus``, and ``gpu`` if that differs
    offered: dict[str, Any] | None = None
    told: tuple[str, ...] = ()

    def cost(self, now: float) -> float:
        """USD since the provider was asked; 0 if it never named a machine."""
        if self.machine is None:
            return 0.0
        return ((self.released or now) - self.asked) / 3600 * self.machine.price_per_hour


def _folder(home: Path) -> Path:
    return home / "rented"


def name_of_run(dag: str, run: str) -> str:
    """The prefix of the names of a run's machines: readable, and unique to the run."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", run).strip("-").lower()
    return f"fast-cpt-{readable[:24].strip('-')}-{digest_of(dag, run)[:10]}"


def write(home: Path, rental: Rental, **changes: Any) -> Rental:
    """Write the rental with ``changes`` into the ledger, and return it."""
    rental = rental.model_copy(update=changes)
    write_json(_folder(home) / f"{rental.key}.json", rental.model_dump(mode="json"))
    return rental


def of_run(home: Path, dag: str, run: str) -> list[Rental]:
    """The run's machines, the newest last."""
    return of_name(home, name_of_run(dag, run))


def of_name(home: Path, name: str) -> list[Rental]:
    """The machines of the run with this ``name_of_run``, the newest last."""
    files = _folder(home).glob(f"{name}-[0-9]*.json")
    return sorted(map(_read, files), key=lambda rental: rental.asked)


def every(home: Path) -> list[Rental]:
    """The machines of all runs, the oldest first."""
    found = []
    for file in _folder(home).glob("*.json"):
        try:
            rental = _read(file)
        except ValueError:  # other machines must still be looked after
            log.exception("%s is damaged: check at the provider whether its machine is gone", file)
            continue
        found.append(rental)
    return sorted(found, key=lambda one: one.asked)


def not_released(home: Path) -> list[Rental]:
    """The machines that may still cost money, the oldest first."""
    return [rental for rental in every(home) if rental.state != "released"]


def rental_of(home: Path, key: str) -> Rental:
    return _read(_folder(home) / f"{key}.json")


def _read(file: Path) -> Rental:
    return Rental.model_validate(read_json(file))


def next_key(home: Path, dag: str, run: str) -> str:
    """The key of the run's next machine: for the provider, requests with the same key are the same."""
    return f"{name_of_run(dag, run)}-{len(of_run(home, dag, run)) + 1}"


def spent(rentals: Iterable[Rental], now: float) -> float:
    """USD for all these machines, each until its end or now."""
    return sum(rental.cost(now) for rental in rentals)


def deadline(rentals: Iterable[Rental], rental: Rental) -> float | None:
    """When the run's money will be spent with this machine; None: never."""
    if rental.money is None or rental.machine is None or not rental.machine.price_per_hour:
        return None
    before = spent((one for one in rentals if one.key != rental.key), rental.asked)
    return rental.asked + max(0.0, rental.money - before) / rental.machine.price_per_hour * 3600


def known_hosts(home: Path, rental: Rental) -> Path:
    """A file with only the host key that the provider gave: no other is accepted."""
    machine = rental.machine
    if machine is None:
        raise ValueError(f"{rental.key}: the provider has named no machine yet")
    host = machine.host if machine.port == 22 else f"[{machine.host}]:{machine.port}"
    file, line = _folder(home) / f"{rental.key}.known_hosts", f"{host} {machine.host_key}\n"
    if not file.is_file() or file.read_text() != line:
        with whole_file(file) as aside:
            aside.write_text(line)
    return file


@contextmanager
def locked(home: Path, dag: str, run: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on the run's entries; yields False if another process has it and ``wait`` is off."""
    _folder(home).mkdir(parents=True, exist_ok=True)
    with (_folder(home) / f"{name_of_run(dag, run)}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
