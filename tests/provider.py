"""A provider of machines for the tests: real sshd hosts with their own processes, billed by the second.

    provider.py FOLDER acquire|release|status
    provider.py FOLDER end ID       what a machine's own shutdown is

FOLDER has what the provider knows: ``machines/<id>/machine.json`` with what was billed, the one key that
its machines let in (``client_key``), and ``faults.json``, what goes wrong next:
{"acquire": ["no capacity", ...], "release": [...], "status": [...]}, one fault a call, first come; "" is
none. While there is a file ``down``, the service answers nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "include"), str(ROOT / "include" / "scripts")]

import local_sshd  # noqa: E402

from fastcpt.files import read_json, write_json  # noqa: E402

# every process of a machine carries it
MARK = "FASTCPT_TEST_MACHINE"
PRICE = 36.0  # USD an hour: a cent a second
LATE_S = 3.0
MEMORY_MIB = {"NVIDIA H100 80GB HBM3": 81559, "NVIDIA H200": 143771}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def create(folder: Path) -> Path:
    """A provider without machines or faults."""
    (folder / "machines").mkdir(parents=True)
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "client_key")]
    subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
    return folder


def commands(folder: Path) -> dict[str, list[str]]:
    """What a recipe's ``cluster.rent`` has of this provider."""
    program = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    return {do: [*program, do] for do in ("acquire", "release", "status")}


def fail(folder: Path, **faults: list[str]) -> None:
    """What goes wrong next, by command."""
    with _locked(folder):
        write_json(folder / "faults.json", faults)


def machines(folder: Path, running: bool | None = None) -> list[dict[str, Any]]:
    """What the provider has rented out, the oldest first; ``running``: only those that are, or are not."""
    found = [read_json(file) for file in (folder / "machines").glob("*/machine.json")]
    found = [one for one in found if running is None or (one["ended"] is None) == running]
    return sorted(found, key=lambda one: float(one["began"]))


def bill(folder: Path, now: float) -> float:
    """USD of all machines, by the second, from the moment each was begun to its end."""
    return cost(machines(folder), now)


def cost(rented: list[dict[str, Any]], now: float) -> float:
    """USD of these machines."""
    return sum((one["ended"] or now) - one["began"] for one in rented) / 3600 * PRICE


def end(folder: Path, machine_id: str) -> None:
    """The machine is gone: by a release, or taken away without a warning."""
    file = folder / "machines" / machine_id / "machine.json"
    machine = read_json(file)
    if machine["ended"] is None:
        write_json(file, {**machine, "ended": time.time()})
    until = time.monotonic() + 20
    while left := processes(machine):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert time.monotonic() < until, left
        time.sleep(0.05)


def processes(machine: dict[str, Any]) -> list[int]:
    """What runs on a machine: all that carries its mark, its sshd, and that one's children.

    An sshd and its sessions wrote their titles over the mark.
    """
    place = str(machine["place"]).encode()
    mark = MARK.encode() + b"=" + place + b"\0"
    found: list[int] = []
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            title = (folder / "cmdline").read_bytes()
            of_sshd = title.startswith(b"sshd: ") and place + b"/sshd_config" in title
            if of_sshd or mark in (folder / "environ").read_bytes() + b"\0":
                found.append(int(folder.name))
            children.setdefault(int(_stat(folder)[1]), []).append(int(folder.name))
    for process in found:  # which grows meanwhile
        found += [child for child in children.get(process, []) if child not in found]
    return [process for process in found if process != os.getpid() and _lives(process)]


