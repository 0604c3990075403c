"""Rented machines that nobody else gives back: those of runs that ended, were deleted, or spent their money."""

from __future__ import annotations

import time

from airflow.sdk import get_current_context

from fastcpt.files import HOME
from gpu_turns import goes_on
from notifications import tell

MINUTES = 3


def look_after() -> None:
    """Look at every machine of the ledger, and again at the moment when one has to go."""
    from fastcpt.rent import machines

    context, until = get_current_context(), time.time() + 60 * MINUTES - 30
    while True:
        for news in machines.look_after(HOME, goes_on):
            rental = news.rental
            print(f"{rental.key}: {news.what}: {news.reason}")
            tell(context, f"rented machine of {rental.run}: {news.what}", news.reason)
        due = machines.next_due(HOME)
        if due is None or max(due, time.time()) > until:
            return
        time.sleep(max(1.0, due - time.time()))
