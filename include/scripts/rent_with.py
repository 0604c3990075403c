"""Rent a machine with SkyPilot or dstack, or take a host that is always there: a recipe's `cluster.rent` (docs/rent.md).

    rent_with.py skypilot acquire --price 24 [more words for `sky launch`]
    rent_with.py dstack acquire --price 24 [more words for `dstack apply`]
    rent_with.py ssh acquire --price 0 --host HOST --user USER --host-key "ssh-ed25519 AAAA..." --gpus 8
    rent_with.py TOOL release|status

The request comes as JSON on stdin, the answer goes to stdout, what the tools print to stderr. ``--price``
(USD per hour, for the whole machine) is the most that the tool may pay, and the price that is counted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.files import HOME, digest_of

NO_CAPACITY = 75
KEY_S, POLL_S = 900.0, 10.0  # a machine shows its key after its first commands
HOST_KEY = re.compile(r"(?:ssh-ed25519|ecdsa-sha2-\S+|ssh-rsa) [A-Za-z0-9+/]{40,}={0,2}")
SHUTDOWN = ["sudo", "-n", "shutdown", "-h", "now"]
Answer = dict[str, Any]


def run_tool(*words: str, may_fail: bool = False) -> tuple[int, str]:
    """Exit code and output of a tool. If it fails, this program ends with the tool's message."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        sys.exit(f"{words[0]} is not installed on this machine, or not in Airflow's PATH")
    if done.returncode and not may_fail:
        sys.exit(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stdout[-1500:]}")
    return done.returncode, done.stdout


def json_in(text: str, opens: str) -> Any:
    """The JSON in a tool's output, which may begin with other lines."""
    start = text.find(opens)
    if start < 0:
        sys.exit(f"no JSON in what the tool printed: {text[-500:]}")
    return json.JSONDecoder().raw_decode(text[start:])[0]


def launched(words: Sequence[str], task: Answer, none_free: str) -> None:
    """Start a task from a file. Exits with 75 if the output matches ``none_free``: no machine is available."""
    with tempfile.NamedTemporaryFile("w", suffix=".dstack.yml") as file:
        yaml.safe_dump(task, file)
        file.flush()
        code, said = run_tool(*(word.replace("TASK", file.name) for word in words), may_fail=True)
    if code:
        print(said[-1500:], file=sys.stderr)
        sys.exit(NO_CAPACITY if re.search(none_free, said) else 1)


def shown_key(*words: str) -> str:
    """The host key that the task printed. It comes through the tool, not from our first connection to the host."""
    until = time.monotonic() + KEY_S
    while time.monotonic() < until:
        if found := HOST_KEY.search(run_tool(*words, may_fail=True)[1]):
            return found[0]
        time.sleep(POLL_S)
    sys.exit(f"{' '.join(words)} has shown no host key in {KEY_S:.0f} s")


class SkyPilot:
    """A cluster of one machine, named by the request's key. https://docs.skypilot.co/en/stable/reference/cli.html"""

    def acquire(self, request: Answer, given: argparse.Namespace) -> Answer:
        key = request["key"]
        if self._state(key).get("status") != "UP":
            resources = {"max_hourly_cost": given.price, "disk_size": _disk(request)}
            if request["gpus"]:
                resources["accelerators"] = _gpus(request)
            task = {"resources": resources, "run": "cat /etc/ssh/ssh_host_ed25519_key.pub"}
            words = ["sky", "launch", "-y", "-d", "-c", key, *given.more, "TASK"]
            launched(
                words, task, "ResourcesUnavailable|no resource|Failed to provision|not satisfy"
            )
        state = self._state(key)
        settings = dict(
            line.split(" ", 1) for line in run_tool("ssh", "-G", key)[1].splitlines() if " " in line
        )
        gpus = re.search(r":\s*(\d+)", state.get("accelerators") or "")
        return {
            "id": key,
            "host": settings["hostname"],
            "port": int(settings["port"]),
            "user": settings["user"],
            "host_key": shown_key("sky", "logs", key, "1", "--no-follow"),
            "gpus": int(gpus[1]) if gpus else 0,
            "release_command": SHUTDOWN,
        }

    def release(self, request: Answer) -> None:
        if self._state(request["key"]):
            run_tool("sky", "down", "-y", request["key"])

    def status(self, request: Answer) -> list[str]:
        # a stopped machine still costs its disk
        return [request["key"]] if self._state(request["key"]) else []

    def _state(self, key: str) -> Answer:
        """The cluster's state in the cloud; empty if there is none."""
        found = json_in(run_tool("sky", "status", "--refresh", "-o", "json", key)[1], "[")
        return next((one for one in found if one["name"] == key), {})


