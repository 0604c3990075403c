"""A rented host releases itself even if everything on it but the watcher has died."""

from __future__ import annotations

import os
import signal
import time

import pytest

from cluster.test_jobs import wait
from cluster.test_rented_host import Rented, rented
from fastcpt.cluster.agent import processes
from faults.machines import sshd_sessions

__all__ = ["rented"]  # a fixture

pytestmark = [pytest.mark.faults, pytest.mark.linux("a training's ranks are found in /proc")]


@pytest.mark.parametrize("dies", ["sshd", "supervisor", "job", "sshd and supervisor"])
def test_it_is_given_back_when_something_else_has_died(rented: Rented, dies: str) -> None:
    rented.train(saving=1)
    status = wait(rented.remote, rented.root, "train", "running")["status"]
    rented.watch(orphan_hours=8 / 3600)
    quiet = time.time()
    if "sshd" in dies:
        for pid in [rented.facts["pid"], *sshd_sessions(rented.facts["port"])]:
            processes.signal_quietly(os.kill, pid, signal.SIGKILL)
    if "supervisor" in dies:
        os.kill(status["supervisor"], signal.SIGKILL)
    if dies == "job":
        os.killpg(status["pid"], signal.SIGKILL)
    assert 7 < rented.given_back(40) - quiet < 20
    if dies != "job":  # the training was there to save
        assert rented.saved < rented.given_back(1)
    assert rented.watcher() is not None
