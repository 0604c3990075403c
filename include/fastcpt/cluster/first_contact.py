"""The first contact with a host: what can be wrong with it, or with the way to it, told apart.

paramiko makes it, because its exceptions say what ``ssh`` says in English sentences alone. Where the
host is, and which keys, files and jump hosts count, is ``ssh -G``'s answer; which lines of known_hosts
are meant is ``ssh-keygen -F``'s: both are as OpenSSH reads them. Host keys are verified always. All
later work is OpenSSH's, so what paramiko refuses OpenSSH is asked about too, and has the last word: it
knows host certificates, FIDO keys and ciphers that paramiko lacks.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import paramiko
from paramiko.agent import AgentSSH

from fastcpt.cluster.remote import (
    CONNECT_TIMEOUT_S,
    ClusterError,
    ConnectionLost,
    LoginRefused,
    Remote,
    connection_error,
)

# What is run there: a shell that says more than this breaks rsync, one that says less is no shell.
SAID = "fast-cpt-first-contact"
COMMAND = f"echo {SAID} && cd / && echo {SAID}"
# What a login prints is kept up to this many bytes.
MOST_SAID = 64 * 1024

log = logging.getLogger(__name__)
# paramiko logs each exception with its traceback before it raises it
logging.getLogger("fastcpt.paramiko").setLevel(logging.CRITICAL)

Config = Mapping[str, list[str]]


@dataclass(frozen=True)
class Answer:
    """What the host made of ``COMMAND``."""

    code: int
    output: str
    errors: str


def first_contact(remote: Remote) -> None:
    """Log in and run one command; returns when the host can be worked with from here.

    Raises ``ClusterError`` (``LoginRefused`` where it is the key) for what somebody has to correct,
    and ``ConnectionLost`` for what may pass. The message says what is wrong, where, and what to do.
    """
    try:
        answer = _by_paramiko(remote)
    except Exception as error:
        answer = _by_openssh(remote)
        if answer.code == 255:
            if not isinstance(error, ClusterError | ConnectionLost):
                # a mistake of paramiko's: only OpenSSH has judged
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
    return Answer(done.returncode, _text(done.stdout), _text(done.stderr))


def _by_paramiko(remote: Remote) -> Answer:
    with ExitStack() as opened:
        transport = _connected(remote, _config(remote), opened)
        return _run(transport, remote.host)


def _judge(remote: Remote, answer: Answer) -> None:
    """Whether the login has a shell that rsync and our own program can work with."""
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
            "/etc/profile.d) print for interactive shells alone: case $- in *i*) ;; *) return ;; esac"
        )


# The way there


def _config(remote: Remote) -> dict[str, list[str]]:
    """``ssh -G``: every option that OpenSSH would use, by name in small letters."""
    command = [*remote.ssh(shared=False), "-G", "--", remote.host]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    if done.returncode:
        raise ClusterError(
            f"ssh does not take its configuration for {remote.host}: {_text(done.stderr).strip()}"
        )
    config: dict[str, list[str]] = {}
    for line in _text(done.stdout).splitlines():
        name, _, value = line.partition(" ")
        config.setdefault(name, []).append(value)
    return config


def _where(remote: Remote, config: Config) -> str:
    hostname, port = config["hostname"][0], config["port"][0]
    if hostname == remote.host.lower():
        return f"{remote.host} port {port}"
    return f"{remote.host} ({hostname} port {port})"


def _connected(remote: Remote, config: Config, opened: ExitStack) -> paramiko.Transport:
    """A connection that is verified and logged in; ``opened`` closes it."""
    where = _where(remote, config)
    way = _way(remote, config, opened)
    transport = paramiko.Transport(way)
    opened.callback(transport.close)
    transport.set_log_channel("fastcpt.paramiko")
    transport.banner_timeout = transport.auth_timeout = CONNECT_TIMEOUT_S
    known = list(_known_keys(remote, config))
    _restrict(transport.get_security_options(), config, known)
    try:
        # longer than the wait for its first line, which has an exception of its own
        transport.start_client(timeout=2 * CONNECT_TIMEOUT_S)
        key = transport.get_remote_server_key()
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise ClusterError(
            f"{where} and this machine have no algorithm in common: {error}. Its sshd is very old or "
            "very strict: update it, or allow what it offers for this host in ~/.ssh/config"
        ) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(
            f"what answers at {where} does not begin to speak SSH ({error}): check the port; an SSH "
            "server that turns everybody away (too many connections, going down) does that too"
        ) from None
    _verify(key, known, remote, config)
    _log_in(transport, remote, config)
    return transport


def _restrict(
    options: paramiko.transport.SecurityOptions, config: Config, known: list[KnownKey]
) -> None:
    """Only algorithms that OpenSSH would take, and of the host's keys first the kind that is known."""
    for option, name in (
        ("ciphers", "ciphers"),
        ("digests", "macs"),
        ("kex", "kexalgorithms"),
        ("key_types", "hostkeyalgorithms"),
    ):
        allowed = set(config.get(name, [""])[0].split(","))
        if both := [one for one in getattr(options, option) if one in allowed]:
            setattr(options, option, both)
    kinds = {kind for entry in known for kind in _algorithms(entry.kind)}
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in kinds)