class Dstack:
    """A task that holds a machine of a VM backend or an SSH fleet. https://dstack.ai/docs/reference/cli/dstack/apply"""

    def acquire(self, request: Answer, given: argparse.Namespace) -> Answer:
        name = self._name(request)
        if not self.status(request):
            resources: Answer = {"disk": f"{_disk(request)}GB.."}
            if request["gpus"]:
                resources["gpu"] = _gpus(request)
            task = {
                "type": "task",
                "name": name,
                # the machine's key, not the container's
                "volumes": [{"instance_path": "/etc/ssh", "path": "/host-ssh"}],
                "commands": ["cat /host-ssh/ssh_host_ed25519_key.pub", "sleep infinity"],
                "resources": resources,
                "max_price": given.price,
                "idle_duration": 0,
            }
            words = ["dstack", "apply", "-y", "-d", *given.more, "-f", "TASK"]
            launched(words, task, "[Nn]o (matching )?(offers|fleets|capacity)")
        place = self._place(name)
        if not place["dockerized"]:
            sys.exit("the machine is a container of its backend: name a VM backend (--backend)")
        return {
            "id": name,
            "host": place["hostname"],
            "port": place["ssh_port"] or 22,
            "user": place["username"],
            "host_key": shown_key("dstack", "logs", name),
            "gpus": len(place["instance_type"]["resources"]["gpus"]),
            "release_command": SHUTDOWN,
        }

    def release(self, request: Answer) -> None:
        if self.status(request):
            run_tool("dstack", "stop", "-y", self._name(request))

    def status(self, request: Answer) -> list[str]:
        name = self._name(request)
        state = self._run(name).get("status", "failed")
        return [] if state in ("terminated", "failed", "done") else [name]

    def _place(self, name: str) -> Answer:
        """Where the task runs, once that is known. Exits with 75 if no machine was free."""
        until = time.monotonic() + KEY_S
        while time.monotonic() < until:
            found = self._run(name)
            job = found.get("latest_job_submission") or {}
            if job.get("termination_reason") == "failed_to_start_due_to_no_capacity":
                sys.exit(NO_CAPACITY)
            if found.get("status") == "running":
                place: Answer = job["job_provisioning_data"]
                return place
            time.sleep(POLL_S)
        sys.exit(f"{name} does not run after {KEY_S:.0f} s")

    def _run(self, name: str) -> Answer:
        code, said = run_tool("dstack", "run", "get", name, "--json", may_fail=True)
        if code and "not found" not in said:
            sys.exit(f"dstack run get ended with {code}: {said[-1500:]}")
        return {} if code else json_in(said, "{")

    def _name(self, request: Answer) -> str:
        # dstack's names have 41 characters at most
        return f"fast-cpt-{digest_of(request['key'])}"


class Ssh:
    """A host that is always there: it is not rented, only noted as taken."""

    def acquire(self, request: Answer, given: argparse.Namespace) -> Answer:
        note = self._note(request)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
        names = ("host", "port", "user", "host_key", "gpus")
        return {"id": given.host, **{name: getattr(given, name) for name in names}}

    def release(self, request: Answer) -> None:
        self._note(request).unlink(missing_ok=True)

    def status(self, request: Answer) -> list[str]:
        return [request["id"]] if self._note(request).exists() and request["id"] else []

    def _note(self, request: Answer) -> Path:
        return HOME / "rented" / f"{request['key']}.taken"


TOOLS: dict[str, SkyPilot | Dstack | Ssh] = {
    "skypilot": SkyPilot(),
    "dstack": Dstack(),
    "ssh": Ssh(),
}


def _gpus(request: Answer) -> str:
    if not request["gpu"]:
        sys.exit("cluster.gpu is empty: name the GPU to rent")
    return f"{request['gpu']}:{request['gpus']}"


def _disk(request: Answer) -> int:
    """GB for the run and the system."""
    return int(request["disk_gb"]) + 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("do", choices=("acquire", "release", "status"))
    parser.add_argument("--price", type=float, default=0.0)
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=22)
    parser.add_argument("--user", default="")
    parser.add_argument("--host-key", default="")
    parser.add_argument("--gpus", type=int, default=0)
    given, more = parser.parse_known_args()
    given.more = more
    tool, request = TOOLS[given.tool], json.load(sys.stdin)
    if given.do == "acquire":
        print(json.dumps({**tool.acquire(request, given), "price_per_hour": given.price}))
    elif given.do == "release":
        tool.release(request)
    else:
        print(json.dumps({"machines": tool.status(request)}))


if __name__ == "__main__":
    main()
