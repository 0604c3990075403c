"""Differences on a Mac: a folder with blanks in its path, Apple's rsync, no /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import local_sshd
import pytest

from cluster.servers import remote_of
from cluster.test_jobs import wait
from fastcpt.cluster import jobs
from fastcpt.cluster.check import check_host
from fastcpt.cluster.remote import ClusterError, Remote, ask
from fastcpt.cluster.transfer import fetch, files_of, send


@pytest.fixture
def without_proc(tmp_path: Path) -> Iterator[Remote]:
    """A host whose processes are nowhere to be read."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    facts = local_sshd.start_server(tmp_path / "sshd", inside=hidden)
    yield remote_of(facts)
    os.killpg(facts["pid"], signal.SIGTERM)
    os.waitpid(facts["pid"], 0)


def test_keys_in_a_folder_with_blanks_carry_commands_and_files(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    remote = start("a folder with blanks")
    assert check_host(remote, str(tmp_path))["root"] == str(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("content")
    there = str(tmp_path / "over there")
    assert send(remote, tmp_path / "here", there, files_of(tmp_path / "here"))["sent"] == 1
    assert fetch(remote, there, tmp_path / "back")["fetched"] == 2


@pytest.mark.linux("unshare and mount hide /proc")
def test_a_host_without_proc_takes_jobs(without_proc: Remote, tmp_path: Path) -> None:
    assert check_host(without_proc, str(tmp_path))["boot_id"] == ""
    jobs.submit(without_proc, str(tmp_path), jobs.Job("ends", [["echo", "done"]]))
    assert wait(without_proc, tmp_path, "ends", "succeeded")["status"]["exit_code"] == 0


@pytest.mark.linux("unshare and mount hide /proc")
def test_a_job_of_a_host_without_proc_ends_when_it_is_told_to(
    without_proc: Remote, tmp_path: Path
) -> None:
    mark = tmp_path / "alive"
    program = f"while sleep 0.1; do touch {mark}; done"
    jobs.submit(without_proc, str(tmp_path), jobs.Job("goes on", [["bash", "-c", program]]))
    wait(without_proc, tmp_path, "goes on", "running")
    assert ask(without_proc, "stop", root=str(tmp_path), name="goes on")["ended"]
    wait(without_proc, tmp_path, "goes on", "cancelled")
    mark.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("echo 'openrsync: protocol version 29'", "Apple's openrsync: brew install rsync"),
        (None, "this machine has no rsync: install the package rsync"),
    ],
)
def test_this_machine_s_rsync_is_looked_at_before_the_host_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    if program:
        (tmp_path / "rsync").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=message):
        check_host(Remote("nowhere.invalid"), "/nowhere")
