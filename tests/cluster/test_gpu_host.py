"""The connection type of a GPU host: Airflow knows it, and its Test button makes the first contact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcpt.cluster.remote import Remote

REPOSITORY = Path(__file__).resolve().parents[2]
# what Airflow's API does for the button, and the form that its UI draws
PROGRAM = """
import json
from airflow.models import Connection
from airflow.providers_manager import ProvidersManager
connection = Connection.get_connection_from_secrets("gpus")
status, message = connection.test_connection()
hook = ProvidersManager().hooks["gpuhost"]
form = sorted(name for name in ProvidersManager().connection_form_widgets if "gpuhost" in name)
print(json.dumps([status, message, hook.hook_name, hook.connection_testable, form]))
"""


def press_test(tmp_path: Path, connection: dict[str, Any]) -> list[Any]:
    settings = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW_CONN_GPUS": json.dumps({"conn_type": "gpuhost", **connection}),
        "PYTHONPATH": f"{REPOSITORY}/include:{REPOSITORY}/plugins",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_the_test_button_makes_the_first_contact(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host, root = start(), str(tmp_path / "root")
    extra = {"key_file": host.key_file, "known_hosts": host.known_hosts, "root": root}
    connection = {"host": host.host, "port": host.port, "login": host.user, "extra": extra}
    status, message, name, testable, form = press_test(tmp_path, connection)
    assert status, message
    assert f"{os.uname().nodename}: " in message
    assert f"GB free under {root}" in message
    assert (name, testable) == ("GPU host", True)
    assert form == [
        f"extra__gpuhost__{field}" for field in ("key_file", "known_hosts", "python", "root")
    ]
    # and says what is wrong where it fails
    Path(str(host.known_hosts)).write_text("")
    status, message, *_ = press_test(tmp_path, connection)
    assert not status
    assert "the host key of 127.0.0.1 port" in message
    assert "then add the line '[127.0.0.1]:" in message


def test_what_the_form_left_empty_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    empty = {"key_file": "", "known_hosts": "/nowhere", "python": "", "root": ""}
    connection = {"host": "127.0.0.1", "extra": empty}
    status, message, *_ = press_test(tmp_path, connection)
    assert not status
    assert message == "the connection's known_hosts '/nowhere' is no file on this machine"
