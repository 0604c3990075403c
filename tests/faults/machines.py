"""Hosts that can be rebooted and disconnected, and a training that logs what happens to it.

A host is an OpenSSH server in namespaces of its own: processes, network, and a boot id of its
own, so that killing it is what a reboot is to those that depend on it. Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local_sshd
import pytest

import remote_job
from fastcpt.cluster.remote import Remote

REPOSITORY = Path(__file__).resolve().parents[2]

# A training stand-in: counts steps, saves every fifth, goes on from the last one saved, waits where
# it is held, and tells when another one runs at the same time.
TRAINER = """
import fcntl, json, os, sys, time
folder, steps, pace = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
def add(name, text):
    with open(os.path.join(folder, name), "a") as file:
        file.write(text + "\\n")
gpu = open(os.path.join(folder, "gpu"), "w")
try:
    fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    add("twice", "two trainings at once")
saved = os.path.join(folder, "checkpoint")
at = int(open(saved).read()) if os.path.exists(saved) else 0
add("starts", str(at))
add("pids", str(os.getpid()))
for step in range(at + 1, steps + 1):
    while os.path.exists(os.path.join(folder, "hold-%d" % step)):
        time.sleep(0.05)
    time.sleep(pace)
    print("step", step, flush=True)
    add("steps", str(step))
    if step % 5 == 0:
        with open(saved + ".new", "w") as file:
            file.write(str(step))
        os.replace(saved + ".new", saved)
with open(os.path.join(folder, "result.json.new"), "w") as file:
    json.dump({"steps": steps}, file)
os.replace(file.name, os.path.join(folder, "result.json"))
"""

# Each rank tells who it is, meets the others at the first host, and then works on.
RANK = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
store = TCPStore(address, port, size, rank == 0, timedelta(seconds=300))
def all_are(what):
    store.add(what, 1)
    while (rank == 0 or what == "there") and int(store.add(what, 0)) < size:
        time.sleep(0.05)
all_are("there")
all_are("met")  # the store ends with rank 0: not before the others have seen that all are there
line = f"rank {rank} of {size} at {address} {os.environ['NOTE']}\\n"
os.write(1, line.encode())  # in one piece: ranks share the pipe
beat = os.path.join(sys.argv[-1], "beat-%d" % rank)
for number in range(int(os.environ["BEATS"])):
    open(beat, "a").write(".")
    time.sleep(0.2)
    if os.environ.get("FAILS") and rank == 3:
        sys.exit(5)
"""


