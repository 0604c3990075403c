"""How to reach the servers that the tests start, and what their logins may be bound to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastcpt.cluster.remote import Remote


def remote_of(facts: dict[str, Any]) -> Remote:
    return Remote(
        facts["host"], facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
    )


def force(remote: Remote, command: str) -> None:
    """The key's login gets ``command`` instead of what it asks for ($SSH_ORIGINAL_COMMAND)."""
    keys = Path(str(remote.key_file)).with_name("authorized_keys")
    escaped = command.replace('"', '\\"')
    keys.write_text(f'command="{escaped}" {keys.read_text()}')
