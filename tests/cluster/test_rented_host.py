"""A rented host releases itself: without requests, and when its money is spent."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from cluster.servers import remote_of
from cluster.test_jobs import log_of, poll, wait
from fastcpt.cluster import jobs
from fastcpt.cluster.agent import processes
from fastcpt.cluster.remote import ClusterError, Remote, ask
from fastcpt.training import commands

pytestmark = pytest.mark.linux("a training's ranks are found in /proc")

# A launcher as DeepSpeed's: told to end, it takes its rank with it at once. A rank alone saves first.
LAUNCHER = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, sys.argv[1], *sys.argv[2:]], env={**os.environ, "RANK": "0"})
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), os._exit(1)))
sys.exit(rank.wait())
"""
RANK = """
import os, signal, sys, time
folder, saving = sys.argv[1], float(sys.argv[2])
def end(*_):
    open(os.path.join(folder, "ending"), "w").close()
    time.sleep(saving)
    with open(os.path.join(folder, "saved"), "w") as file:
        file.write(str(time.time()))
    print("saved", flush=True)
    os._exit(143)
signal.signal(signal.SIGTERM, signal.SIG_IGN if saving < 0 else end)
print("deadline", os.environ.get("FASTCPT_DEADLINE"), flush=True)
time.sleep(600)
"""


class Rented:
    """A host with a home of its own, which notes when it is given back instead of going away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.home = folder, folder / "root", folder / "home"
        self.home.mkdir()
        self.facts = local_sshd.start_server(folder / "sshd", {"HOME": str(self.home)})
        self.remote = remote_of(dict(self.facts))
        (folder / "launcher.py").write_text(LAUNCHER)
        (folder / "rank.py").write_text(RANK)

    def watch(self, **rent: Any) -> None:
        note = f"date +%s.%N >> {self.folder}/given-back"
        rent = {"deadline_unix": None, "orphan_hours": None, **rent}
        jobs.watch(self.remote, str(self.root), {**rent, "release_command": ["sh", "-c", note]})

    def train(self, saving: float) -> None:
        """Start a training that takes so many seconds to save when it is told to end; < 0: ignores it."""
        words = [sys.executable, *(str(self.folder / name) for name in ("launcher.py", "rank.py"))]
        job = jobs.Job("train", [[*words, str(self.folder), str(saving)]])
        jobs.submit(self.remote, str(self.root), job)
        wait(self.remote, self.root, "train", "running")
        until = time.monotonic() + 30
        while "deadline" not in log_of(poll(self.remote, self.root, "train")):
            assert time.monotonic() < until
            time.sleep(0.1)

    def given_back(self, seconds: float) -> float:
        """When it was given back, within so many seconds: s since the epoch."""
        file = self.folder / "given-back"
        until = time.monotonic() + seconds
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < until, f"not given back within {seconds} s"
            time.sleep(0.05)
        return float(file.read_text().split()[0])

    @property
    def kept(self) -> bool:
        return not (self.folder / "given-back").exists()

    @property
    def saved(self) -> float:
        return float((self.folder / "saved").read_text())

    def watcher(self) -> int | None:
        """The watcher's pid."""
        for pid in processes.processes():
            its = processes.process_environment(pid)
            if its.get("HOME") == str(self.home):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"watch" in words:
                    return pid
        return None

    def end(self) -> None:
        for pid in list(processes.processes()):
            if processes.process_environment(pid).get("HOME") == str(self.home):
                processes.signal_quietly(os.kill, pid, signal.SIGKILL)
        os.killpg(self.facts["pid"], signal.SIGKILL)
        os.waitpid(self.facts["pid"], 0)


@pytest.fixture
def rented(tmp_path: Path) -> Iterator[Rented]:
    host = Rented(tmp_path)
    yield host
    host.end()


class Asking:
    """Somebody who asks for a host every half second, as a triggerer does."""

    def __init__(self, remote: Remote, root: Path) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._ask, args=(remote, root))

    def _ask(self, remote: Remote, root: Path) -> None:
        while not self.over.wait(0.5):
            ask(remote, "poll", root=str(root), jobs=[])

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def eventually(holds: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)


def test_a_host_that_nobody_asks_for_is_given_back_when_its_training_has_saved(
    rented: Rented,
) -> None:
    rented.watch(orphan_hours=5 / 3600)
    rented.train(saving=2)
    with Asking(rented.remote, rented.root):
        time.sleep(7)
    assert rented.kept
    quiet = time.time()
    given_back = rented.given_back(25)
    # a launcher that was told to end would have killed it
    assert quiet < rented.saved < given_back


