"""The first contact: each problem has its own message, and OpenSSH decides."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.servers import force, known_line, make_key, only_paramiko, openssh_takes
from fastcpt.cluster.first_contact import first_contact
from fastcpt.cluster.remote import ClusterError, LoginRefused, Remote

Start = Callable[..., Remote]


# The host's key


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
