"""The way to a host: names, ports, jump hosts and proxy commands, with a message for each mistake."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.servers import known_line, only_paramiko, openssh_takes
from fastcpt.cluster.first_contact import first_contact
from fastcpt.cluster.remote import ClusterError, ConnectionLost, LoginRefused, Remote

Start = Callable[..., Remote]


def test_a_host_that_is_not_found_does_not_heal() -> None:
    with pytest.raises(ClusterError, match=r"no host 'nowhere\.invalid' is found"):
        first_contact(Remote("nowhere.invalid"))


def test_a_port_where_nothing_listens_may_heal(start: Start) -> None:
    with pytest.raises(ConnectionLost, match=r"nothing listens at 127.0.0.1 port 1:"):
        first_contact(replace(start(), port=1))


@pytest.mark.usefixtures("impatient")
def test_a_host_that_does_not_answer_is_told_apart() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as silent,
        contextlib.ExitStack() as full,
    ):
        # a queue that is full: what comes now is not answered, as with a firewall that drops
        for _ in range(4):
            client = full.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        with pytest.raises(ConnectionLost, match=r"does not answer within 2 s: .* firewall"):
            first_contact(Remote("127.0.0.1", port=silent.getsockname()[1]))


@pytest.mark.usefixtures("impatient")
def test_what_is_no_ssh_server_is_told_apart() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(ConnectionLost, match="does not begin to speak SSH"),
    ):
        first_contact(Remote("127.0.0.1", port=mute.getsockname()[1]))


def test_a_configuration_that_openssh_does_not_take_is_named(
    start: Start, ssh_config: Callable[[str], Path]
) -> None:
    config = ssh_config("Host *\n  Proxyjmp here\n")
    with pytest.raises(ClusterError, match=rf"{config}: line 2: Bad configuration option"):
        first_contact(Remote("127.0.0.1"))


def test_the_configuration_counts_as_openssh_reads_it(
    start: Start,
    tmp_path: Path,
    ssh_config: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = start()
    known_line(remote, "its-other-name")
    (tmp_path / "more").write_text(
        f'Match originalhost gpu exec "test -e {tmp_path}"\n  IdentityFile {remote.key_file}\n'
        f"  UserKnownHostsFile {remote.known_hosts}\n"
    )
    ssh_config(
        f"Include {tmp_path}/more\nMatch all\n  IdentitiesOnly yes\nHost gpu\n  HostName 127.0.0.1\n"
        f"  Port {remote.port}\n  User {remote.user}\n  HostKeyAlias its-other-name\n"
    )
    assert openssh_takes(Remote("gpu"))
    only_paramiko(monkeypatch)
    first_contact(Remote("gpu"))


@pytest.fixture
def behind(start: Start, ssh_config: Callable[[str], Path]) -> tuple[Remote, Remote]:
    """A host that is reached by a jump host: the target and the jump host."""
    target, jump = start("target"), start("jump")
    known_line(jump, "jump")
    ssh_config(
        f"Host 127.0.0.1\n  ProxyJump jump\nHost jump\n  HostName 127.0.0.1\n  Port {jump.port}\n"
        f"  User {jump.user}\n  IdentityFile {jump.key_file}\n  IdentitiesOnly yes\n"
        f"  HostKeyAlias jump\n  UserKnownHostsFile {jump.known_hosts}\n"
    )
    return target, jump


def test_a_jump_host_is_gone_through(
    behind: tuple[Remote, Remote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = behind
    assert openssh_takes(target)
    only_paramiko(monkeypatch)
    first_contact(target)
    assert (
        "direct-tcpip" in (tmp_path / "jump" / "sshd.log").read_text()
        or "Accepted" in (tmp_path / "jump" / "sshd.log").read_text()
    )


def test_two_jump_hosts_are_gone_through_in_their_order(
    start: Start,
    behind: tuple[Remote, Remote],
    ssh_config: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, _ = behind
    text = (tmp_path / "ssh_config").read_text()
    second = start("second")
    (tmp_path / "programs" / "ssh").unlink()
    shutil.rmtree(tmp_path / "programs")
    ssh_config(
        text.replace("ProxyJump jump", f"ProxyJump jump,{second.user}@second:{second.port}")
        + f"Host second\n  HostName 127.0.0.1\n  IdentityFile {second.key_file}\n"
        f"  UserKnownHostsFile {second.known_hosts}\n"
    )
    assert openssh_takes(target)
    only_paramiko(monkeypatch)
    first_contact(target)
    for name in ("jump", "second", "target"):
        assert "Accepted publickey" in (tmp_path / name / "sshd.log").read_text()


def test_a_jump_host_that_refuses_the_key_is_named(behind: tuple[Remote, Remote]) -> None:
    target, jump = behind
    Path(str(jump.key_file)).with_name("authorized_keys").write_text("")
    with pytest.raises(LoginRefused, match=r"^the jump host: jump \(127.0.0.1 port .* refused"):
        first_contact(target)


def test_a_jump_host_that_is_not_the_known_one_is_named(behind: tuple[Remote, Remote]) -> None:
    target, jump = behind
    known_line(target, "jump")
    Path(str(jump.known_hosts)).write_text(Path(str(target.known_hosts)).read_text())
    known_line(target, f"[127.0.0.1]:{target.port}")
    with pytest.raises(
        ClusterError, match=r"^the jump host: the host key of jump .* is not the one"
    ):
        first_contact(target)


def test_a_jump_host_that_does_not_forward_is_named(
    start: Start, ssh_config: Callable[[str], Path]
) -> None:
    target, jump = start("target"), start("jump", AllowTcpForwarding="no")
    ssh_config(
        f'Match originalhost 127.0.0.1 exec "test %p = {target.port}"\n'
        f"  ProxyJump {jump.user}@jump:{jump.port}\n"
        f"Host jump\n  HostName 127.0.0.1\n  IdentityFile {jump.key_file}\n"
        f"  UserKnownHostsFile {jump.known_hosts}\n"
    )
    with pytest.raises(ClusterError, match=r"the jump host jump forwards nothing to 127.0.0.1:"):
        first_contact(target)


def test_behind_a_jump_host_nothing_may_listen(behind: tuple[Remote, Remote]) -> None:
    target, _ = behind
    with pytest.raises(ConnectionLost, match=r"the jump host jump does not reach 127.0.0.1:1: "):
        first_contact(replace(target, port=1))


def test_a_proxy_command_is_run(
    start: Start, ssh_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = start()
    program = (
        "import socket, sys, threading, os; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
        "threading.Thread(target=lambda: [s.sendall(d) for d in iter(lambda: os.read(0, 65536), b'')],"
        "daemon=True).start(); [os.write(1, d) for d in iter(lambda: s.recv(65536), b'')]"
    )
    ssh_config(f'Host behind\n  ProxyCommand python3 -c "{program}" 127.0.0.1 %p\n')
    host = replace(remote, host="behind")
    known_line(remote, f"[behind]:{remote.port}")
    assert openssh_takes(host)
    only_paramiko(monkeypatch)
    first_contact(host)
