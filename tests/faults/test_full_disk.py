"""The host's disk is full: jobs are still watched and ended, and report their result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import Remote, ask
from faults.machines import Training, Watch, alive, eventually, remote_of

pytestmark = [pytest.mark.faults, pytest.mark.linux("network namespaces, mounts, Slurm, /proc")]


@pytest.fixture
def root(disk_of: Callable[[str], Path]) -> Path:
    """A cluster.root on a disk of 2 MB."""
    return disk_of("2m")


def fill(root: Path) -> None:
    with contextlib.suppress(OSError), (root / "filler").open("ab", buffering=0) as filler:
        while True:
            filler.write(b"x" * 512)
    with pytest.raises(OSError, match="No space left"):
        (root / "more").write_bytes(b"x" * 4096)


def status(to: Remote, root: Path, name: str) -> dict[str, Any]:
    asked = [{"name": name, "seen": 0}]
    answer: dict[str, Any] = ask(to, "poll", root=str(root), jobs=asked)["jobs"][0]["status"]
    return answer


def test_a_job_is_ended(server: dict[str, Any], root: Path, training: Training) -> None:
    to = remote_of(server)
    jobs.submit(to, str(root), jobs.Job("a", [training.command(1000, 0.2)]), "one")
    training.wait_for_step(3)
    fill(root)
    jobs.stop(to, str(root), "a", "one")
    (pid,) = training.numbers("pids")
    assert not alive(pid)
    assert status(to, root, "a")["state"] == "cancelled"


def test_a_job_is_watched_to_its_end(
    server: dict[str, Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    full = tmp_path / "full"
    script = (
        f"echo one; until test -e {full}; do sleep 0.1; done; "
        "echo two || true; sleep 4; rm filler; echo three; exit 3"
    )
    job = jobs.Job("b", [["bash", "-c", script]], folder=str(root))
    jobs.submit(to, str(root), job, "one")
    watch = Watch(monkeypatch, to, root, "b")
    eventually(lambda: "one" in watch.lines, 30)
    fill(root)
    full.touch()
    event = watch.wait(60)
    assert (event["status"]["state"], event["status"]["exit_code"]) == ("failed", 3)
    assert watch.lines[0] == "one"
    assert watch.lines[-1] == "three"
    assert watch.warnings == []


def test_a_job_that_fills_the_disk_and_fails_says_so(server: dict[str, Any], root: Path) -> None:
    to = remote_of(server)
    fills = "echo begun; head -c 9000000 /dev/zero > filler; exit 4"
    jobs.submit(to, str(root), jobs.Job("c", [["bash", "-c", fills]], folder=str(root)), "one")
    eventually(lambda: status(to, root, "c")["state"] not in jobs.ACTIVE, 30)
    found = status(to, root, "c")
    assert (found["state"], found["exit_code"]) == ("failed", 4)


def test_a_job_that_waits_for_the_gpus_outlives_it(
    server: dict[str, Any], root: Path, training: Training, tmp_path: Path
) -> None:
    to = remote_of(server)
    done = tmp_path / "done"
    jobs.submit(to, str(root), jobs.Job("d", [training.command(1000, 0.2)]), "one")
    training.wait_for_step(1)
    jobs.submit(to, str(root), jobs.Job("e", [["touch", str(done)]]), "one")
    eventually(lambda: status(to, root, "e")["state"] == "waiting", 30)
    fill(root)
    # longer than a supervisor goes without writing
    time.sleep(12)
    assert status(to, root, "e")["state"] == "waiting"
    jobs.stop(to, str(root), "d", "one")
    eventually(done.exists, 30)
    eventually(lambda: status(to, root, "e")["state"] == "succeeded", 30)
