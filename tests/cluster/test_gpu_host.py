"""The connection type of a GPU host in Airflow's own API: its form, and its Test button."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster.remote import Remote

REPOSITORY = Path(__file__).resolve().parents[2]
# the requests that Airflow's UI makes, answered by the application behind it
PROGRAM = """
import json, sys
from airflow.api_fastapi.app import create_app
from fastapi.testclient import TestClient
with TestClient(create_app(), base_url="http://test") as client:
    client.headers["Authorization"] = "Bearer " + client.get("/auth/token").json()["access_token"]
    for form in json.load(sys.stdin):
        print("ANSWER", client.post("/api/v2/connections/test", json=form).text)
    print("ANSWER", client.get("/ui/connections/hook_meta").text)
"""


def ask_airflow(home: Path, forms: list[dict[str, Any]]) -> list[Any]:
    """The answers to the Test button with these forms, and last the types that the UI offers."""
    settings = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "true",
        "AIRFLOW__API_AUTH__JWT_SECRET": "of-a-test-alone" * 5,
        "PYTHONPATH": f"{REPOSITORY}/include:{REPOSITORY}/plugins",
    }
    environment = {**os.environ, **settings}
    migrate = [str(Path(sys.executable).with_name("airflow")), "db", "migrate"]
    subprocess.run(migrate, env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(forms),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines()]
    return [json.loads(line) for line in lines if line.startswith(("{", "["))]


@pytest.mark.slow
def test_airflows_test_button_makes_the_first_contact(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host, root = start(), str(tmp_path / "root")
    (tmp_path / "empty").write_text("")
    extra = {"key_file": host.key_file, "known_hosts": host.known_hosts, "root": root}

    def form(port: int | None = host.port, **changed: str) -> dict[str, Any]:
        return {
            "connection_id": "new_one",
            "conn_type": "gpuhost",
            "host": host.host,
            "port": port,
            "login": host.user,
            "extra": json.dumps({**extra, **changed}),
        }

    forms = [
        form(),
        form(known_hosts=str(tmp_path / "empty")),
        form(port=1),
        # as the UI sends what was left empty
        form(python="", root="", known_hosts="/nowhere"),
    ]
    right, unknown, deaf, nowhere, types = ask_airflow(tmp_path / "airflow", forms)
    assert right["status"], right
    assert f"{os.uname().nodename}: " in right["message"]
    assert f"GB free under {root}" in right["message"]
    assert [answer["status"] for answer in (unknown, deaf, nowhere)] == [False] * 3
    assert "then add the line '[127.0.0.1]:" in unknown["message"]
    assert "nothing listens at 127.0.0.1 port 1" in deaf["message"]
    assert (
        nowhere["message"] == "the connection's known_hosts '/nowhere' is no file on this machine"
    )
    mine = next(kind for kind in types if kind["connection_type"] == "gpuhost")
    assert mine["hook_name"] == "GPU host"
    assert sorted(mine["extra_fields"]) == ["key_file", "known_hosts", "python", "root"]
