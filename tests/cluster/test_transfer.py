"""The files that arrive are those sent: digests decide, and existing files are not sent again."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import local_sshd
import pytest

from fastcpt import progress
from fastcpt.cluster.remote import ClusterError, Remote
from fastcpt.cluster.transfer import fetch, files_of, send, send_base_model
from fastcpt.gguf import base_folder
from gguf_file import shape_facts, tokenizer_facts, write_gguf


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "here with space"
    (folder / "validation").mkdir(parents=True)
    for number in range(5):
        (folder / f"shard_{number:02}.parquet").write_bytes(os.urandom(20_000 + number))
    (folder / "validation" / "v.parquet").write_bytes(b"v" * 10)
    return folder


def test_a_folder_arrives_whole_and_is_marked_ready_last(
    remote: Remote, shards: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    answer = send(remote, shards, str(there), files_of(shards))
    assert answer["sent"] == 6
    assert not answer["reused"]
    assert {path.name: path.read_bytes() for path in shards.rglob("*.parquet")} == {
        path.name: path.read_bytes() for path in there.rglob("*.parquet")
    }
    assert (there / "READY").is_file()
    assert there.stat().st_mode & 0o077 == 0


def test_progress_counts_bytes_and_tells_rate_and_time_left(
    remote: Remote,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "large").write_bytes(os.urandom(20_000_000))
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "rsync").write_text(f'#!/bin/sh\nexec {shutil.which("rsync")} --bwlimit=4000 "$@"\n')
    (slow / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:{os.environ['PATH']}")
    monkeypatch.setattr(progress, "EVERY_S", 1.0)
    with caplog.at_level("INFO"):
        send(remote, here, str(tmp_path / "there"), files_of(here))
    found = [
        re.fullmatch(r"transfer: ([\d.]+) of 20 MB, ([\d.]+) MB/s, (\d+) s left", m)
        for m in caplog.messages
    ]
    told = [tuple(map(float, one.groups())) for one in found if one]
    # one file, told about while it is under way
    assert len(told) >= 2
    assert told == sorted(told, key=lambda one: one[0])
    done, rate, left = told[-1]
    assert 5 < done < 20
    assert 1 < rate < 6
    assert left == pytest.approx((20 - done) / rate, abs=1)


def test_what_is_there_is_not_sent_again(remote: Remote, shards: Path, tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    send(remote, shards, there, files_of(shards))
    again = send(remote, shards, there, files_of(shards))
    assert (again["sent"], again["reused"]) == (0, True)


def test_a_shard_altered_there_is_sent_again_though_size_and_time_are_the_same(
    remote: Remote, shards: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    send(remote, shards, str(there), files_of(shards))
    shard = there / "shard_03.parquet"
    before = shard.stat()
    shard.write_bytes(b"x" * before.st_size)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert send(remote, shards, str(there), files_of(shards))["sent"] == 1
    assert shard.read_bytes() == (shards / "shard_03.parquet").read_bytes()


def test_a_file_that_changed_here_after_its_digest_was_taken_is_refused(
    remote: Remote, shards: Path, tmp_path: Path
) -> None:
    files = files_of(shards)
    (shards / "shard_00.parquet").write_bytes(b"something else")
    with pytest.raises(ClusterError, match=r"shard_00\.parquet differ there"):
        send(remote, shards, str(tmp_path / "there"), files)
    assert not (tmp_path / "there" / "READY").exists()


def test_more_than_the_disk_holds_is_refused_before_anything_is_sent(
    remote: Remote, tmp_path: Path
) -> None:
    files = [{"file": "huge", "bytes": 10**18, "sha256": "0"}]
    with pytest.raises(ClusterError, match="GB to send"):
        send(remote, tmp_path, str(tmp_path / "there"), files)


def test_a_folder_comes_back(remote: Remote, shards: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert fetch(remote, str(shards), back)["fetched"] == 6
    assert files_of(back) == files_of(shards)
    assert fetch(remote, str(shards), back)["reused"]


def test_a_folder_that_is_not_there_cannot_come_back(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no folder"):
        fetch(remote, str(tmp_path / "none"), tmp_path / "back")


# Apple's rsync, and GNU's before 3.2.4, leave it to the remote shell to split what they are given
rsyncs = pytest.mark.parametrize("old", [False, True], ids=["gnu", "old arguments"])


@rsyncs
@pytest.mark.parametrize("name", ["two words", "GHOST/$(id)", 'it\'s "quoted"; *', "-dash"])
def test_a_folder_there_may_have_any_name(
    remote: Remote,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    old: bool,
) -> None:
    if old:
        monkeypatch.setenv("RSYNC_OLD_ARGS", "1")
    there = tmp_path / name
    assert send(remote, shards, str(there), files_of(shards))["sent"] == 6
    assert files_of(there, [file["file"] for file in files_of(shards)]) == files_of(shards)
    assert fetch(remote, str(there), tmp_path / "back")["fetched"] == 7
    assert files_of(tmp_path / "back", [file["file"] for file in files_of(shards)]) == files_of(
        shards
    )


def test_a_host_that_is_part_of_the_path_leaves_the_path_alone(
    remote: Remote, shards: Path, tmp_path: Path
) -> None:
    there = tmp_path / "HOST" / "GHOST"
    here = tmp_path / "HOST here"
    shutil.copytree(shards, here)
    send(remote, here, str(there), files_of(here))
    assert files_of(there / "validation") == files_of(shards / "validation")


@rsyncs
def test_files_whose_names_begin_like_comments_arrive(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    if old:
        monkeypatch.setenv("RSYNC_OLD_ARGS", "1")
    here = tmp_path / "here"
    here.mkdir()
    for name in ("#x", ";x", "#", " led by a blank", "two\nlines", "x"):
        (here / name).write_text(name)
    assert send(remote, here, str(tmp_path / "there"), files_of(here))["sent"] == 6
    assert fetch(remote, str(tmp_path / "there"), tmp_path / "back")["fetched"] == 7
    assert (tmp_path / "back" / "#x").read_text() == "#x"


def test_an_ipv6_host_is_sent_to_and_fetched_from(shards: Path, tmp_path: Path) -> None:
    facts = local_sshd.start_server(tmp_path / "sshd", address="::1")
    try:
        host = Remote("::1", facts["user"], facts["port"], facts["key_file"], facts["known_hosts"])
        there = str(tmp_path / "there")
        assert send(host, shards, there, files_of(shards))["sent"] == 6
        assert fetch(host, there, tmp_path / "back")["fetched"] == 7
    finally:
        os.killpg(facts["pid"], signal.SIGTERM)


def test_a_model_of_a_gguf_file_goes_to_the_cluster_and_no_other_does(
    remote: Remote, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", {**shape_facts(), **tokenizer_facts()})
    root = tmp_path / "root"
    here = Path(base_folder(str(file), tmp_path / "home"))
    there = send_base_model(remote, str(here), str(root))
    assert there == str(root / "base_models" / here.name)
    for made in here.iterdir():
        assert (Path(there) / made.name).read_bytes() == made.read_bytes()
    elsewhere = tmp_path / "folder"  # one on the cluster, as far as anyone knows here
    elsewhere.mkdir()
    for name in ("meta-llama/Llama-3.1-8B", str(elsewhere), None):
        assert send_base_model(remote, name, str(root)) is None
