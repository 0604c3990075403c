"""Transfers that are cut short, altered afterwards, or find no room."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import jobs, transfer
from fastcpt.cluster.remote import ClusterError
from faults.machines import Host, descendants, remote_of

pytestmark = pytest.mark.linux("network namespaces, mounts, Slurm, /proc")


def shards(folder: Path, count: int, size: int) -> list[dict[str, Any]]:
    folder.mkdir()
    for number in range(count):
        (folder / f"shard_{number:02}.parquet").write_bytes(os.urandom(size))
    return transfer.files_of(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.mark.slow
def test_a_killed_rsync_goes_on_where_it_stopped(
    server: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards(tmp_path / "from", 8, 60_000_000)
    target = tmp_path / "to"
    # rsync itself notes what it sends of each file
    note, programs = tmp_path / "sent.log", tmp_path / "bin"
    programs.mkdir()
    logs = f"--log-file={note} --log-file-format=sent:%b"
    (programs / "rsync").write_text(
        f'#!/bin/sh\nexec {shutil.which("rsync")} --bwlimit=30000 {logs} "$@"\n'
    )
    (programs / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    killed: list[int] = []

    def kill() -> None:
        # when much has arrived, while the transfer runs
        until = time.monotonic() + 60
        while time.monotonic() < until and not killed:
            for pid in descendants(os.getpid()):
                name = Path(f"/proc/{pid}/comm")
                arrived = sum(path.stat().st_size for path in target.glob(".shard*"))
                if arrived > 100_000_000 and name.exists() and name.read_text().strip() == "rsync":
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    transfer.send(remote_of(server), tmp_path / "from", str(target), files)
    thread.join()
    assert killed
    assert contents(target) == contents(tmp_path / "from")
    assert (target / "READY").exists()
    assert not [path for path in target.rglob("*") if "partial" in path.name]
    # what had arrived of the files under way was not sent again
    sent = [
        int(line.rpartition("sent:")[2])
        for line in note.read_text().splitlines()
        if "sent:" in line
    ]
    assert len(sent) == 8
    assert sum(sent) < 8 * 60_000_000 - 50_000_000


@pytest.mark.slow
def test_a_shard_altered_there_is_sent_again_and_only_that(
    server: dict[str, Any], tmp_path: Path
) -> None:
    files = shards(tmp_path / "from", 4, 1_000_000)
    target = tmp_path / "to"
    transfer.send(remote_of(server), tmp_path / "from", str(target), files)
    altered = target / "shard_02.parquet"
    times = altered.stat()
    with altered.open("r+b") as file:
        file.seek(500_000)
        file.write(b"damage")
    # same size, same times: rsync's quick check sees nothing
    os.utime(altered, ns=(times.st_atime_ns, times.st_mtime_ns))
    kept = (target / "shard_01.parquet").stat().st_ino
    answer = transfer.send(remote_of(server), tmp_path / "from", str(target), files)
    assert answer["sent"] == 1
    assert contents(target) == contents(tmp_path / "from")
    assert (target / "shard_01.parquet").stat().st_ino == kept


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    return disk_of("20m")


@pytest.mark.faults
def test_a_full_disk_is_named_before_anything_is_sent(
    server: dict[str, Any], tmp_path: Path, small_disk: Path
) -> None:
    files = shards(tmp_path / "from", 4, 8_000_000)
    with pytest.raises(ClusterError, match=r"0\.03 GB to send, 0\.02 GB free"):
        transfer.send(remote_of(server), tmp_path / "from", str(small_disk / "to"), files)
    assert not list((small_disk / "to").glob("shard*"))


@pytest.mark.faults
def test_a_disk_that_fills_up_under_way_is_named_and_not_ready(
    server: dict[str, Any], tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards(tmp_path / "from", 4, 8_000_000)
    ask = transfer.ask_through

    def roomy(*arguments: Any, **values: Any) -> dict[str, Any]:
        # somebody else takes the room after the check
        return {**ask(*arguments, **values), "free": 10**12}

    monkeypatch.setattr(transfer, "ask_through", roomy)
    with pytest.raises(ClusterError, match="the disk there is full"):
        transfer.send(remote_of(server), tmp_path / "from", str(small_disk / "to"), files)
    assert not (small_disk / "to" / "READY").exists()
    # room again: the transfer goes on
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    transfer.send(remote_of(server), tmp_path / "from", str(small_disk / "to"), files)
    assert contents(small_disk / "to") == contents(tmp_path / "from")


@pytest.mark.faults
def test_a_job_for_a_full_disk_says_so(server: dict[str, Any], small_disk: Path) -> None:
    with suppress(OSError):
        (small_disk / "filler").write_bytes(b"x" * 30_000_000)
    with pytest.raises(ClusterError, match=r"'submit' failed there: .*The disk there is full"):
        jobs.submit(remote_of(server), str(small_disk), jobs.Job("a", [["true"]]))
    (small_disk / "filler").unlink()
    assert jobs.submit(remote_of(server), str(small_disk), jobs.Job("a", [["true"]])) == "started"


@pytest.mark.faults
def test_a_disk_of_this_machine_that_is_full_is_not_taken_for_the_far_one(
    server: dict[str, Any], tmp_path: Path, small_disk: Path
) -> None:
    shards(tmp_path / "there", 4, 8_000_000)
    with pytest.raises(ClusterError, match="the disk of this machine is full"):
        transfer.fetch(remote_of(server), str(tmp_path / "there"), small_disk / "back")


@pytest.mark.faults
def test_a_cut_network_delays_a_transfer_and_nothing_else(host: Host, tmp_path: Path) -> None:
    files = shards(tmp_path / "from", 4, 100_000_000)
    target = tmp_path / "to"
    answers: list[dict[str, Any]] = []
    sending = threading.Thread(
        target=lambda: answers.append(
            transfer.send(host.remote, tmp_path / "from", str(target), files)
        )
    )
    sending.start()
    until = time.monotonic() + 30
    while not list(target.glob(".shard*")) and time.monotonic() < until:
        time.sleep(0.01)
    host.cut()
    time.sleep(20)
    host.join()
    sending.join(300)
    assert answers
    assert contents(target) == contents(tmp_path / "from")


@pytest.mark.slow
def test_a_model_comes_back_whole(server: dict[str, Any], tmp_path: Path) -> None:
    shards(tmp_path / "there", 3, 1_000_000)
    here = tmp_path / "here"
    transfer.fetch(remote_of(server), str(tmp_path / "there"), here)
    (here / "shard_00.parquet").write_bytes(b"short")
    shutil.copyfile(here / "shard_01.parquet", here / "shard_02.parquet")
    assert transfer.fetch(remote_of(server), str(tmp_path / "there"), here)["fetched"] == 2
    assert contents(here) == contents(tmp_path / "there")