def _stat(folder: Path) -> list[str]:
    """State and parent of a process, from behind its name."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _lives(process: int) -> bool:
    with suppress(OSError):
        return _stat(Path(f"/proc/{process}"))[0] != "Z"
    return False


def _fault(folder: Path, do: str) -> str:
    file = folder / "faults.json"
    faults = read_json(file) if file.exists() else {}
    queue = faults.get(do) or []
    if not queue:
        return ""
    write_json(file, {**faults, do: queue[1:]})
    return str(queue[0])


def _gpus(place: Path, count: int, name: str) -> str:
    """A PATH on which nvidia-smi shows so many GPUs of this name."""
    (place / "bin").mkdir()
    program = place / "bin" / "nvidia-smi"
    line = f"echo '{name}, {MEMORY_MIB[name]}, 570.1'\n"
    program.write_text("#!/bin/sh\n" + line * count)
    program.chmod(0o755)
    return f"{place}/bin:{os.environ['PATH']}"


def _start(folder: Path, key: str, needs: dict[str, Any], fault: str = "") -> dict[str, Any]:
    number = len(list((folder / "machines").iterdir())) + 1
    machine_id = f"m{number}"
    place, began = folder / "machines" / machine_id, time.time()
    place.mkdir(mode=0o700)
    facts = {"id": machine_id, "key": key, "began": began, "ended": None, "needs": needs}
    facts["place"] = str(place)
    write_json(place / "machine.json", facts)
    for name in ("client_key", "client_key.pub"):
        (place / name).write_bytes((folder / name).read_bytes())
        (place / name).chmod(0o600)
    (place / "home").mkdir()
    gpus = needs["gpus"] // 2 if fault == "half the GPUs" else needs["gpus"]
    name = "NVIDIA H200" if fault == "other GPUs" else "NVIDIA H100 80GB HBM3"
    home = {MARK: str(place), "HOME": str(place / "home")}
    server = local_sshd.start_server(
        place, home | ({"PATH": _gpus(place, gpus, name)} if gpus else {})
    )
    kind, text = (place / "host_key.pub").read_text().split()[:2]
    answer = {name: server[name] for name in ("host", "port", "user")}
    answer |= {"id": machine_id, "host_key": f"{kind} {text}"}
    answer |= {"price_per_hour": PRICE, "gpus": gpus}
    # without the mark: it outlives the machine that it ends
    unmarked = ["env", "-u", MARK, sys.executable, str(Path(__file__).resolve())]
    answer["release_command"] = [*unmarked, str(folder), "end", machine_id]
    if fault == "half started":
        os.killpg(server["pid"], signal.SIGKILL)
    write_json(place / "machine.json", {**facts, "answer": answer})
    return answer


def acquire(folder: Path, request: dict[str, Any], fault: str) -> dict[str, Any]:
    if fault == "no capacity":
        print("no such GPU is free in any zone", file=sys.stderr)
        sys.exit(75)
    mine = [one for one in machines(folder, running=True) if one["key"] == request["key"]]
    answer: dict[str, Any] = (
        mine[0]["answer"] if mine else _start(folder, request["key"], request, fault)
    )
    if fault == "twice":
        _start(folder, request["key"], request)
    if fault == "late":
        time.sleep(LATE_S)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "another key":
        other = (folder / "client_key.pub").read_text().split()[:2]
        answer = {**answer, "host_key": " ".join(other)}
    if fault == "garbage":
        answer = {"id": answer["id"], "host": "-oProxyCommand=touch pwned", "port": "many"}
    return answer


def release(folder: Path, request: dict[str, Any], fault: str) -> dict[str, Any]:
    for machine in machines(folder, running=True):
        asked = machine["key"] == request["key"] and request["id"] in (None, machine["id"])
        if asked and fault != "lies":
            end(folder, machine["id"])
    return {}


def status(folder: Path, request: dict[str, Any], fault: str) -> dict[str, Any]:
    found = machines(folder, running=True)
    return {"machines": [one["id"] for one in found if one["key"] == request["key"]]}


def main(folder: Path, do: str) -> None:
    request = json.load(sys.stdin)
    with _locked(folder):
        fault = "API down" if (folder / "down").exists() else _fault(folder, do)
        if fault == "API down":
            print("503 Service Unavailable", file=sys.stderr)
            sys.exit(1)
        print(
            json.dumps(
                {"acquire": acquire, "release": release, "status": status}[do](
                    folder, request, fault
                )
            )
        )


if __name__ == "__main__":
    if sys.argv[2] == "end":
        end(Path(sys.argv[1]), sys.argv[3])
    else:
        main(Path(sys.argv[1]), sys.argv[2])
