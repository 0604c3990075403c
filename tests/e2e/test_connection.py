"""The Test button of a connection, by the requests that Airflow's UI makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.slow


def test_the_button_tests_what_is_in_the_form(stack: Stack) -> None:
    # another connection than the one that is there: its root is made by the test
    server = json.loads(stack.state["settings"]["AIRFLOW_CONN_LOCAL_CLUSTER"])
    extra = {**server["extra"], "root": str(stack.home / "tested")}
    form = {
        "connection_id": "new_one",
        "conn_type": "gpuhost",
        "host": "127.0.0.1",
        "port": server["port"],
        "extra": json.dumps(extra),
    }
    client = stack.api.client
    answer = client.post("/api/v2/connections/test", json=form).raise_for_status().json()
    assert answer["status"], answer
    assert f"GB free under {stack.home / 'tested'}" in answer["message"]
    wrong = {**form, "extra": json.dumps({**extra, "known_hosts": "/dev/null"})}
    answer = client.post("/api/v2/connections/test", json=wrong).raise_for_status().json()
    assert not answer["status"]
    assert "/dev/null' is no file on this machine" in answer["message"]
    wrong = {**form, "port": 1}
    answer = client.post("/api/v2/connections/test", json=wrong).raise_for_status().json()
    assert not answer["status"]
    assert "nothing listens at 127.0.0.1 port 1" in answer["message"]


def test_the_ui_gets_the_types_form_and_may_show_the_button(stack: Stack) -> None:
    client = stack.api.client
    types = client.get("/ui/connections/hook_meta").raise_for_status().json()
    mine = next(kind for kind in types if kind["connection_type"] == "gpuhost")
    assert mine["hook_name"] == "GPU host"
    assert sorted(mine["extra_fields"]) == ["key_file", "known_hosts", "python", "root"]
    assert client.get("/ui/config").raise_for_status().json()["test_connection"] == "Enabled"
