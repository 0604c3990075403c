"""A provider of machines: three commands that get JSON on stdin and answer with JSON on stdout.

    acquire  {"key", "run", "gpus", "gpu", "memory_gb", "disk_gb", "hours"}  -> ``ledger.Machine``
    release  {"key", "run", "id"}  -> anything
    status   {"key", "run", "id"}  -> {"machines": ["the id of each that still costs money", ...]}

The same key means the same machine: a second ``acquire`` finds it. ``id`` is null if no answer came.
Exit code 75 of ``acquire`` (EX_TEMPFAIL) means that no machine is available now. The last line of
stdout is the answer; stderr is for people.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastcpt.rent.ledger import Machine, Rental

PROJECT = Path(__file__).resolve().parents[3]
# A large machine takes up to a quarter of an hour to start; the other two commands are quick.
PATIENCE_S = {"acquire": 1800.0, "release": 300.0, "status": 60.0}
NO_CAPACITY = 75

log = logging.getLogger(__name__)


class ProviderError(OSError):
    """The provider did not carry out a request; a retry may help."""


class NoCapacity(ProviderError):
    """The provider has no such machine now."""


class AnswerRefused(ProviderError):
    """The provider's answer is not valid; the message says what is wrong."""


def acquire(rental: Rental) -> Machine:
    """Rent the machine with this key, or find it."""
    answer = _ask(rental, "acquire", rental.needs)
    try:
        return Machine.model_validate(answer)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise AnswerRefused(f"{_words(rental, 'acquire')} answered {wrong}") from None


def release(rental: Rental, machine_id: str | None) -> None:
    """Ask for a machine's release; ``machines`` says whether it is gone."""
    _ask(rental, "release", {"id": machine_id})


def machines(rental: Rental) -> set[str]:
    """The ids of the machines with the rental's key that cost money now."""
    answer = _ask(rental, "status", {"id": rental.machine and rental.machine.id})
    found = answer.get("machines")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise AnswerRefused(
            f'{_words(rental, "status")} answered {answer!r}, not {{"machines": [ids]}}'
        )
    return set(found)


def _ask(rental: Rental, do: str, values: Mapping[str, Any]) -> dict[str, Any]:
    request = json.dumps({"key": rental.key, "run": rental.run, **values})
    code, output, errors = _run(rental.commands[do], request, PATIENCE_S[do])
    if errors:
        log.info("%s says: %s", do, errors[-2000:])
    said = (errors or output or "nothing")[-1000:]
    if code is None:
        raise ProviderError(f"{_words(rental, do)} did not end in {PATIENCE_S[do]:.0f} s: {said}")
    if code == NO_CAPACITY and do == "acquire":
        raise NoCapacity(f"no such machine is to be had now: {said}")
    if code:
        raise ProviderError(f"{_words(rental, do)} ended with {code} and said: {said}")
    try:
        answer = json.loads(output.rpartition("\n")[2] or "{}")
    except json.JSONDecodeError:
        raise AnswerRefused(f"{_words(rental, do)} answered no JSON: {output[-500:]}") from None
    return answer if isinstance(answer, dict) else {}


def _words(rental: Rental, do: str) -> str:
    return f"cluster.rent.{do} ({rental.key})"


def _run(command: Sequence[str], request: str, patience: float) -> tuple[int | None, str, str]:
    """Exit code (None: timed out), stdout and stderr; its child processes end with it."""
    try:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ProviderError(f"{command[0]} cannot be run: {error.strerror}") from None
    try:
        output, errors = process.communicate(request, timeout=patience)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return None, output.strip(), errors.strip()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    return process.returncode, output.strip(), errors.strip()
