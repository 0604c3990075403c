"""`make down` and `make run` end the processes started here, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include" / "scripts"))
import local_stack
import process_groups

SCRIPTS = Path(process_groups.__file__).parent
MARK = "0123456789abcdef"


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group of its own and has nothing to do with the stack."""
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def stale(pid: int, version: str) -> dict[str, Any]:
    """The state of a stack that was not ended before a reboot, whose number ``pid`` lives again."""
    if version == "older":
        return {"pids": [pid], "port": 1, "marker": MARK}
    started = {"pid": pid, "started": time.time() - 86_400, "command": "airflow scheduler"}
    return {"processes": [started], "port": 1, "marker": MARK}


def command(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "local_stack.py"), *words],
        env={**os.environ, "FASTCPT_HOME": str(home), "PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("version", ["this", "older"])
def test_down_leaves_a_process_alone_that_got_the_number_of_one_of_ours(
    tmp_path: Path, stranger: subprocess.Popen[bytes], version: str
) -> None:
    (tmp_path / "stack.json").write_text(json.dumps(stale(stranger.pid, version)))
    done = command(tmp_path, "down")
    assert done.returncode == 0, done.stderr
    assert stranger.poll() is None
    assert str(stranger.pid) in done.stdout
    assert not (tmp_path / "stack.json").exists()


@pytest.mark.parametrize("version", ["this", "older"])
def test_run_leaves_it_alone_as_well(
    tmp_path: Path, stranger: subprocess.Popen[bytes], version: str
) -> None:
    (tmp_path / "stack.json").write_text(json.dumps(stale(stranger.pid, version)))
    # the start goes no further than the end of what the file names
    (tmp_path / "sshd").write_text("in the way")
    done = command(tmp_path, "run", "--data", str(tmp_path))
    assert done.returncode != 0
    assert str(stranger.pid) in done.stdout
    assert stranger.poll() is None


def test_a_group_that_was_started_here_is_ended_with_all_in_it() -> None:
    # the second goes on when it is asked to end
    program = "sleep 300 & (trap '' TERM; exec sleep 300) & wait"
    leader = subprocess.Popen(["bash", "-c", program], start_new_session=True)
    entry = process_groups.entry(leader.pid, "sleeps")
    children = _children(leader.pid, 2)
    assert process_groups.end_groups([entry], MARK) == []
    assert leader.poll() is not None
    assert not any(lives(child) for child in children)


def test_what_outlived_its_leader_is_known_by_the_mark_and_by_nothing_else() -> None:
    survivors = {}
    for mark in (MARK, "another"):
        leader = subprocess.Popen(
            ["bash", "-c", "sleep 300 & wait"],
            start_new_session=True,
            env={**os.environ, process_groups.MARK: mark},
        )
        (survivors[mark],) = _children(leader.pid, 1)
        entry = process_groups.entry(leader.pid, "sleeps")
        leader.kill()
        leader.wait()
        left = process_groups.end_groups([entry], MARK)
        assert left == ([] if mark == MARK else [entry])
    assert not lives(survivors[MARK])
    assert lives(survivors["another"])
    survivors["another"].kill()


def _children(pid: int, count: int) -> list[psutil.Process]:
    until = time.monotonic() + 10
    while len(children := psutil.Process(pid).children()) < count:
        assert time.monotonic() < until
        time.sleep(0.05)
    return children


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_what_airflow_forks_on_a_mac_keeps_off_apple_s_frameworks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert local_stack.settings_of_forks("linux") == {}
    settings = local_stack.settings_of_forks("darwin")
    assert settings["OBJC_DISABLE_INITIALIZE_FORK_SAFETY"] == "YES"
    # urllib asks the system where the environment names no proxies at all
    assert not urllib.request.getproxies_environment()
    monkeypatch.setenv("no_proxy", settings["no_proxy"])
    assert urllib.request.getproxies_environment()
    assert urllib.request.proxy_bypass_environment("127.0.0.1")


def test_a_proxy_that_is_set_stays_in_use_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert "no_proxy" not in local_stack.settings_of_forks("darwin")
