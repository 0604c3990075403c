"""The first contact: each thing that can be wrong is told apart, and OpenSSH has the last word."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.servers import force
from fastcpt.cluster import first_contact as module
from fastcpt.cluster.first_contact import first_contact
from fastcpt.cluster.remote import ClusterError, ConnectionLost, LoginRefused, Remote

Start = Callable[..., Remote]


@pytest.fixture
def ssh_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Gives OpenSSH a configuration: it looks for its own in the home of the user database alone."""

    def write(text: str) -> Path:
        config, programs = tmp_path / "ssh_config", tmp_path / "programs"
        config.write_text(text)
        programs.mkdir()
        (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        (programs / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return config

    return write


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    while not os.path.exists(path):
        assert process.poll() is None
    yield path
    process.terminate()
    process.wait()


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def openssh_takes(remote: Remote) -> bool:
    """Whether OpenSSH itself, asked by the command line, gets through."""
    command = [*remote.ssh(shared=False), "--", remote.host, "true"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def only_paramiko(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detour by OpenSSH fails the test."""

    def no(remote: Remote) -> None:
        raise AssertionError("OpenSSH was asked")

    monkeypatch.setattr(module, "_by_openssh", no)


# The host's key


def known_line(remote: Remote, names: str, key: str = "host_key") -> None:
    kind, text = Path(str(remote.key_file)).with_name(f"{key}.pub").read_text().split()[:2]
    Path(str(remote.known_hosts)).write_text(f"{names} {kind} {text}\n")


@pytest.mark.parametrize(
    "names", ["[127.0.0.1]:{port}", "[127.0.0.*]:*,other", "127.0.0.1", "!other,127.0.0.?"]
)
@pytest.mark.parametrize("hashed", [False, True])
def test_known_hosts_is_read_as_openssh_reads_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, names: str, hashed: bool
) -> None:
    remote = start()
    known_line(remote, names.format(port=remote.port))
    if hashed:
        command = ["ssh-keygen", "-q", "-H", "-f", str(remote.known_hosts)]
        subprocess.run(command, check=True, capture_output=True)
    assert openssh_takes(remote)
    only_paramiko(monkeypatch)
    first_contact(remote)


def test_of_a_hosts_keys_the_one_that_is_known_counts(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sshd").mkdir()
    make_key(tmp_path / "sshd" / "rsa", "rsa")
    remote = start(HostKey=f"{tmp_path}/sshd/host_key\nHostKey {tmp_path}/sshd/rsa")
    known_line(remote, f"[127.0.0.1]:{remote.port}", "rsa")
    assert openssh_takes(remote)
    only_paramiko(monkeypatch)
    first_contact(remote)


def test_an_unknown_host_key_is_shown_with_the_line_to_add(start: Start) -> None:
    remote = start()
    known = Path(str(remote.known_hosts))
    line = known.read_text()
    known.write_text("")
    with pytest.raises(ClusterError, match="is unknown") as unknown:
        first_contact(remote)
    assert f"'{line.strip()}'" in str(unknown.value)
    assert str(known) in str(unknown.value)
    # what it tells to do helps
    known.write_text(line)
    first_contact(remote)


def test_a_changed_host_key_names_the_line(start: Start, tmp_path: Path) -> None:
    remote = start()
    make_key(tmp_path / "sshd" / "other")
    known_line(remote, f"[127.0.0.1]:{remote.port}", "other")
    with Path(str(remote.known_hosts)).open("r+") as known:
        line = known.read()
        known.seek(0)
        known.write("# a comment\n" + line)
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(tmp_path / "sshd" / "host_key.pub")], capture_output=True
    ).stdout.decode()
    with pytest.raises(ClusterError, match=r"is not the one in .*known_hosts line 2") as changed:
        first_contact(remote)
    assert shown.split()[1] in str(changed.value)


def test_a_revoked_host_key_is_refused(start: Start) -> None:
    remote = start()
    known = Path(str(remote.known_hosts))
    known.write_text(known.read_text() + "@revoked " + known.read_text())
    assert not openssh_takes(remote)
    with pytest.raises(ClusterError, match=r"marked as revoked in .*known_hosts line 2"):
        first_contact(remote)


def test_a_password_is_never_offered_to_a_host_that_is_not_verified(
    start: Start, tmp_path: Path
) -> None:
    remote = start()
    Path(str(remote.known_hosts)).write_text("")
    with pytest.raises(ClusterError):
        first_contact(remote)
    assert "Accepted" not in (tmp_path / "sshd" / "sshd.log").read_text()


# What the two judge differently: OpenSSH decides


def test_a_host_certificate_is_openssh_s_to_verify(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_key(tmp_path / "authority")
    remote = start()
    folder = tmp_path / "sshd"
    sign = ["ssh-keygen", "-q", "-s", str(tmp_path / "authority"), "-I", "host", "-h"]
    subprocess.run([*sign, "-n", "127.0.0.1", str(folder / "host_key.pub")], check=True)
    remote = start("sshd", HostCertificate=folder / "host_key-cert.pub")
    authority = (tmp_path / "authority.pub").read_text()
    Path(str(remote.known_hosts)).write_text(f"@cert-authority * {authority}")
    with caplog.at_level("INFO"):
        first_contact(remote)
    assert "OpenSSH reaches 127.0.0.1 where paramiko does not" in caplog.text


def test_a_cipher_that_paramiko_lacks_is_no_obstacle(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        first_contact(start(Ciphers="chacha20-poly1305@openssh.com"))
    assert "no acceptable ciphers" in caplog.text


def test_a_cipher_that_only_paramiko_takes_is_refused(start: Start) -> None:
    remote = start(Ciphers="aes128-cbc")
    assert not openssh_takes(remote)
    with pytest.raises(ClusterError, match="no algorithm in common") as refused:
        first_contact(remote)
    # OpenSSH's words name what the host offers
    assert "aes128-cbc" in str(refused.value)


def test_a_key_that_others_may_read_is_refused_as_openssh_does(start: Start) -> None:
    remote = start()
    Path(str(remote.key_file)).chmod(0o644)
    assert not openssh_takes(remote)
    with pytest.raises(LoginRefused, match=f"chmod 600 {remote.key_file}"):
        first_contact(remote)


def test_a_mistake_of_paramiko_is_no_obstacle(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    remote = start()
    # paramiko cannot parse it, OpenSSH does not need it
    Path(f"{remote.key_file}.pub").write_text("no key\n")
    with caplog.at_level("INFO"):
        first_contact(remote)
    assert "OpenSSH reaches 127.0.0.1 where paramiko does not" in caplog.text
    # and where OpenSSH fails too, it is its words that count
    Path(str(remote.known_hosts)).write_text("")
    Path(str(remote.key_file)).with_name("authorized_keys").write_text("")
    with pytest.raises(ClusterError):
        first_contact(remote)


# The login


def test_a_refused_key_is_named(start: Start, tmp_path: Path) -> None:
    remote = replace(start(), key_file=str(make_key(tmp_path / "other")))
    with pytest.raises(LoginRefused, match=rf"- {tmp_path}/other: refused\n.*authorized_keys"):
        first_contact(remote)


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_keys_of_every_kind_are_taken(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "sshd").mkdir()
    make_key(tmp_path / "sshd" / "client_key", kind)
    only_paramiko(monkeypatch)
    first_contact(start())


def test_a_key_with_a_passphrase_needs_the_agent(
    start: Start, tmp_path: Path, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sshd").mkdir()
    key = make_key(tmp_path / "sshd" / "client_key", passphrase="a word or two")
    remote = start()
    with pytest.raises(LoginRefused, match=r"it needs its passphrase.*ssh-add"):
        first_contact(remote)
    answer = tmp_path / "answer"
    answer.write_text("#!/bin/sh\necho a word or two\n")
    answer.chmod(0o755)
    environment = {**os.environ, "SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", str(key)], check=True, env=environment, capture_output=True)
    only_paramiko(monkeypatch)
    first_contact(remote)


def test_the_agents_keys_are_offered(
    start: Start, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = start()
    subprocess.run(["ssh-add", "-q", str(remote.key_file)], check=True, capture_output=True)
    only_paramiko(monkeypatch)
    first_contact(replace(remote, key_file=None))


def test_too_many_keys_are_counted(start: Start, tmp_path: Path, agent: str) -> None:
    remote = start(MaxAuthTries=3)
    for number in range(6):
        key = make_key(tmp_path / f"key{number}")
        subprocess.run(["ssh-add", "-q", str(key)], check=True, capture_output=True)
    subprocess.run(["ssh-add", "-q", str(remote.key_file)], check=True, capture_output=True)
    without = replace(remote, key_file=None)
    assert not openssh_takes(without)
    with pytest.raises(LoginRefused, match=r"it hung up after \d of \d keys: name the right one"):
        first_contact(without)
    # the named one is offered first
    first_contact(remote)


def test_a_host_that_asks_for_a_password_is_told_apart(start: Start) -> None:
    remote = start(PubkeyAuthentication="no", PasswordAuthentication="yes")
    with pytest.raises(LoginRefused, match=r"takes no key for .*, only: password"):
        first_contact(remote)


def test_a_host_that_asks_for_more_than_a_key_is_told_apart(start: Start) -> None:
    remote = start(AuthenticationMethods="publickey,password", PasswordAuthentication="yes")
    with pytest.raises(LoginRefused, match=r"client_key and asks .* for more: password"):
        first_contact(remote)


def test_what_the_host_says_beside_a_refusal_is_shown(start: Start, tmp_path: Path) -> None:
    (tmp_path / "banner").write_text("Down for maintenance until noon.\n")
    remote = start(Banner=tmp_path / "banner", AllowUsers="nobody-else")
    with pytest.raises(LoginRefused, match="- it says: Down for maintenance until noon"):
        first_contact(remote)


# The way


def test_a_host_that_is_not_found_does_not_heal() -> None:
    with pytest.raises(ClusterError, match=r"no host 'nowhere\.invalid' is found"):
        first_contact(Remote("nowhere.invalid"))


def test_a_port_where_nothing_listens_may_heal(start: Start) -> None:
    with pytest.raises(ConnectionLost, match=r"nothing listens at 127.0.0.1 port 1:"):
        first_contact(replace(start(), port=1))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 2)
    monkeypatch.setattr("fastcpt.cluster.remote.CONNECT_TIMEOUT_S", 2)


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


# The shell


def test_text_for_persons_is_refused(start: Start) -> None:
    remote = start()
    force(remote, 'echo "Welcome to the GPU farm"; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    with pytest.raises(ClusterError, match=r"prints text .*'Welcome to the GPU farm'.*~/.bashrc"):
        first_contact(remote)


def test_text_on_the_other_channel_harms_nobody(start: Start) -> None:
    remote = start()
    force(remote, 'echo "Welcome to the GPU farm" >&2; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    first_contact(remote)


def test_a_restricted_shell_is_refused(start: Start) -> None:
    remote = start()
    force(remote, 'exec rbash -c "$SSH_ORIGINAL_COMMAND"')
    with pytest.raises(ClusterError, match=r"a restricted shell.*rbash: .*chsh"):
        first_contact(remote)


@pytest.mark.parametrize(
    "shell",
    ["/usr/sbin/nologin", "/bin/false", "echo 1. Mail 2. News"],
    ids=["nologin", "false", "menu"],
)
def test_a_login_without_a_shell_is_refused(start: Start, shell: str) -> None:
    remote = start()
    force(remote, shell)
    with pytest.raises(ClusterError, match=r"takes the login and runs no command: .*chsh"):
        first_contact(remote)


def test_a_login_for_sftp_alone_is_refused(start: Start) -> None:
    with pytest.raises(ClusterError, match="takes the login and runs no command"):
        first_contact(start(ForceCommand="internal-sftp"))


@pytest.mark.usefixtures("impatient")
def test_a_shell_that_waits_for_something_is_refused(start: Start) -> None:
    remote = start()
    force(remote, "sleep 60")
    with pytest.raises(ClusterError, match="does not end a command within 2 s"):
        first_contact(remote)


def test_a_host_without_sftp_is_taken(start: Start, tmp_path: Path) -> None:
    """Nothing uses it: the tests' server has none."""
    remote = start()
    assert "Subsystem" not in (tmp_path / "sshd" / "sshd_config").read_text()
    first_contact(remote)
