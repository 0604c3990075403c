"""Logs in with the keys that OpenSSH would offer, in its order, or says why the host takes none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import paramiko
from paramiko.agent import AgentSSH

from fastcpt.cluster.remote import (
    CONNECT_TIMEOUT_S,
    ConnectionLost,
    LoginRefused,
    Remote,
)
from fastcpt.cluster.ssh_config import Config, expanded, text_of, where_of


def log_in(transport: paramiko.Transport, remote: Remote, config: Config) -> None:
    """Offer the keys until the host accepts one; ``LoginRefused`` if it accepts none."""
    where, user = where_of(remote, config), config["user"][0]
    offered: list[str] = []
    keys, unusable = _keys(remote, config)
    try:
        transport.auth_none(user)
        return
    except paramiko.BadAuthenticationType as error:
        takes, banner = list(error.allowed_types), text_of(transport.get_banner() or b"").strip()
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ConnectionLost(f"{where} hung up before the login: {error}") from None
    if "publickey" not in takes:
        raise LoginRefused(
            f"{where} takes no key for {user}, only: {', '.join(takes)}. Nobody is there to type a "
            "password: allow PubkeyAuthentication in its sshd, or use another login"
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
                "to answer: use a login that needs only a key"
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
    """The keys to offer with their names, in OpenSSH's order, and why other named files cannot be used.

    First the keys of ssh-agent that the configuration names, then the agent's others (unless
    IdentitiesOnly), then files.
    """
    of_agent = {key.asbytes(): key for key in _agent_keys(config)}
    named: list[tuple[str, paramiko.PKey]] = []
    files: list[tuple[str, paramiko.PKey]] = []
    unusable = []
    for name in config.get("identityfile", []):
        path = Path(expanded(name, remote, config)).expanduser()
        blob, key, why = _read_key(path)
        if blob in of_agent:
            named.append((f"{path} (in ssh-agent)", of_agent.pop(blob)))
        elif key is not None:
            files.append((str(path), key))
        elif why:
            unusable.append(f"{path}: {why}")
    others = [(f"ssh-agent's {key.comment or key.get_name()}", key) for key in of_agent.values()]
    if config.get("identitiesonly", ["no"])[0] == "yes":
        others = []
    return [*named, *others, *files], unusable


def _read_key(path: Path) -> tuple[bytes | None, paramiko.PKey | None, str]:
    """A key file's public part and private key, or why it cannot be used (empty if there is no file)."""
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
        # what cryptography raises for an encrypted key
        return blob, None, "it needs its passphrase, which nobody is there to type: ssh-add it"
    except OSError as error:
        return blob, None, str(error.strerror)
    except Exception as error:
        return blob, None, f"paramiko cannot use it ({error})"
    return blob or key.asbytes(), key, ""


class _Agent(AgentSSH):  # type: ignore[misc]
    """ssh-agent at a given socket; paramiko's own class only reads SSH_AUTH_SOCK."""

    def __init__(self, path: str) -> None:
        super().__init__()
        way = socket.socket(socket.AF_UNIX)
        way.settimeout(CONNECT_TIMEOUT_S)
        way.connect(path)
        self._connect(way)


def _agent_keys(config: Config) -> list[paramiko.AgentKey]:
    """The keys of ssh-agent; each holds the agent's connection open."""
    path = config.get("identityagent", ["SSH_AUTH_SOCK"])[0]
    if path == "SSH_AUTH_SOCK":
        path = os.environ.get("SSH_AUTH_SOCK", "")
    if path in ("", "none"):
        return []
    try:
        return list(_Agent(os.path.expanduser(path)).get_keys())
    except (paramiko.SSHException, OSError):
        return []  # OpenSSH ignores an agent that is gone, too