class Training:
    """What a stand-in for a training has left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer.py").write_text(TRAINER)

    def command(self, steps: int, pace: float) -> list[str]:
        program = str(self.folder / "trainer.py")
        return ["python3", program, str(self.folder), str(steps), str(pace)]

    @property
    def result(self) -> str:
        return str(self.folder / "result.json")

    def numbers(self, name: str) -> list[int]:
        file = self.folder / name
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        eventually(lambda: max(self.numbers("steps"), default=0) >= step, seconds)

    def hold(self, step: int) -> None:
        """Let the training wait before ``step`` until it is released: what a test does then is in time."""
        (self.folder / f"hold-{step}").touch()

    def release(self) -> None:
        for file in self.folder.glob("hold-*"):
            file.unlink()

    @property
    def checkpoint(self) -> int:
        """The step that was saved last."""
        file = self.folder / "checkpoint"
        return int(file.read_text()) if file.exists() else 0

    def wait_until_shown(self, seconds: float = 180) -> None:
        """A trigger watches the job: it has shown, and acknowledged, all that the job has written."""
        jobs = self.folder.parent / "cluster" / "jobs"

        def shown() -> bool:
            logs = [log for log in jobs.glob("*/job.log") if log.stat().st_size]
            return bool(logs) and all(
                (log.parent / "seen").read_text() == str(log.stat().st_size) for log in logs
            )

        eventually(shown, seconds)

    @property
    def never_twice(self) -> bool:
        return not (self.folder / "twice").exists()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(holds: Callable[[], Any], seconds: float, pause: float = 0.2) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s")


def sshd_sessions(port: int) -> list[int]:
    """The processes of a server that hold a connection to ``port`` on the loopback."""
    wanted = f":{port:04X}"
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(wanted):
            inodes.add(f"socket:[{fields[9]}]")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                links = {os.readlink(descriptor) for descriptor in (entry / "fd").iterdir()}
                if links & inodes:
                    found.append(int(entry.name))
    return found


_numbers = itertools.count(1)


class Host:
    """A machine: an SSH server with processes, network and boot id of its own."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid() % 200 * 100 + next(_numbers)
        self.folder, self.namespace = folder, f"fastcpt{number}"
        self.link, far = f"fch{number}", f"fcg{number}"
        subnet = f"10.{200 + number // 250 % 50}.{number % 250}"
        self.address = f"{subnet}.2"
        made = subprocess.run(
            ["ip", "netns", "add", self.namespace], capture_output=True, text=True
        )
        if made.returncode:
            needs = "a host of its own needs root and network namespaces"
            pytest.fail(f"{needs}: {made.stderr.strip()}", pytrace=False)
        self._call("ip", "link", "add", self.link, "type", "veth", "peer", "name", far)
        self._call("ip", "link", "set", far, "netns", self.namespace)
        self._call("ip", "addr", "add", f"{subnet}.1/24", "dev", self.link)
        self._call("ip", "link", "set", self.link, "up")
        inside = ("ip", "netns", "exec", self.namespace, "ip")
        self._call(*inside, "addr", "add", f"{self.address}/24", "dev", far)
        self._call(*inside, "link", "set", far, "up")
        self._call(*inside, "link", "set", "lo", "up")
        self.boot()

    @staticmethod
    def _call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def boot(self) -> None:
        """Start the machine, with a new boot id."""
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        mount = f"mount --bind {self.folder}/boot_id /proc/sys/kernel/random/boot_id"
        machine = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.facts = local_sshd.start_server(
            self.folder / "sshd",
            address=self.address,
            port=2222,
            inside=[
                *("ip", "netns", "exec", self.namespace),
                *machine,
                *("bash", "-c", f'{mount} && "$@" & wait', "init"),
            ],
        )

    def power_off(self) -> None:
        """Every process of it is gone at once."""
        os.killpg(self.facts["pid"], signal.SIGKILL)
        os.waitpid(self.facts["pid"], 0)

    def cut(self) -> None:
        """Packets vanish in both directions; nothing is closed."""
        self._call("ip", "link", "set", self.link, "down")

    def join(self) -> None:
        self._call("ip", "link", "set", self.link, "up")

    @property
    def remote(self) -> Remote:
        facts = self.facts
        return Remote(
            facts["host"], facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
        )

    def away(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            self.power_off()
        self._call("ip", "netns", "del", self.namespace)


def remote_of(facts: dict[str, Any]) -> Remote:
    return Remote(
        facts["host"], facts["user"], facts["port"], facts["key_file"], facts["known_hosts"]
    )


class Watch:
    """A trigger as Airflow's triggerer runs it, in a thread of its own, and the lines it logs."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        to: Remote,
        root: Path,
        name: str,
        bring: dict[str, Any] | None = None,
    ) -> None:
        monkeypatch.setattr(remote_job, "remote_of", lambda connection: to)
        trigger = remote_job.RemoteJobTrigger("cluster", str(root), name, "one", bring=bring)
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.event: dict[str, Any] = {}
        logger = logging.Logger("watch")
        logger.handle = self._keep  # type: ignore[method-assign]
        trigger._log = logger

        async def first() -> None:
            async for event in trigger.run():
                self.event = event.payload

        self.thread = threading.Thread(target=lambda: asyncio.run(first()), daemon=True)
        self.thread.start()

    def _keep(self, record: logging.LogRecord) -> None:
        kept = self.lines if record.levelno < logging.WARNING else self.warnings
        kept.append(record.getMessage())

    def wait(self, seconds: float) -> dict[str, Any]:
        self.thread.join(seconds)
        assert self.event, (
            f"nothing after {seconds} s; {len(self.lines)} lines, {self.warnings[-3:]}"
        )
        return self.event

    @property
    def steps(self) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.startswith("step ")]


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.append(child)
            waiting.append(child)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