def _way(remote: Remote, config: Config, opened: ExitStack) -> socket.socket | paramiko.Channel:
    """What the connection runs over: a socket, a proxy command, or a channel of the jump host."""
    hostname, port = config["hostname"][0], int(config["port"][0])
    where = _where(remote, config)
    if jump := config.get("proxyjump"):
        return _through(jump[0], hostname, port, opened)
    if (proxy := config.get("proxycommand", ["none"])[0]) != "none":
        return _proxied(_expanded(proxy, remote, config), opened)
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
    """A channel to ``hostname`` from the last of ``jumps``, which is reached by those before it."""
    *before, last = jumps.split(",")
    parts = re.fullmatch(r"(?:ssh://)?(?:(.+)@)?(?:\[(.+)\]|([^:]+))(?::(\d+))?", last)
    if parts is None:
        raise ClusterError(f"ProxyJump names no host: '{last}'")
    user, bracketed, plain, jump_port = parts.groups()
    jump = Remote(bracketed or plain, user, int(jump_port) if jump_port else None)
    config = _config(jump)
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
    """The end of a socket pair whose other end is a proxy command's, as OpenSSH does it."""
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


def _expanded(text: str, remote: Remote, config: Config) -> str:
    """ssh_config's tokens, as far as they name the host, the login and this user."""
    tokens = {
        "%": "%",
        "d": str(Path.home()),
        "h": config["hostname"][0],
        "k": config.get("hostkeyalias", [remote.host])[0],
        "L": socket.gethostname().partition(".")[0],
        "l": socket.gethostname(),
        "n": remote.host,
        "p": config["port"][0],
        "r": config["user"][0],
        "u": getpass.getuser(),
        "i": str(os.getuid()),
    }
    return re.sub("%(.)", lambda found: tokens.get(found[1], found[0]), text)


# The host's key


@dataclass(frozen=True)
class KnownKey:
    """A line of a known_hosts file that is about the host; ``marker`` is empty, CA or REVOKED."""

    place: str
    marker: str
    kind: str
    key: str
    # the line names the host without its port
    portless: bool


def _algorithms(kind: str) -> list[str]:
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


def _known_hosts_files(remote: Remote, config: Config) -> list[Path]:
    of_user = config.get("userknownhostsfile", [""])[0].split()
    if remote.known_hosts:
        of_user = [remote.known_hosts]
    named = [*of_user, *config.get("globalknownhostsfile", [""])[0].split()]
    return [Path(name).expanduser() for name in named if Path(name).expanduser().is_file()]