def test_a_host_without_a_job_is_given_back_too(rented: Rented) -> None:
    began = time.time()
    rented.watch(orphan_hours=3 / 3600)
    assert rented.given_back(20) - began > 3


def test_whoever_asks_while_the_training_saves_keeps_the_host(rented: Rented) -> None:
    rented.watch(orphan_hours=5 / 3600)
    rented.train(saving=5)
    eventually((rented.folder / "ending").exists, 20)
    with Asking(rented.remote, rented.root):
        ended = wait(rented.remote, rented.root, "train", "failed")
        time.sleep(1)
        assert rented.kept
    # tried again, it goes on from what it has saved
    with pytest.raises(jobs.JobFailed, match="ended with 143"):
        jobs.outcome(rented.remote, "train", ended["status"], [])


def test_at_the_deadline_the_training_has_saved_and_the_host_is_given_back(rented: Rented) -> None:
    far = time.time() + 600
    rented.watch(deadline_unix=far, reserve_seconds=100)
    rented.train(saving=1)
    # by which the training plans its decay
    log = log_of(poll(rented.remote, rented.root, "train"))
    assert far - 100 <= float(log.split()[1]) < far - 90
    deadline = time.time() + 14
    rented.watch(deadline_unix=deadline, reserve_seconds=8)
    with Asking(rented.remote, rented.root):
        wait(rented.remote, rented.root, "train", "failed")
        assert deadline - 8 < rented.saved < deadline
        # what is reserved is for bringing the checkpoint home: no new job
        with pytest.raises(ClusterError, match=r"no time is left for job b: the money for this "):
            jobs.submit(rented.remote, str(rented.root), jobs.Job("b", [["true"]]))
        assert rented.kept
        assert deadline <= rented.given_back(10) < deadline + 2


@pytest.mark.faults
def test_what_does_not_end_is_killed_at_the_deadline(rented: Rented) -> None:
    rented.train(saving=-1)
    deadline = time.time() + 6
    rented.watch(deadline_unix=deadline, reserve_seconds=1)
    assert deadline <= rented.given_back(10) < deadline + 2
    assert not processes.processes_of(str(rented.root / "jobs" / "train"))


def test_a_later_deadline_is_the_one_that_counts(rented: Rented) -> None:
    first = time.time() + 6
    rented.watch(deadline_unix=first)
    rented.watch(deadline_unix=first + 600)
    time.sleep(first + 1.5 - time.time())
    assert rented.kept
    rented.watch()
    eventually(lambda: rented.watcher() is None, 5)


def test_a_killed_watcher_is_started_again_by_whoever_asks(rented: Rented) -> None:
    rented.watch(orphan_hours=1)
    before = rented.watcher()
    assert before is not None
    os.kill(before, signal.SIGKILL)
    eventually(lambda: rented.watcher() is None, 5)
    ask(rented.remote, "read_files", paths={})
    eventually(rented.watcher, 5)
    # and there is one of them
    after = rented.watcher()
    ask(rented.remote, "read_files", paths={})
    assert rented.watcher() == after


@pytest.mark.faults
def test_a_killed_watcher_is_started_again_by_a_job_that_runs(rented: Rented) -> None:
    rented.watch(orphan_hours=12 / 3600)
    rented.train(saving=0)
    os.kill(rented.watcher() or 0, signal.SIGKILL)
    eventually(rented.watcher, 10)
    # it is no process of the job
    assert rented.given_back(30) > rented.saved


def test_a_host_that_is_not_rented_has_nothing_of_it(rented: Rented) -> None:
    ask(rented.remote, "check", root=str(rented.root))
    assert not list(rented.home.glob(".fast_cpt/rent*"))


def test_a_stop_lets_a_training_save(rented: Rented) -> None:
    program = f"trap 'sleep 2; touch {rented.folder}/saved; exit 143' TERM; sleep 600 & wait"
    jobs.submit(rented.remote, str(rented.root), jobs.Job("s", [["bash", "-c", program]]))
    wait(rented.remote, rented.root, "s", "running")
    began = time.monotonic()
    jobs.stop(rented.remote, str(rented.root), "s")
    assert (rented.folder / "saved").exists()
    assert time.monotonic() - began < 10


def test_both_sides_name_the_deadline_alike() -> None:
    assert commands.DEADLINE == processes.DEADLINE
