"""A problem with a host or its connection is reported at once, with what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from cluster.servers import force
from fastcpt.cluster import jobs, transfer
from fastcpt.cluster.check import check_cluster
from fastcpt.cluster.environment import check_python, pins
from fastcpt.cluster.remote import (
    ClusterError,
    ConnectionLost,
    LoginRefused,
    Remote,
    ask,
    ask_async,
    ask_through,
)
from fastcpt.recipe_sections import Cluster

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
    facts = local_sshd.start_server(tmp_path / "sshd")
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


def test_a_host_without_python_is_refused(start: Callable[..., Remote], tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("bash", "sh", "rsync"):
        (bare / program).symlink_to(Path(shutil.which(program) or "").resolve())
    host = start()
    only = f'exec {shutil.which("env")} -i PATH={bare} {bare}/sh -c "$SSH_ORIGINAL_COMMAND"'
    force(host, only)
    with pytest.raises(ClusterError, match="no python3: install Python"):
        check_cluster(host, cluster(tmp_path))


@pytest.mark.parametrize("words", ["Welcome to the farm", "$(cat /etc/hostname)"])
def test_a_shell_that_prints_is_refused_before_anything_is_made(
    start: Callable[..., Remote], tmp_path: Path, words: str
) -> None:
    host = start()
    force(host, f'echo "{words}"; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    with pytest.raises(ClusterError, match="prints text where no person reads"):
        check_cluster(host, cluster(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_written_is_refused(remote: Remote) -> None:
    # nobody can make a file there, root included
    with pytest.raises(
        ClusterError, match=r"nothing can be written to /sys/kernel: .*cluster\.root"
    ):
        check_cluster(remote, cluster(Path("/sys/kernel")))


def test_a_home_that_cannot_be_written_is_refused_where_gpus_are_shared_by_it(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host = start()
    force(host, 'HOME=/sys/kernel exec sh -c "$SSH_ORIGINAL_COMMAND"')
    check_cluster(host, cluster(tmp_path))
    with pytest.raises(ClusterError, match=r"nothing can be written to /sys/kernel/\.fast_cpt: "):
        check_cluster(host, cluster(tmp_path, cpu_only=False))


@pytest.mark.parametrize("shell", ["/usr/sbin/nologin", 'exec rbash -c "$SSH_ORIGINAL_COMMAND"'])
def test_a_login_without_a_plain_shell_is_no_lost_connection(
    start: Callable[..., Remote], tmp_path: Path, shell: str
) -> None:
    host = start()
    force(host, shell)
    with pytest.raises(LoginRefused, match="does not run our program"):
        ask(host, "check", root=str(tmp_path))


def test_a_program_that_is_killed_there_is_a_lost_connection(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host = start()
    force(host, "sh -c 'kill -9 $$'; exit 137")
    with pytest.raises(ConnectionLost, match="was killed there: it ended with 137"):
        ask(host, "check", root=str(tmp_path))


def test_what_fails_there_is_said_and_not_asked_again(remote: Remote) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"'submit' failed there: .*'/sys/kernel/jobs'"):
        jobs.submit(remote, "/sys/kernel", jobs.Job("a", [["true"]]))
    # a mistake of the program itself has its place in it
    with pytest.raises(
        ClusterError, match=r"'verify' failed there: Traceback[^$]*KeyError: 'file'"
    ):
        ask_through(remote, "verify", folder="/tmp", files=[{}])
    assert time.monotonic() - began < 30


def test_a_shell_that_prints_ends_a_transfer_at_once(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host = start()
    force(host, 'echo Welcome; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    began = time.monotonic()
    with pytest.raises(ClusterError, match="start-up files there print text"):
        rsync_to(host, tmp_path)
    assert time.monotonic() - began < 30


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
        pytest.param(
            "other",
            r"belongs to another user \(number 12345\)",
            marks=pytest.mark.linux("root gives a folder away"),
        ),
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
