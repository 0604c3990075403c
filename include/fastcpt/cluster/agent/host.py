"""Facts about the host."""

import json
import os
import shutil
import subprocess
import sys
from typing import Dict, List

from fastcpt.cluster.agent.files import Answer, expand, write_whole
from fastcpt.cluster.agent.processes import boot_id


def check(root: str) -> Answer:
    """The host's programs, hardware and free space, for ``check_cluster`` and the plan."""
    root = expand(root)
    # the folder of the GPU locks that all roots share
    turns = expand("~/.fast_cpt")
    wrong = {folder: why_unwritable(folder) for folder in (root, turns)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hostname": os.uname().nodename,
        "system": os.uname().sysname,
        "python": ".".join(map(str, sys.version_info[:3])),
        "root": root,
        "home": os.path.expanduser("~"),
        "rsync": shutil.which("rsync"),
        "bash": shutil.which("bash"),
        "slurm": shutil.which("sbatch"),
        "unwritable": {folder: why for folder, why in wrong.items() if why},
        "disk_free_gb": shutil.disk_usage(root).free / 1e9 if os.path.isdir(root) else 0.0,
        "memory_gb": memory / 1e9,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "boot_id": boot_id(),
        "gpus": gpus(),
    }


def why_unwritable(folder: str) -> str:
    """Why no file can be created in a folder; empty if one can."""
    trial = os.path.join(folder, f"written-by-check-{os.getpid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        write_whole(trial, "x")
        os.unlink(trial)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def gpus() -> List[Answer]:
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        listed = subprocess.run(
            query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in listed.stdout.decode().splitlines():
        name, memory, driver = [part.strip() for part in line.split(",")]
        found.append({"name": name, "memory_gb": float(memory) * 2**20 / 1e9, "driver": driver})
    return found


def versions(python: str, pins: Dict[str, str]) -> Answer:
    """The interpreter's path and the pinned packages that it lacks or has in another version."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in json.load(sys.stdin):\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: found[name] = None\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run(
            [expand(python), "-c", program],
            input=json.dumps(list(pins)).encode(),
            capture_output=True,
        )
    except OSError as error:
        return {"error": f"{python}: {error.strerror}"}
    if done.returncode:
        return {"error": done.stderr.decode(errors="replace").strip()[-500:]}
    found = json.loads(done.stdout)
    # a local version (2.13.0+cpu) is the same release
    wrong = [
        f"{name} {found[name] or 'missing'}, wanted {wanted}"
        for name, wanted in pins.items()
        if (found[name] or "").split("+")[0] != wanted
    ]
    return {"python": expand(python), "wrong": wrong}
