"""What is wrong with a host or with the way to it is said at once, and says what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from fastcpt.cluster import transfer
from fastcpt.cluster.check import check_cluster
from fastcpt.cluster.environment import check_python, pins
from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask, ask_async
from fastcpt.recipe import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]


def cluster(root: Path, **values: Any) -> Cluster:
    settings = {"root": str(root), "gpus": 1, "cpu_only": True, "min_free_gb": 0.0}
    return Cluster(**{**settings, **values})


def test_a_host_that_has_all_tells_what_it_has(remote: Remote, tmp_path: Path) -> None:
    facts = check_cluster(remote, cluster(tmp_path / "root"))
    assert facts["rsync"]
    assert facts["cores"] >= 1
    assert facts["disk_free_gb"] > 0
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


def test_all_that_is_missing_is_named_at_once(remote: Remote, tmp_path: Path) -> None:
    wanted = cluster(tmp_path, gpus=512, cpu_only=False, min_free_gb=10.0**9)
    with pytest.raises(ClusterError) as missing:
        check_cluster(remote, wanted)
    message = str(missing.value)
    assert "the recipe wants 512 a host: lower cluster.gpus" in message
    assert "the recipe needs 1e+09 (cluster.min_free_gb)" in message


def test_more_ranks_than_cores_are_refused(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="CPU cores, the recipe wants 4096 ranks"):
        check_cluster(remote, cluster(tmp_path, gpus=4096))


def test_a_host_without_rsync_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3").symlink_to(Path(sys.executable).resolve())
    for program in ("bash", "sh"):
        (bare / program).symlink_to(Path(shutil.which(program) or "").resolve())
    facts = local_sshd.start(tmp_path / "sshd")
    # the login's own start-up files may put more on the path: this comes after them
    keys = tmp_path / "sshd" / "authorized_keys"
    only = f'exec {shutil.which("env")} -i PATH={bare} {bare}/sh -c \\"$SSH_ORIGINAL_COMMAND\\"'
    keys.write_text(f'command="{only}" {keys.read_text()}')
    try:
        remote = Remote(
            "127.0.0.1", facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
        )
        with pytest.raises(ClusterError, match="no rsync there: install the package rsync"):
            check_cluster(remote, cluster(tmp_path))
    finally:
        subprocess.run(["kill", str(facts["pid"])], check=True)


def ask_now(to: Remote, folder: Path) -> None:
    ask(to, "check", root=str(folder))


def ask_in_the_triggerer(to: Remote, folder: Path) -> None:
    asyncio.run(ask_async(to, "check", root=str(folder)))


def rsync_to(to: Remote, folder: Path) -> None:
    (folder / "file").write_text("content")
    transfer._send(to, folder, str(folder), [["file"]], {"file": 7})


ways = pytest.mark.parametrize("way", [ask_now, ask_in_the_triggerer, rsync_to])


@ways
def test_a_wrong_host_key_is_refused(
    remote: Remote, tmp_path: Path, way: Callable[[Remote, Path], None]
) -> None:
    # with the right one it works, and leaves a shared connection open that is not to be used
    way(remote, tmp_path)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True
    )
    kind, key = (tmp_path / "other.pub").read_text().split()[:2]
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{remote.port} {kind} {key}\n")
    wrong = replace(remote, known_hosts=str(tmp_path / "known_hosts"))
    with pytest.raises(ClusterError, match=r"the host key of 127.0.0.1 port .* is not the one in"):
        way(wrong, tmp_path)


@ways
def test_an_unknown_host_key_is_refused(
    remote: Remote, tmp_path: Path, way: Callable[[Remote, Path], None]
) -> None:
    (tmp_path / "known_hosts").write_text("")
    with pytest.raises(ClusterError, match="the host key of"):
        way(replace(remote, known_hosts=str(tmp_path / "known_hosts")), tmp_path)


def test_a_refused_key_is_named(remote: Remote, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with pytest.raises(ClusterError, match=f"refused the login of .* with {key}"):
        ask(replace(remote, key_file=str(key)), "check", root=str(tmp_path))


def test_nobody_listening_may_heal(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match=r"no connection to 127.0.0.1 port 1: .*refused"):
        ask(replace(remote, port=1), "check", root=str(tmp_path))


def test_a_key_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ClusterError, match="key_file '/nowhere/key' is no file"):
        Remote("h", key_file="/nowhere/key")


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where shared connections are kept, in a temporary folder of the test's own."""
    # not pytest's: its names are too long for sockets
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder) / f"fast_cpt-{os.getuid()}"


@pytest.mark.parametrize("way", [ask_now, ask_in_the_triggerer])
@pytest.mark.parametrize(
    ("in_the_way", "said"),
    [
        ("link", "is a symbolic link"),
        ("file", "is no folder"),
        ("open", r"is open to other users \(mode 0755\)"),
        ("other", r"belongs to another user \(number 12345\)"),
    ],
)
def test_a_folder_of_sockets_that_others_could_write_to_is_refused(
    remote: Remote, tmp_path: Path, sockets: Path, way: Any, in_the_way: str, said: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if in_the_way == "link":
        sockets.symlink_to(elsewhere)
    elif in_the_way == "file":
        sockets.write_text("")
    else:
        sockets.mkdir()
        sockets.chmod(0o755 if in_the_way == "open" else 0o700)
    if in_the_way == "other":
        if os.getuid() != 0:
            pytest.fail("giving a folder to another user takes root: run this test as root")
        os.chown(sockets, 12345, 12345)
    with pytest.raises(ClusterError, match=f"'{sockets}', where ssh .*, {said}: remove it"):
        way(remote, tmp_path)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["long" * 25, "with a % sign"])
def test_a_temporary_folder_whose_name_ssh_does_not_take_is_no_obstacle(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    ask_now(remote, tmp_path)
    # and connections are shared there as well
    path = next(word for word in remote.ssh() if word.startswith("ControlPath="))
    assert stat.S_ISSOCK(Path(path.partition("=")[2]).stat().st_mode)


@pytest.mark.parametrize("host", ["-oProxyCommand=touch /tmp/x", "a\nb", ""])
def test_a_host_is_a_name_and_never_an_option(host: str) -> None:
    with pytest.raises(ClusterError, match="correct it"):
        Remote(host)


def test_packages_that_are_not_the_pinned_ones_are_named(remote: Remote) -> None:
    settings = Cluster(python=str(REPOSITORY / ".env/airflow/bin/python"))
    with pytest.raises(ClusterError, match=r"- torch missing, wanted"):
        check_python(remote, settings, REPOSITORY)
    settings = Cluster(python=str(REPOSITORY / ".env/cluster/bin/python"))
    assert check_python(remote, settings, REPOSITORY).endswith(".env/cluster/bin/python")


def test_an_interpreter_that_is_not_there_is_named(remote: Remote) -> None:
    with pytest.raises(ClusterError, match="/nowhere/python: No such file"):
        check_python(remote, Cluster(python="/nowhere/python"), REPOSITORY)


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-cluster.txt", "requirements-cluster-gpu.txt"):
        assert all(version for version in pins(REPOSITORY / name).values())
