"""The first contact with a host: tells apart what can be wrong with it or with the route to it.

paramiko is used because it raises typed exceptions where ``ssh`` prints sentences. Address, keys,
files and jump hosts come from ``ssh -G``, lines of known_hosts from ``ssh-keygen -F``, so both are as
OpenSSH reads them. Host keys are always verified. All later work uses OpenSSH, so OpenSSH has the last
word: if paramiko fails, ``ssh`` tries too, as it knows host certificates, FIDO keys and ciphers that
paramiko lacks.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass

import paramiko

from fastcpt.cluster.host_key import KnownKey, algorithms, known_keys, verify_host_key
from fastcpt.cluster.login import log_in
from fastcpt.cluster.remote import (
    CONNECT_TIMEOUT_S,
    ClusterError,
    ConnectionLost,
    Remote,
    connection_error,
)
from fastcpt.cluster.ssh_config import Config, config_of, expanded, text_of, where_of

# A shell that prints more than this breaks rsync; a login that prints less has no usable shell.
SAID = "fast-cpt-first-contact"
COMMAND = f"echo {SAID} && cd / && echo {SAID}"
# Keep at most this many bytes of what a login prints.
MOST_SAID = 64 * 1024

log = logging.getLogger(__name__)
# paramiko logs each exception with its traceback before it raises it
logging.getLogger("fastcpt.paramiko").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Answer:
    """The result of ``COMMAND`` on the host."""

    code: int
    output: str
    errors: str


def first_contact(remote: Remote) -> None:
    """Log in and run one command; returns if the host is usable.

    Raises ``ClusterError`` (``LoginRefused`` for a key) if somebody has to correct something, and
    ``ConnectionLost`` if trying again may help. The message says what is wrong, where, and what to do.
    """
    try:
        answer = _by_paramiko(remote)
    except Exception as error:
        answer = _by_openssh(remote)
        if answer.code == 255:
            if not isinstance(error, ClusterError | ConnectionLost):
                # a bug in paramiko: OpenSSH's error is the only one that means anything
                raise connection_error(remote, answer.errors.strip()) from error
            words = answer.errors.strip().rpartition("\n")[2]
            raise type(error)(f"{error}\n(ssh says: {words})") from None
        log.info("OpenSSH reaches %s where paramiko does not, which says: %s", remote.host, error)
    _judge(remote, answer)


def _by_openssh(remote: Remote) -> Answer:
    command = [*remote.ssh(shared=False), "--", remote.host, COMMAND]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=4 * CONNECT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Answer(255, "", "nothing for a long time")
    return Answer(done.returncode, text_of(done.stdout), text_of(done.stderr))


def _by_paramiko(remote: Remote) -> Answer:
    with ExitStack() as opened:
        transport = _connected(remote, config_of(remote), opened)
        return _run(transport, remote.host)


def _judge(remote: Remote, answer: Answer) -> None:
    """Raise ``ClusterError`` if rsync or the agent cannot work with the login's shell."""
    _, *between = answer.output.split(f"{SAID}\n")
    said = answer.output.replace(f"{SAID}\n", "").strip()
    if not between:
        raise ClusterError(
            f"{remote.host} takes the login and runs no command: it ended with {answer.code} and said "
            f"{(said or answer.errors.strip())[-500:]!r}. The login's shell is nologin or a menu, or its "
            "key is bound to a command: let the host's owner give it a shell (chsh -s /bin/bash)"
        )
    if len(between) == 1:
        raise ClusterError(
            f"{remote.host} gives the login a restricted shell, which may not change its folder "
            f"({answer.errors.strip()[-500:]}): let the host's owner give it a plain one (chsh -s /bin/bash)"
        )
    if said:
        raise ClusterError(
            f"{remote.host} prints text where no person reads: {said[:500]!r}. rsync takes it for its own "
            "protocol and breaks. Let the login's start-up files there (~/.bashrc, ~/.zshenv, "
            "/etc/profile.d) print in interactive shells only: case $- in *i*) ;; *) return ;; esac"
        )


# The connection


def _connected(remote: Remote, config: Config, opened: ExitStack) -> paramiko.Transport:
    """A verified connection that is logged in; ``opened`` closes it."""
    where = where_of(remote, config)
    way = _way(remote, config, opened)
    transport = paramiko.Transport(way)
    opened.callback(transport.close)
    transport.set_log_channel("fastcpt.paramiko")
    transport.banner_timeout = transport.auth_timeout = CONNECT_TIMEOUT_S
    known = list(known_keys(remote, config))
    _restrict(transport.get_security_options(), config, known)
    try:
        # longer than banner_timeout, which raises an exception of its own
        transport.start_client(timeout=2 * CONNECT_TIMEOUT_S)
        key = transport.get_remote_server_key()
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise ClusterError(
            f"{where} and this machine have no algorithm in common: {error}. Its sshd is very old or "
            "very strict: update it, or allow what it offers for this host in ~/.ssh/config"
        ) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(
            f"what answers at {where} does not begin to speak SSH ({error}): check the port. An SSH "
            "server with too many connections, or one that is shutting down, does that too"
        ) from None
    verify_host_key(key, known, remote, config)
    log_in(transport, remote, config)
    return transport


