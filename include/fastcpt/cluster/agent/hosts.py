"""Runs one command on several hosts, over SSH or by srun, and ends it on all together."""

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import List

from fastcpt.cluster.agent.files import write_whole
from fastcpt.cluster.agent.processes import HEARTBEAT_S, end_group, signal_quietly
from fastcpt.cluster.agent.slurm import run_slurm
from fastcpt.exit_codes import CANNOT_HEAL, STOPPED

# A node ends its part when it has not heard from the first host for this long.
SILENCE_S = 60.0
SSH = [
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-o", "ConnectTimeout=20"),
    # a connection of its own: it ends with the job, so it must not be one that the user shares
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),
]


def on_hosts(gpus: int, hosts: List[str], command: List[str]) -> int:
    """Run ``command`` on this host and on ``hosts``; under Slurm, on the allocation's hosts instead.

    ``{node_rank}``, ``{master_addr}`` and ``{hostfile}`` in the command are filled in; the host file
    is DeepSpeed's. The hosts share the file system. The first failure ends all of them.
    """
    inside_slurm = "SLURM_JOB_ID" in os.environ
    if inside_slurm:
        listed = run_slurm(["scontrol", "show", "hostnames"], {}).stdout.decode().split()
        names, master = listed, listed[0]
    else:
        master = address_towards(hosts[0]) if hosts else "127.0.0.1"
        names = [master, *hosts]
    if gpus % len(names):
        print(f"ValueError: cluster.gpus ({gpus}) must be a multiple of the {len(names)} hosts")
        return CANNOT_HEAL
    hostfile = os.path.abspath("hostfile")
    slots = gpus // len(names)
    write_whole(hostfile, "".join(f"{name} slots={slots}\n" for name in names))
    values = {"{master_addr}": master, "{hostfile}": hostfile}
    command = [values.get(word, word) for word in command]
    here = [sys.executable, os.path.abspath(sys.argv[0]), "node"]
    if inside_slurm:
        srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", f"--ntasks={len(names)}"]
        return subprocess.call([*srun, *here, *command])
    return wait_for_nodes(
        [start_node(rank, host, command) for rank, host in enumerate(["", *hosts])]
    )


def start_node(rank: int, host: str, command: List[str]) -> "subprocess.Popen[bytes]":
    """Start the command on ``host``, or on this host if ``host`` is empty."""
    program = os.path.abspath(sys.argv[0])
    far = f"exec python3 {shlex.quote(program)} node"
    words = [*SSH, "--", host, far] if host else [sys.executable, program, "node"]
    node = subprocess.Popen(words, stdin=subprocess.PIPE)
    words = [str(rank) if word == "{node_rank}" else word for word in command]
    settings = {"cwd": os.getcwd(), "environment": dict(os.environ), "command": words}
    send_line(node, json.dumps(settings))
    return node


def wait_for_nodes(nodes: "List[subprocess.Popen[bytes]]") -> int:
    """Wait for all nodes; their exit code. The first failure, or SIGTERM here, ends the others."""
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.monotonic()))
    beat, code, told = time.monotonic(), 0, False
    while None in [node.poll() for node in nodes]:
        failed = [node.returncode for node in nodes if node.returncode]
        if (failed or ending) and not told:
            told, code = True, failed[0] if failed else STOPPED
            for node in nodes:
                hang_up(node)
        elif time.monotonic() - beat > HEARTBEAT_S and not told:
            beat = time.monotonic()
            for node in nodes:
                send_line(node, "alive")
        time.sleep(0.2)
    return code or next((node.returncode for node in nodes if node.returncode), 0)


def send_line(node: "subprocess.Popen[bytes]", line: str) -> None:
    try:
        assert node.stdin is not None
        node.stdin.write(line.encode() + b"\n")
        node.stdin.flush()
    except OSError:
        pass  # the node has ended: its exit code says why


def hang_up(node: "subprocess.Popen[bytes]") -> None:
    try:
        assert node.stdin is not None
        node.stdin.close()
    except OSError:
        pass


def node(command: List[str]) -> int:
    """One host's part of ``on_hosts``: ends when the connection ends or is silent for ``SILENCE_S``.

    Under srun the command is ``command``; over SSH it comes as settings in the first line.
    """
    if "SLURM_NODEID" in os.environ:
        rank = os.environ["SLURM_NODEID"]
        command = [rank if word == "{node_rank}" else word for word in command]
        os.execvp(command[0], command)
    settings = json.loads(sys.stdin.buffer.readline())
    # variables that describe the host and the login are not copied from the first host
    own = ("HOSTNAME", "SSH_CONNECTION", "SSH_CLIENT", "SSH_AUTH_SOCK", "SSH_TTY")
    environment = {key: value for key, value in settings["environment"].items() if key not in own}
    job = subprocess.Popen(
        settings["command"],
        stdin=subprocess.DEVNULL,
        cwd=settings["cwd"],
        env={**os.environ, **environment},
        start_new_session=True,
    )
    heard = time.monotonic()
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.monotonic()))
    while job.poll() is None:
        try:
            readable, _, _ = select.select([sys.stdin.buffer], [], [], 0.2)
        except InterruptedError:
            continue
        if readable:
            heard = time.monotonic()
            if not os.read(0, 65536):
                break
        if ending or time.monotonic() - heard > SILENCE_S:
            break
    if job.poll() is None:
        end_group(job)
        return STOPPED
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    return job.returncode if job.returncode >= 0 else 128 - job.returncode


def address_towards(host: str) -> str:
    """This host's address on its route to ``host`` (a name of the SSH configuration)."""
    known = subprocess.run(["ssh", "-G", "--", host], stdout=subprocess.PIPE, check=True)
    pairs = [line.split(" ", 1) for line in known.stdout.decode().splitlines() if " " in line]
    place = dict(reversed(pairs))["hostname"]
    family, kind, _, _, address = socket.getaddrinfo(place, 22, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
