"""Damage to a job's files or a changed clock decides nothing: its processes do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from cluster.test_jobs import log_of, poll, processes, wait
from fastcpt.cluster import jobs
from fastcpt.cluster.agent import program
from fastcpt.cluster.remote import Remote, ask
from steps.training import status_seconds

# Python's wall clock, as a host's whose clock is set: seconds in a file are added to it.
CLOCK = """
import os, time
real = time.time
def stepped():
    try:
        with open(os.path.join(os.path.dirname(__file__), "step")) as file:
            return real() + float(file.read())
    except (OSError, ValueError):
        return real()
time.time = stepped
"""

pytestmark = [pytest.mark.slow, pytest.mark.linux("a host's processes are found in /proc")]


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


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH; what is written into its file ``step`` is the clock's error."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK)
    return folder


def test_a_step_of_a_second_hosts_clock_ends_no_training(clock: Path, tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    beat = f"import time\nwhile True:\n open({str(beats)!r}, 'a').write('.'); time.sleep(0.2)"
    settings = {
        "command": [sys.executable, "-c", beat],
        "cwd": str(tmp_path),
        "environment": {},
    }
    file = tmp_path / "supervisor.py"
    file.write_text(program.supervisor())
    node = subprocess.Popen(
        [sys.executable, str(file), "node"],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(clock)},
    )
    assert node.stdin is not None
    node.stdin.write(json.dumps(settings).encode() + b"\n")
    node.stdin.flush()
    until = time.monotonic() + 30
    while not beats.exists() and time.monotonic() < until:
        time.sleep(0.1)
    for step in ("90", "-3600", "86400"):
        (clock / "step").write_text(step)
        time.sleep(2)  # it looks five times a second
        node.stdin.write(b"alive\n")
        node.stdin.flush()
        assert node.poll() is None, f"ended by a step of {step} s"
    node.stdin.close()
    assert node.wait(30) == 143


def test_a_step_of_the_clock_changes_no_seconds_of_a_job(clock: Path, tmp_path: Path) -> None:
    facts = local_sshd.start_server(tmp_path / "sshd", {"PYTHONPATH": str(clock)})
    to = Remote(
        facts["host"], facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
    )
    try:
        began = time.monotonic()
        submit(to, tmp_path, "j", "sleep 4")
        wait(to, tmp_path, "j", "running")
        (clock / "step").write_text("-3600")
        wait(to, tmp_path, "j", "succeeded")
        took = time.monotonic() - began
    finally:
        os.killpg(facts["pid"], signal.SIGTERM)
        os.waitpid(facts["pid"], 0)
    seconds = status_seconds({"status": (tmp_path / "jobs" / "j" / "status.json").read_text()})
    assert seconds is not None
    assert 4 <= seconds <= took


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("seen", '"3"'),
        ("seen", "-5"),
        ("status.json", "[]"),
        ("status.json", '{"state": 3}'),
        ("spec.json", ""),
    ],
)
def test_a_damaged_file_spoils_no_other_jobs_poll(
    remote: Remote, root: Path, file: str, damage: str
) -> None:
    for name in ("k", "l"):
        submit(remote, root, name, f"echo {name}", alone="no")
        wait(remote, root, name, "succeeded")
    (root / "jobs" / "k" / file).write_text(damage)
    asked = [{"name": "k", "seen": None}, {"name": "l", "seen": None}]
    damaged, whole = ask(remote, "poll", root=str(root), jobs=asked)["jobs"]
    assert (log_of(whole), whole["status"]["state"]) == ("l\n", "succeeded")
    assert log_of(damaged) == "k\n"
    # and the job is started again as if it had never been there
    assert submit(remote, root, "k", "echo k", alone="no") == "started"


def test_a_damaged_status_of_a_running_job_is_said(remote: Remote, root: Path) -> None:
    submit(remote, root, "m", "sleep 65437")
    wait(remote, root, "m", "running")
    (root / "jobs" / "m" / "status.json").write_text("{")
    status = poll(remote, root, "m")["status"]
    assert (status["state"], status["why"]) == ("running", "its status.json is damaged")
    jobs.stop(remote, str(root), "m")
    assert not processes("65437")


def test_a_job_that_waits_leaves_no_secret_when_it_is_ended_there(
    remote: Remote, root: Path
) -> None:
    submit(remote, root, "n", "sleep 65438")
    wait(remote, root, "n", "running")
    submit(remote, root, "o", "true", secrets={"HF_TOKEN": "hf_secret"})
    waiting = wait(remote, root, "o", "waiting")
    assert (root / "jobs" / "o" / "secrets.json").exists()
    os.kill(waiting["status"]["supervisor"], signal.SIGTERM)
    wait(remote, root, "o", "lost")
    assert not (root / "jobs" / "o" / "secrets.json").exists()


def test_a_supervisor_that_stands_still_is_said_and_ended(remote: Remote, root: Path) -> None:
    submit(remote, root, "p", "sleep 65439")
    supervisor = wait(remote, root, "p", "running")["status"]["supervisor"]
    os.kill(supervisor, signal.SIGSTOP)
    status = poll(remote, root, "p")["status"]
    assert status["state"] == "running"
    assert status["why"].endswith(f"go on with: kill -CONT {supervisor}")
    began = time.monotonic()
    jobs.stop(remote, str(root), "p")
    assert time.monotonic() - began < 20
    assert not processes("65439")
    assert poll(remote, root, "p")["status"]["state"] == "cancelled"


def test_a_stop_tells_what_it_did(remote: Remote, root: Path) -> None:
    submit(remote, root, "q", "sleep 65440", alone="no")
    wait(remote, root, "q", "running")
    submit(remote, root, "r", "true", alone="no")
    wait(remote, root, "r", "succeeded")

    def stop(name: str, owner: str | None) -> dict[str, Any]:
        return ask(remote, "stop", root=str(root), name=name, owner=owner)

    assert stop("q", "somebody else") == {"ended": True, "left_alone": True}
    assert poll(remote, root, "q")["status"]["state"] == "running"
    assert stop("q", None) == {"ended": True, "was": "running"}
    assert stop("r", None) == {"ended": True, "was": "succeeded"}
    assert stop("none", None) == {"ended": True, "was": "absent"}
    # what had ended before has its own end
    assert poll(remote, root, "r")["status"]["state"] == "succeeded"
