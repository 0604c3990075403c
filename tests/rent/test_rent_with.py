"""The ready commands for SkyPilot, dstack and a permanent host, with substitutes for the two tools.

The stand-ins take the options that SkyPilot 0.14.1 and dstack 0.22.5 have, and print what those print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGMzS1Jz0w8Hcz1wVzQxGdBtW3fF5Qm0Zy7l8wRtUvXk"
NEEDS = {
    "key": "fast-cpt-run-0123456789-1",
    "run": "r",
    "gpus": 8,
    "gpu": "H100",
    "disk_gb": 50.0,
    "hours": 3.0,
}

# ``state`` beside it is what the tool has rented; ``none`` there: it finds no machine.
SKY = """
import argparse, json, pathlib, shutil, sys
here = pathlib.Path(sys.argv[0]).parent
top = argparse.ArgumentParser()
commands = top.add_subparsers(dest="do", required=True)
launch = commands.add_parser("launch")
for name in ("-y", "-d", "--use-spot"):
    launch.add_argument(name, action="store_true")
launch.add_argument("-c")
launch.add_argument("entrypoint")
status = commands.add_parser("status")
status.add_argument("--refresh", action="store_true")
status.add_argument("-o")
status.add_argument("cluster")
logs = commands.add_parser("logs")
for name in ("cluster", "job"):
    logs.add_argument(name)
logs.add_argument("--no-follow", action="store_true")
down = commands.add_parser("down")
down.add_argument("-y", action="store_true")
down.add_argument("cluster")
given, state = top.parse_args(), here / "state"
if given.do == "launch":
    if (here / "none").exists():
        sys.exit("sky.exceptions.ResourcesUnavailableError: Failed to provision all possible launchable resources.")
    shutil.copy(given.entrypoint, here / "task")
    state.write_text(given.c)
elif given.do == "status":
    name = state.read_text() if state.exists() else ""
    one = {"name": name, "status": "UP", "accelerators": "{'H100': 8}"}
    print("Refreshing status")
    print(json.dumps([one] if name == given.cluster else [], indent=2))
elif given.do == "logs":
    print("(task, pid=1) KEY root@machine")
else:
    state.unlink()
"""
DSTACK = """
import argparse, json, pathlib, shutil, sys
import yaml
here = pathlib.Path(sys.argv[0]).parent
top = argparse.ArgumentParser()
commands = top.add_subparsers(dest="do", required=True)
apply = commands.add_parser("apply")
for name in ("-y", "-d", "--spot"):
    apply.add_argument(name, action="store_true")
apply.add_argument("-f")
run = commands.add_parser("run").add_subparsers(dest="what", required=True).add_parser("get")
run.add_argument("name")
run.add_argument("--json", action="store_true", required=True)
commands.add_parser("logs").add_argument("name")
stop = commands.add_parser("stop")
stop.add_argument("-y", action="store_true")
stop.add_argument("name")
given, state = top.parse_args(), here / "state"
if given.do == "apply":
    shutil.copy(given.f, here / "task")
    state.write_text("running")
elif given.do == "run":
    if not state.exists():
        print(f"Run {given.name} not found")
        sys.exit(1)
    place = {"hostname": "203.0.113.7", "ssh_port": 22, "username": "ubuntu", "dockerized": True}
    place["instance_type"] = {"resources": {"gpus": [{"name": "H100"}] * 8}}
    job = {"job_provisioning_data": place, "termination_reason": None}
    if (here / "none").exists():
        job = {"job_provisioning_data": None, "termination_reason": "failed_to_start_due_to_no_capacity"}
    print(json.dumps({"status": state.read_text(), "latest_job_submission": job}, indent=2))
elif given.do == "logs":
    print("KEY root@machine")
else:
    state.write_text("terminated")
"""


class Tool:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def ask(self, do: str, *words: str, **request: Any) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, "include/scripts/rent_with.py", self.name, do, *words],
            input=json.dumps({**NEEDS, **request}),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PATH": path, "FASTCPT_HOME": str(self.folder / "home")},
        )

    def answer(self, do: str, *words: str, **request: Any) -> dict[str, Any]:
        done = self.ask(do, *words, **request)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout or "{}")
        return found


@pytest.fixture
def tool(tmp_path: Path, request: pytest.FixtureRequest) -> Tool:
    for name, text in (("sky", SKY), ("dstack", DSTACK)):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\n{text.replace('KEY', KEY)}")
        program.chmod(0o755)
    ssh = tmp_path / "ssh"  # as SkyPilot's lines in ~/.ssh/config make it
    ssh.write_text(
        "#!/bin/sh\nprintf 'host %s\\nhostname 203.0.113.7\\nport 22\\nuser ubuntu\\n' $2\n"
    )
    ssh.chmod(0o755)
    return Tool(tmp_path, request.param)


@pytest.mark.parametrize("tool", ["skypilot", "dstack"], indirect=True)
def test_a_machine_is_rented_found_again_and_given_back(tool: Tool) -> None:
    assert tool.answer("status", id=None) == {"machines": []}
    spot = {"skypilot": "--use-spot", "dstack": "--spot"}[tool.name]
    machine = tool.answer("acquire", "--price", "24", spot)
    own = {"host": "203.0.113.7", "port": 22, "user": "ubuntu", "host_key": KEY, "gpus": 8}
    assert machine == {
        **own,
        "id": machine["id"],
        "price_per_hour": 24.0,
        "release_command": ["sudo", "-n", "shutdown", "-h", "now"],
    }
    task = yaml.safe_load((tool.folder / "task").read_text())
    if tool.name == "skypilot":
        # what the run needs, and 100 GB for the system
        wanted = {"accelerators": "H100:8", "max_hourly_cost": 24.0, "disk_size": 150}
        assert task["resources"] == wanted
    else:
        assert task["resources"] == {"gpu": "H100:8", "disk": "150GB.."}
        assert (task["max_price"], task["idle_duration"]) == (24.0, 0)
        assert len(task["name"]) <= 41
    (tool.folder / "task").unlink()
    assert tool.answer("acquire", "--price", "24", spot) == machine
    assert not (tool.folder / "task").exists()
    assert tool.answer("status", id=machine["id"]) == {"machines": [machine["id"]]}
    tool.answer("release", id=None)
    assert tool.answer("status", id=machine["id"]) == {"machines": []}
    tool.answer("release", id=machine["id"])


@pytest.mark.parametrize("tool", ["skypilot", "dstack"], indirect=True)
def test_no_capacity_has_its_exit_code(tool: Tool) -> None:
    (tool.folder / "none").touch()
    assert tool.ask("acquire", "--price", "24").returncode == 75


@pytest.mark.parametrize("tool", ["ssh"], indirect=True)
def test_a_host_that_is_always_there_is_taken_and_let_go(tool: Tool) -> None:
    words = ["--host", "gpu1", "--user", "me", "--host-key", KEY, "--gpus", "8"]
    machine = tool.answer("acquire", *words)
    own = {"id": "gpu1", "host": "gpu1", "port": 22, "user": "me", "host_key": KEY, "gpus": 8}
    assert machine == {**own, "price_per_hour": 0.0}
    assert tool.answer("status", id="gpu1") == {"machines": ["gpu1"]}
    tool.answer("release", id="gpu1")
    assert tool.answer("status", id="gpu1") == {"machines": []}


@pytest.mark.parametrize("tool", ["skypilot"], indirect=True)
def test_a_tool_that_is_not_there_is_named(tool: Tool) -> None:
    (tool.folder / "sky").unlink()
    done = tool.ask("status", id=None)
    assert done.returncode == 1
    assert "sky is not installed on this machine" in done.stderr