def _known_keys(remote: Remote, config: Config) -> Iterator[KnownKey]:
    """The lines about the host, by ``ssh-keygen -F``: hashed names and patterns as OpenSSH reads them."""
    hostname, port = config["hostname"][0], config["port"][0]
    names = {hostname: False}
    if alias := config.get("hostkeyalias"):
        names = {alias[0]: False}
    elif port != "22":
        names = {f"[{hostname}]:{port}": False, hostname: True}
    for name, portless in names.items():
        for file in _known_hosts_files(remote, config):
            command = ["ssh-keygen", "-F", name, "-f", str(file)]
            found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
            place = marker = ""
            for line in _text(found.stdout).splitlines():
                if told := re.fullmatch(r"# Host .* found: line (\d+)\s*(\w*)\s*", line):
                    place, marker = f"{file} line {told[1]}", told[2]
                    continue
                fields = line.split()[1:] if line.startswith("@") else line.split()
                if len(fields) >= 3:
                    yield KnownKey(place, marker, fields[1], fields[2], portless)


def _verify(key: paramiko.PKey, known: list[KnownKey], remote: Remote, config: Config) -> None:
    """Raise where the host's key is not the one that is known."""
    where, mine = _where(remote, config), (key.get_name(), key.get_base64())
    shown = f"It shows {key.get_name()} {key.fingerprint}"
    compare = "Compare it with what the host's owner tells you (ssh-keygen -lf there)"
    for entry in known:
        if entry.marker == "REVOKED" and (entry.kind, entry.key) == mine:
            raise ClusterError(
                f"the host key of {where} is marked as revoked in {entry.place}: do not use this host"
            )
    plain = [entry for entry in known if not entry.marker]
    if any((entry.kind, entry.key) == mine for entry in plain):
        return
    files = ", ".join(map(str, _known_hosts_files(remote, config))) or "any known_hosts file"
    others = [entry for entry in plain if entry.kind == key.get_name() and not entry.portless]
    if others:
        raise ClusterError(
            f"the host key of {where} is not the one in {others[0].place}: somebody else may be "
            f"answering. {shown}. {compare}, then correct that line"
        )
    name = config.get("hostkeyalias", [""])[0] or (
        config["hostname"][0]
        if config["port"][0] == "22"
        else f"[{config['hostname'][0]}]:{config['port'][0]}"
    )
    raise ClusterError(
        f"the host key of {where} is unknown: {files} has none for {name}. {shown}. {compare}, then "
        f"add the line '{name} {key.get_name()} {key.get_base64()}'"
    )


# The login


def _log_in(transport: paramiko.Transport, remote: Remote, config: Config) -> None:
    """Offer what OpenSSH would, in its order, until the host is content."""
    where, user = _where(remote, config), config["user"][0]
    offered: list[str] = []
    keys, unusable = _keys(remote, config)
    try:
        transport.auth_none(user)
        return
    except paramiko.BadAuthenticationType as error:
        takes, banner = list(error.allowed_types), _text(transport.get_banner() or b"").strip()
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(f"{where} hung up before the login: {error}") from None
    if "publickey" not in takes:
        raise LoginRefused(
            f"{where} takes no key for {user}, only: {', '.join(takes)}. Nobody is there to type a "
            "password: have PubkeyAuthentication allowed in its sshd, or use another login"
        )
    for name, key in keys:
        offered.append(f"{name}: refused")
        try:
            further = transport.auth_publickey(user, key)
        except paramiko.AuthenticationException:
            if not transport.is_active():
                break
        except (paramiko.SSHException, EOFError, OSError) as error:
            offered[-1] = f"{name}: {error}"
            if not transport.is_active():
                break
        else:
            if not further:
                return
            raise LoginRefused(
                f"{where} takes {name} and asks {user} for more: {', '.join(further)}. Nobody is there "
                "to answer: use a login that a key alone lets in"
            )
    lines = [f"- {line}" for line in [*offered, *unusable]]
    if not transport.is_active() and len(offered) < len(keys):
        lines.append(
            f"- it hung up after {len(offered)} of {len(keys)} keys: name the right one as the "
            "connection's key_file"
        )
    if not lines:
        lines = ["- there is no key to offer: give the connection a key_file, or ssh-add one"]
    if banner:
        lines.append(f"- it says: {banner[:500]}")
    raise LoginRefused(
        f"{where} refused the login of {user}:\n"
        + "\n".join(lines)
        + "\nCheck the connection's login and key_file, and that the key is in the login's "
        "~/.ssh/authorized_keys there"
    )