def _restrict(
    options: paramiko.transport.SecurityOptions, config: Config, known: list[KnownKey]
) -> None:
    """Offer only what OpenSSH would, and ask first for the kind of host key that known_hosts has."""
    for option, name in (
        ("ciphers", "ciphers"),
        ("digests", "macs"),
        ("kex", "kexalgorithms"),
        ("key_types", "hostkeyalgorithms"),
    ):
        allowed = set(config.get(name, [""])[0].split(","))
        if both := [one for one in getattr(options, option) if one in allowed]:
            setattr(options, option, both)
    kinds = {kind for entry in known for kind in algorithms(entry.kind)}
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in kinds)


def _way(remote: Remote, config: Config, opened: ExitStack) -> socket.socket | paramiko.Channel:
    """The stream under the connection: a socket, a proxy command, or a channel of the jump host."""
    hostname, port = config["hostname"][0], int(config["port"][0])
    where = where_of(remote, config)
    if jump := config.get("proxyjump"):
        return _through(jump[0], hostname, port, opened)
    if (proxy := config.get("proxycommand", ["none"])[0]) != "none":
        return _proxied(expanded(proxy, remote, config), opened)
    try:
        way = socket.create_connection((hostname, port), CONNECT_TIMEOUT_S)
    except socket.gaierror as error:
        kind = ConnectionLost if error.errno == socket.EAI_AGAIN else ClusterError
        raise kind(
            f"no host '{hostname}' is found ({error.strerror}): correct the connection's host, "
            "or its HostName in ~/.ssh/config"
        ) from None
    except ConnectionRefusedError:
        raise ConnectionLost(
            f"nothing listens at {where}: check the port, and that sshd runs there; a host that has "
            "just been started needs a minute"
        ) from None
    except TimeoutError:
        raise ConnectionLost(
            f"{where} does not answer within {CONNECT_TIMEOUT_S} s: it is off, or a firewall is "
            "between; check the address, or go through a jump host (ProxyJump in ~/.ssh/config)"
        ) from None
    except OSError as error:
        raise ConnectionLost(f"no way to {where}: {error.strerror}") from None
    opened.callback(way.close)
    return way


def _through(jumps: str, hostname: str, port: int, opened: ExitStack) -> paramiko.Channel:
    """A channel to ``hostname`` from the last of ``jumps``, reached through the earlier ones."""
    *before, last = jumps.split(",")
    parts = re.fullmatch(r"(?:ssh://)?(?:(.+)@)?(?:\[(.+)\]|([^:]+))(?::(\d+))?", last)
    if parts is None:
        raise ClusterError(f"ProxyJump names no host: '{last}'")
    user, bracketed, plain, jump_port = parts.groups()
    jump = Remote(bracketed or plain, user, int(jump_port) if jump_port else None)
    config = config_of(jump)
    if before:
        config["proxyjump"] = [",".join(before)]
    try:
        transport = _connected(jump, config, opened)
    except (ClusterError, ConnectionLost) as error:
        raise type(error)(f"the jump host: {error}") from None
    try:
        return transport.open_channel(
            "direct-tcpip", (hostname, port), ("127.0.0.1", 0), timeout=CONNECT_TIMEOUT_S
        )
    except paramiko.ChannelException as error:
        if error.code == 1:  # RFC 4254: administratively prohibited
            raise ClusterError(
                f"the jump host {jump.host} forwards nothing to {hostname}:{port}: its sshd needs "
                "AllowTcpForwarding for this login"
            ) from None
        raise ConnectionLost(
            f"the jump host {jump.host} does not reach {hostname}:{port}: {error.text}"
        ) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(f"the jump host {jump.host} hung up: {error}") from None


def _proxied(command: str, opened: ExitStack) -> socket.socket:
    """Our end of a socket pair; the proxy command has the other end, as in OpenSSH."""
    ours, theirs = socket.socketpair()
    shell = os.environ.get("SHELL") or "/bin/sh"
    process = subprocess.Popen(
        [shell, "-c", f"exec {command}"],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        stderr=subprocess.DEVNULL,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.terminate()
        process.wait()

    opened.callback(end)
    return ours


# The shell


def _run(transport: paramiko.Transport, host: str) -> Answer:
    """Run ``COMMAND`` on the host without a terminal, as OpenSSH would."""
    try:
        channel = transport.open_session(timeout=CONNECT_TIMEOUT_S)
        channel.settimeout(CONNECT_TIMEOUT_S)
        channel.exec_command(COMMAND)
        channel.shutdown_write()
        output, errors = bytearray(), bytearray()
        while (piece := channel.recv(4096)) and len(output) < MOST_SAID:
            output += piece
        while (piece := channel.recv_stderr(4096)) and len(errors) < MOST_SAID:
            errors += piece
        if not channel.status_event.wait(CONNECT_TIMEOUT_S):
            raise TimeoutError
        code = channel.recv_exit_status()
    except TimeoutError:
        raise ClusterError(
            f"{host} takes the login, but its shell does not end a command within {CONNECT_TIMEOUT_S} s: "
            "see what the login's start-up files (~/.bashrc, ~/.zshenv) wait for"
        ) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(f"{host} took the login and hung up: {error}") from None
    return Answer(code, text_of(bytes(output)), text_of(bytes(errors)))
