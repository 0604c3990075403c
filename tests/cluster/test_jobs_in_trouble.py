"""What became of a job's files, or of the clock, decides nothing: its processes do."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.test_jobs import log_of, poll, processes, wait
from fastcpt.cluster import jobs
from fastcpt.cluster.remote import Remote

pytestmark = pytest.mark.slow


@pytest.fixture
def root(remote: Remote, tmp_path: Path) -> Iterator[Path]:
    """A root whose jobs are ended when the test is."""
    yield tmp_path / "root"
    for folder in (tmp_path / "root" / "jobs").glob("*"):
        jobs.stop(remote, str(tmp_path / "root"), folder.name)


def submit(remote: Remote, root: Path, name: str, script: str, **options: Any) -> str:
    return jobs.submit(remote, str(root), jobs.Job(name, [["bash", "-c", script]], **options))


def gone(pattern: str, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while processes(pattern) and time.monotonic() < until:
        time.sleep(0.1)
    return not processes(pattern)


def test_a_job_whose_folder_was_removed_is_ended_by_a_stop(remote: Remote, root: Path) -> None:
    submit(remote, root, "a", "sleep 65431")
    wait(remote, root, "a", "running")
    shutil.rmtree(root / "jobs" / "a")
    jobs.stop(remote, str(root), "a", "the try that started it")
    assert not processes("65431")
    # and the GPUs are free
    submit(remote, root, "b", "echo there")
    assert log_of(wait(remote, root, "b", "succeeded")) == "there\n"


def test_a_job_whose_folder_was_removed_gives_up_the_gpus_by_itself(
    remote: Remote, root: Path
) -> None:
    submit(remote, root, "c", "sleep 65432")
    wait(remote, root, "c", "running")
    shutil.rmtree(root / "jobs" / "c")
    submit(remote, root, "d", "echo there")
    assert log_of(wait(remote, root, "d", "succeeded", 60)) == "there\n"
    assert not processes("65432")


def test_a_job_whose_folder_was_removed_is_started_again_and_runs_once(
    remote: Remote, root: Path
) -> None:
    submit(remote, root, "e", "sleep 65433")
    wait(remote, root, "e", "running")
    before = processes("65433")
    shutil.rmtree(root / "jobs" / "e")
    assert poll(remote, root, "e")["status"]["state"] == "absent"
    assert submit(remote, root, "e", "sleep 65433") == "started"
    wait(remote, root, "e", "running")
    assert not before & processes("65433")


@pytest.mark.parametrize("way", ["setsid sleep 65434 &", "env -i setsid sleep 3 &"])
def test_what_a_finished_job_left_behind_blocks_no_other(
    remote: Remote, root: Path, way: str
) -> None:
    submit(remote, root, "f", f"{way} exit 0")
    wait(remote, root, "f", "succeeded")
    assert gone("65434", 1)
    began = time.monotonic()
    submit(remote, root, "g", "echo there")
    wait(remote, root, "g", "succeeded")
    assert time.monotonic() - began < 25
    assert submit(remote, root, "f", "exit 0") == "started"


def test_a_removed_lock_lets_no_second_job_in(remote: Remote, root: Path) -> None:
    submit(remote, root, "first", "sleep 65435")
    wait(remote, root, "first", "running")
    (root / "gpus.lock").unlink()
    submit(remote, root, "second", "echo there")
    waiting = wait(remote, root, "second", "waiting")
    assert waiting["status"]["why"].startswith("job first has the GPUs (")
    # and a third, after the file was removed again
    (root / "gpus.lock").unlink()
    submit(remote, root, "third", "echo there")
    wait(remote, root, "third", "waiting")
    assert poll(remote, root, "second")["status"]["state"] == "waiting"
    jobs.stop(remote, str(root), "first")
    wait(remote, root, "second", "succeeded")
    wait(remote, root, "third", "succeeded")


def test_the_gpus_of_a_job_without_supervisor_are_the_next_ones(remote: Remote, root: Path) -> None:
    submit(remote, root, "h", "sleep 65436")
    running = wait(remote, root, "h", "running")
    submit(remote, root, "i", "test -z \"$(pgrep -f '[s]leep 65436')\" && echo alone")
    wait(remote, root, "i", "waiting")
    os.kill(running["status"]["supervisor"], signal.SIGKILL)
    assert log_of(wait(remote, root, "i", "succeeded")) == "alone\n"
    assert poll(remote, root, "h")["status"]["state"] == "lost"
