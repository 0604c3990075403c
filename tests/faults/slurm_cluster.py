"""A Slurm cluster on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import local_sshd
import pytest

from fastcpt.cluster.remote import Remote
from faults.machines import eventually, free_port, remote_of


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
        self.login = local_sshd.start_server(
            folder / "sshd", {"SLURM_CONF": str(self.configuration)}
        )

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
