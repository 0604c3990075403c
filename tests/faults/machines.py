"""Hosts that can be rebooted and cut off, and an Airflow whose processes can be killed one by one.

A host is an OpenSSH server in namespaces of its own: processes, network, and a boot id of its
own, so that killing it is what a reboot is to those that depend on it. Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import local_sshd
import pytest

import remote_job
from fastcpt.cluster.remote import Remote
from stack_module import load_local_stack

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
        self.facts = local_sshd.start(
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, to: Remote, root: Path, name: str) -> None:
        monkeypatch.setattr(remote_job, "remote_of", lambda connection: to)
        trigger = remote_job.RemoteJobTrigger("cluster", str(root), name, "one")
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


# Airflow

# a process that is gone is missed within seconds, not minutes
SEEN_SOON = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "3",
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
}
SECRET = "hf_" + "k7" * 20
DAGS = '''
import os, time
from datetime import timedelta
from airflow.sdk import dag
from remote_job import RemoteJob, RemoteJobOperator
from steps.cluster import secrets

def job(context):
    conf = context["dag_run"].conf
    return RemoteJob(
        conf.get("connection", "local_cluster"), conf["root"], conf["commands"],
        result=conf["result"],
    )

class DiesBeforeItWaits(RemoteJobOperator):
    """Gives a test the time to kill the worker between starting the job and waiting for it."""
    def defer(self, **options):
        note = os.path.join(os.path.dirname(self.result), "worker")
        if not os.path.exists(note):
            with open(note + ".new", "w") as file:
                file.write(f"{os.getpid()} {os.getppid()}")
            os.rename(note + ".new", note)
            time.sleep(300)
        super().defer(**options)
    def execute(self, context):
        self.result = context["dag_run"].conf["result"]
        return super().execute(context)

def one(dag_id, operator=RemoteJobOperator, **options):
    @dag(dag_id=dag_id, schedule=None, max_active_runs=16)
    def build():
        operator(task_id="train", job=job, secrets=secrets, retries=3,
                 retry_delay=timedelta(seconds=2), **options)
    return build()

one("training", in_turn=True)
one("anywhere")
one("timed", execution_timeout=timedelta(seconds=30))
one("interrupted", DiesBeforeItWaits)
'''


class Airflow:
    """The four processes on SQLite, each of which can be killed and started again."""

    names = ("api-server", "scheduler", "dag-processor", "triggerer")

    def __init__(self, home: Path, cluster: dict[str, Any]) -> None:
        stack = load_local_stack(home)
        self.home, self.stack = home, stack
        (home / "dags").mkdir(parents=True)
        (home / "logs").mkdir()
        (home / "dags" / "faults.py").write_text(DAGS)
        (home / "passwords.json").write_text(json.dumps({"admin": "admin"}))
        self.url = f"http://127.0.0.1:{(port := stack.free_port())}"
        self.settings = stack.environment(cluster, port) | {
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW_VAR_HF_TOKEN": SECRET,
            **SEEN_SOON,
        }
        self.program = str(REPOSITORY / ".env/airflow/bin/airflow")
        subprocess.run(
            [self.program, "db", "migrate"], env=self.settings, check=True, capture_output=True
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in self.names:
            self.start(name)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        eventually(self._ready, 400, 0.5)

    def _ready(self) -> bool:
        try:
            health = self.client.get("/api/v2/monitor/health").json()
            if any(
                health[part]["status"] != "healthy"
                for part in ("scheduler", "triggerer", "dag_processor")
            ):
                return False
            answer = self.client.post(
                "/auth/token", json={"username": "admin", "password": "admin"}
            )
            self.client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
            return bool(self.client.get("/api/v2/dags/interrupted").status_code == 200)
        except (httpx.HTTPError, KeyError):
            return False

    def start(self, name: str) -> None:
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self.program, name],
                env=self.settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
            )

    def kill(self, name: str) -> None:
        """SIGKILL to the process and all that it started: the machine it ran on is gone."""
        process = self.processes[name]
        for pid in [process.pid, *_descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            time.sleep(3 if number == signal.SIGTERM else 0)
        for process in self.processes.values():
            process.wait()
        self.client.close()

    def trigger(self, dag: str, conf: dict[str, Any]) -> Run:
        answer = self.client.post(
            f"/api/v2/dags/{dag}/dagRuns", json={"logical_date": None, "conf": conf}
        )
        answer.raise_for_status()
        return Run(self, dag, answer.json()["dag_run_id"])

    def connect(self, name: str, facts: dict[str, Any]) -> None:
        """Add a connection to a host, as an administrator does in the UI."""
        extra = {key: facts[key] for key in ("key_file", "known_hosts")}
        answer = self.client.post(
            "/api/v2/connections",
            json={
                "connection_id": name,
                "conn_type": "ssh",
                "host": facts["host"],
                "login": facts["user"],
                "port": facts["port"],
                "extra": json.dumps(extra),
            },
        )
        answer.raise_for_status()

    def train(
        self, dag: str, training: Training, steps: int, pace: float = 0.5, **conf: Any
    ) -> Run:
        """Trigger a DAG that runs the stand-in for a training on the cluster."""
        commands = [training.command(steps, pace)]
        root = str(conf.pop("root", training.folder.parent / "cluster"))
        values = {"root": root, "commands": commands, "result": training.result}
        return self.trigger(dag, {**values, **conf})


class Run:
    def __init__(self, airflow: Airflow, dag: str, run: str) -> None:
        self.airflow, self.run = airflow, run
        self.path = f"/api/v2/dags/{dag}/dagRuns/{run}"
        self.dag = dag

    @property
    def task(self) -> dict[str, Any]:
        answer = self.airflow.client.get(f"{self.path}/taskInstances/train")
        answer.raise_for_status()
        return dict(answer.json())

    def wait(self, *states: str, seconds: float = 300) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):
                task = self.task
                if task["state"] in states:
                    return task
            time.sleep(0.5)
        raise AssertionError(f"the task is {self.task['state']}, wanted {states}:\n{self.log()}")

    def log(self, attempt: int | None = None) -> list[str]:
        attempt = attempt or self.task["try_number"]
        answer = self.airflow.client.get(
            f"{self.path}/taskInstances/train/logs/{attempt}",
            params={"full_content": True},
            headers={"Accept": "application/json"},
        )
        if answer.status_code != 200:
            return []
        lines = []
        for event in answer.json()["content"]:
            lines.append(str(event.get("event", event)))
            lines += [str(detail["exc_value"]) for detail in event.get("error_detail") or []]
        return lines

    def steps_in_log(self, attempt: int | None = None) -> list[int]:
        lines = self.log(attempt)
        return [int(line.split()[1]) for line in lines if line.startswith("step ")]

    def mark_failed(self) -> None:
        answer = self.airflow.client.patch(
            f"{self.path}/taskInstances/train", json={"new_state": "failed"}
        )
        answer.raise_for_status()

    def clear(self) -> None:
        answer = self.airflow.client.post(
            f"/api/v2/dags/{self.dag}/clearTaskInstances",
            json={
                "dry_run": False,
                "dag_run_id": self.run,
                "task_ids": ["train"],
                "only_failed": False,
                "only_running": False,
            },
        )
        answer.raise_for_status()

    def delete(self) -> None:
        """As the UI does it: Airflow deletes no run that goes on, so its state is set first."""
        self.airflow.client.patch(self.path, json={"state": "failed"}).raise_for_status()
        self.airflow.client.delete(self.path).raise_for_status()


def _descendants(pid: int) -> list[int]:
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


class Slurm:
    """A Slurm cluster of two nodes on this machine, and an SSH server as its login host."""

    def __init__(self, folder: Path) -> None:
        if os.getuid() or not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"):
            pytest.fail("Slurm needs root and the packages slurm-wlm and munge", pytrace=False)
        self.folder = folder
        folder.mkdir(mode=0o700)
        for name in ("state", "spool/127.0.0.1", "spool/127.0.0.2"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        here = socket.gethostname().partition(".")[0]
        # a socket's name must be short
        self.sockets = Path(tempfile.mkdtemp(prefix="munge-"))
        ports = [free_port() for _ in range(3)]
        settings = {
            "ClusterName": "fastcpt",
            "SlurmctldHost": f"{here}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.sockets}/munge",
            "SlurmctldPort": ports[0],
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": f"{folder}/%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "JobAcctGatherType": "jobacct_gather/none",
            "ReturnToService": 2,
            "KillWait": 10,
            "OverTimeLimit": 0,
            "SchedulerParameters": "sched_interval=2,batch_sched_delay=0",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName=127.0.0.1,127.0.0.2 NodeHostname={here} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} "
            "CPUs=1 State=UNKNOWN",
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text("\n".join(lines) + "\n")
        self.processes = [
            self._start("munged", "--foreground", "--force", *self._munge()),
        ]
        eventually((self.sockets / "munge").exists, 60)
        self.start_controller()
        self.processes += [
            self._start("slurmd", "-D", "-f", str(self.configuration), "-N", "127.0.0.1"),
            self._start("slurmd", "-D", "-f", str(self.configuration), "-N", "127.0.0.2"),
        ]
        eventually(lambda: "idle" in self.call("sinfo", "-h", "-o", "%T"), 180)
        self.login = local_sshd.start(folder / "sshd", {"SLURM_CONF": str(self.configuration)})

    def _munge(self) -> list[str]:
        names = {"key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.folder}/{file}" for name, file in names.items()]
        return [*options, f"--seed-file={self.folder}/seed", f"--socket={self.sockets}/munge"]

    @staticmethod
    def _start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def start_controller(self) -> None:
        self.controller = self._start("slurmctld", "-D", "-f", str(self.configuration))

    def end_controller(self) -> None:
        self.controller.terminate()
        self.controller.wait(120)

    def call(self, *command: str) -> str:
        settings = {**os.environ, "SLURM_CONF": str(self.configuration)}
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        return done.stdout + done.stderr

    @property
    def remote(self) -> Remote:
        return remote_of(self.login)

    def end(self) -> None:
        self.call("scancel", "--user=root")
        time.sleep(1)
        os.killpg(self.login["pid"], signal.SIGTERM)
        os.waitpid(self.login["pid"], 0)
        for process in [self.controller, *reversed(self.processes)]:
            process.terminate()
            process.wait(120)
        shutil.rmtree(self.sockets)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