def _keys(remote: Remote, config: Config) -> tuple[list[tuple[str, paramiko.PKey]], list[str]]:
    """The keys to offer, named, in OpenSSH's order, and why files that were named cannot be used.

    The agent's keys that the configuration names come first, then its others (unless
    IdentitiesOnly), then files.
    """
    of_agent = {key.asbytes(): key for key in _agent_keys(config)}
    named: list[tuple[str, paramiko.PKey]] = []
    files: list[tuple[str, paramiko.PKey]] = []
    unusable = []
    for name in config.get("identityfile", []):
        path = Path(_expanded(name, remote, config)).expanduser()
        blob, key, why = _read_key(path)
        if blob in of_agent:
            named.append((f"{path} (in the agent)", of_agent.pop(blob)))
        elif key is not None:
            files.append((str(path), key))
        elif why:
            unusable.append(f"{path}: {why}")
    others = [(f"the agent's {key.comment or key.get_name()}", key) for key in of_agent.values()]
    if config.get("identitiesonly", ["no"])[0] == "yes":
        others = []
    return [*named, *others, *files], unusable


def _read_key(path: Path) -> tuple[bytes | None, paramiko.PKey | None, str]:
    """A private key's public part and the key, or why it cannot be used (empty where there is none)."""
    blob = None
    if (public := path.with_name(f"{path.name}.pub")).is_file():
        fields = public.read_text(errors="replace").split()
        blob = paramiko.PublicBlob.from_string(" ".join(fields[:2])).key_blob if fields else None
    if not path.is_file():
        return blob, None, ""
    state = path.stat()
    if state.st_uid == os.getuid() and state.st_mode & 0o077:
        return blob, None, f"others may read it, so ssh does not take it: chmod 600 {path}"
    try:
        key = paramiko.PKey.from_path(path)
    except TypeError:
        # cryptography's word for it
        return blob, None, "it needs its passphrase, which nobody is there to type: ssh-add it"
    except OSError as error:
        return blob, None, str(error.strerror)
    except Exception as error:
        return blob, None, f"paramiko cannot use it ({error})"
    return blob or key.asbytes(), key, ""


class _Agent(AgentSSH):  # type: ignore[misc]
    """The agent behind a socket; paramiko's own looks into the environment alone."""

    def __init__(self, path: str) -> None:
        super().__init__()
        way = socket.socket(socket.AF_UNIX)
        way.settimeout(CONNECT_TIMEOUT_S)
        way.connect(path)
        self._connect(way)


def _agent_keys(config: Config) -> list[paramiko.AgentKey]:
    """The keys of the agent; it keeps its connection open for as long as a key is used."""
    path = config.get("identityagent", ["SSH_AUTH_SOCK"])[0]
    if path == "SSH_AUTH_SOCK":
        path = os.environ.get("SSH_AUTH_SOCK", "")
    if path in ("", "none"):
        return []
    try:
        return list(_Agent(os.path.expanduser(path)).get_keys())
    except (paramiko.SSHException, OSError):
        return []  # an agent that has gone, as OpenSSH takes it


# The shell


def _run(transport: paramiko.Transport, host: str) -> Answer:
    """``COMMAND`` on the host, as OpenSSH would run it: without a terminal."""
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
            f"{host} takes the login, and its shell does not end a command within {CONNECT_TIMEOUT_S} s: "
            "see what the login's start-up files (~/.bashrc, ~/.zshenv) wait for"
        ) from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(f"{host} took the login and hung up: {error}") from None
    return Answer(code, _text(bytes(output)), _text(bytes(errors)))


def _text(said: bytes) -> str:
    return said.decode(errors="replace").replace("\r\n", "\n")
