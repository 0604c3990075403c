"""What runs on the cluster: one program of the standard library, for any Python from 3.8.

It is not installed there. ``remote.ask`` sends it through ``ssh host python3 -`` together with one
request (JSON) and reads one answer (JSON), so both sides are always of one version and nothing a
user typed is ever interpreted by a shell. A job's supervisor is this same file, copied into the
job's folder and started in a session of its own.

    <root>/jobs/<name>/   job.sh, spec.json, secrets.json (0600), job.log, status.json, lock

The lock is held by the supervisor and inherited by the job: while anything of a job lives, it
cannot be started again. ``status.json`` is written whole, with a heartbeat. A job that ends without
saying so is seen by its supervisor's pid or the host's other boot id; what is left of it is ended
before it is started again.
"""

import base64
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional

HEARTBEAT_S = 5.0
# Training saves a checkpoint on SIGTERM; 25 s keep the promise that all has ended within 30.
GRACE_S = 25.0
LOG_PIECE = 256 * 1024
PR_SET_CHILD_SUBREAPER = 36
MARK = "FASTCPT_JOB"
ACTIVE = ("starting", "waiting", "running")
# this file's own text, set by whoever sends it
SOURCE = ""

Answer = Dict[str, Any]


def expand(path: str) -> str:
    """An absolute path; relative ones count from the login's home."""
    return os.path.join(os.path.expanduser("~"), os.path.expanduser(path))


def write_whole(path: str, text: str, mode: int = 0o600) -> None:
    aside = "%s.%d.partial" % (path, os.getpid())
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: str) -> Any:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


# The host


def check(root: str) -> Answer:
    """What the host is and has: for ``check_cluster`` and the plan."""
    root = expand(root)
    os.makedirs(root, mode=0o700, exist_ok=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hostname": os.uname().nodename,
        "system": os.uname().sysname,
        "python": "%d.%d.%d" % sys.version_info[:3],
        "root": root,
        "home": os.path.expanduser("~"),
        "rsync": shutil.which("rsync"),
        "bash": shutil.which("bash"),
        "slurm": shutil.which("sbatch"),
        "disk_free_gb": shutil.disk_usage(root).free / 1e9,
        "memory_gb": memory / 1e9,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "boot_id": boot_id(),
        "gpus": gpus(),
    }


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


# Files


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def verify(folder: str, files: List[Answer]) -> Answer:
    """Which of ``files`` ({file, bytes, sha256}) are absent or differ, and the free bytes there."""
    folder = expand(folder)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    differ = []
    for wanted in files:
        path = os.path.join(folder, wanted["file"])
        same = (
            os.path.isfile(path)
            and os.path.getsize(path) == wanted["bytes"]
            and sha256(path) == wanted["sha256"]
        )
        if not same:
            differ.append(wanted["file"])
    ready = os.path.join(folder, "READY")
    if differ and os.path.exists(ready):
        os.unlink(ready)
    return {"path": folder, "differ": differ, "free": shutil.disk_usage(folder).free}


def ready(folder: str, digest: str) -> Answer:
    """Mark a folder as complete; written last."""
    write_whole(os.path.join(expand(folder), "READY"), digest + "\n")
    return {}


def listing(folder: str) -> Answer:
    """The files below a folder with sizes and digests, for a transfer back."""
    folder = expand(folder)
    if not os.path.isdir(folder):
        return {"error": "no folder '%s' on the cluster" % folder}
    files = []
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = os.path.join(parent, name)
            files.append(
                {
                    "file": os.path.relpath(path, folder),
                    "bytes": os.path.getsize(path),
                    "sha256": sha256(path),
                }
            )
    return {"path": folder, "files": files}


def read_files(paths: Dict[str, str]) -> Answer:
    """The text of small files; None for those that are not there."""
    found: Answer = {}
    for name, path in paths.items():
        try:
            with open(expand(path), encoding="utf-8") as file:
                found[name] = file.read()
        except OSError:
            found[name] = None
    return found


def versions(python: str, pins: Dict[str, str]) -> Answer:
    """The pins that an interpreter's packages do not meet, as text; None where it does not run."""
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
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        return {"error": "%s: %s" % (python, error.strerror)}
    if done.returncode:
        return {"error": done.stderr.decode(errors="replace").strip()[-500:]}
    found = json.loads(done.stdout)
    # a local build (2.13.0+cpu) is the same release
    wrong = [
        "%s %s, wanted %s" % (name, found[name] or "missing", wanted)
        for name, wanted in pins.items()
        if (found[name] or "").split("+")[0] != wanted
    ]
    return {"python": expand(python), "wrong": wrong}


# Jobs


def job_folder(root: str, name: str) -> str:
    return os.path.join(expand(root), "jobs", name)


def locked(folder: str) -> Optional[int]:
    """The lock's descriptor, or None while something of the job lives."""
    lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def submit(
    root: str,
    name: str,
    script: str,
    digest: str,
    secrets: Dict[str, str],
    result: Optional[str],
    shared_lock: Optional[str],
) -> Answer:
    """Start a job, or find it: running, or complete by its result file.

    ``digest`` names what the job does: a job that runs under the same name with another one is
    ended first. ``shared_lock`` names the lock that jobs on the same GPUs wait for in turn.
    """
    folder = job_folder(root, name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    lock = locked(folder)
    if lock is None:
        spec = read_json(os.path.join(folder, "spec.json")) or {}
        status = read_json(os.path.join(folder, "status.json")) or {}
        if spec.get("digest") == digest and lives(folder, name, status):
            return {"found": "running", "folder": folder}
        stop(root, name)
        lock = locked(folder)
        if lock is None:
            return {"error": "job %s is running and could not be ended" % name}
    if result and os.path.exists(expand(result)):
        os.close(lock)
        return {"found": "complete", "folder": folder}
    end_strays(name)
    log = os.path.join(folder, "job.log")
    if os.path.exists(log):
        os.replace(log, log + ".1")
    write_whole(os.path.join(folder, "seen"), "0")
    write_whole(os.path.join(folder, "job.sh"), script)
    write_whole(os.path.join(folder, "secrets.json"), json.dumps(secrets))
    spec = {"name": name, "digest": digest, "shared_lock": shared_lock and expand(shared_lock)}
    write_whole(os.path.join(folder, "spec.json"), json.dumps(spec))
    write_whole(os.path.join(folder, "supervisor.py"), SOURCE)
    write_status(folder, {"state": "starting", "boot_id": boot_id(), "started": time.time()})
    environment = dict(os.environ)
    environment[MARK] = name
    subprocess.Popen(
        [sys.executable, os.path.join(folder, "supervisor.py"), folder, str(lock)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=[lock],
        env=environment,
        cwd=folder,
    )
    return {"found": "started", "folder": folder}


def write_status(folder: str, status: Answer) -> None:
    status["heartbeat"] = time.time()
    write_whole(os.path.join(folder, "status.json"), json.dumps(status))


def poll(root: str, name: str, seen: Optional[int] = None) -> Answer:
    """The job's status and the next piece of its log after the byte ``seen``.

    ``seen`` is kept here, so that a reader that was restarted goes on where the last one ended.
    """
    folder = job_folder(root, name)
    status = read_json(os.path.join(folder, "status.json"))
    if status is None:
        return {"status": {"state": "absent"}, "log": "", "seen": 0, "size": 0}
    # first the state, then the log: what a job wrote before it ended is there
    if status["state"] in ACTIVE and not lives(folder, name, status):
        # it may have ended between the two looks
        status = read_json(os.path.join(folder, "status.json"))
        if status["state"] in ACTIVE:
            rebooted = status.get("boot_id") != boot_id()
            status["state"] = "lost"
            status["why"] = "the host was rebooted" if rebooted else "its supervisor is gone"
    if seen is None:
        try:
            with open(os.path.join(folder, "seen")) as file:
                seen = int(file.read())
        except (OSError, ValueError):
            seen = 0
    else:
        write_whole(os.path.join(folder, "seen"), str(seen))
    piece, size = b"", 0
    log = os.path.join(folder, "job.log")
    if os.path.exists(log):
        size = os.path.getsize(log)
        with open(log, "rb") as file:
            file.seek(seen)
            piece = file.read(LOG_PIECE)
    return {"status": status, "log": base64.b64encode(piece).decode(), "seen": seen, "size": size}


def lives(folder: str, name: str, status: Answer) -> bool:
    """Whether a job's supervisor is there; before it has said its pid, whether the lock is held."""
    if status.get("boot_id") != boot_id():
        return False
    if status.get("supervisor"):
        return name in marks(status["supervisor"])
    lock = locked(folder)
    if lock is None:
        return True
    os.close(lock)
    return False


def stop(root: str, name: str) -> Answer:
    """End a job: its process group, then whatever of it is left. True when nothing lives."""
    folder = job_folder(root, name)
    if not os.path.isdir(folder):
        return {"ended": True}
    status = read_json(os.path.join(folder, "status.json")) or {}
    supervisor = status.get("supervisor")
    if supervisor and name in marks(supervisor):
        signal_quietly(os.kill, supervisor, signal.SIGTERM)
    until = time.time() + GRACE_S + 3
    while time.time() < until:
        lock = locked(folder)
        if lock is not None:
            os.close(lock)
            break
        if not supervisor or name not in marks(supervisor):
            break
        time.sleep(0.2)
    end_strays(name)
    lock = locked(folder)
    if lock is None:
        return {"ended": False}
    os.close(lock)
    status = read_json(os.path.join(folder, "status.json"))
    if status and status["state"] in ACTIVE:
        status["state"] = "cancelled"
        write_status(folder, status)
    return {"ended": True}


def marks(pid: int) -> List[str]:
    """The job a process belongs to, by its environment."""
    try:
        with open("/proc/%d/environ" % pid, "rb") as file:
            for entry in file.read().split(b"\0"):
                if entry.startswith(MARK.encode() + b"="):
                    return [entry.split(b"=", 1)[1].decode()]
    except OSError:
        pass
    return []


def end_strays(name: str) -> None:
    """Kill every process that carries the job's mark: what outlived its supervisor."""
    if not os.path.isdir("/proc"):
        return
    for _ in range(50):
        alive = [
            int(entry)
            for entry in os.listdir("/proc")
            if entry.isdigit() and int(entry) != os.getpid() and name in marks(int(entry))
        ]
        if not alive:
            return
        for pid in alive:
            signal_quietly(os.kill, pid, signal.SIGKILL)
        time.sleep(0.1)


def signal_quietly(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except (ProcessLookupError, PermissionError):
        pass


def supervise(folder: str, lock: int) -> None:
    """Run job.sh to its end: heartbeats while it runs, its exit code when it has ended."""
    spec = read_json(os.path.join(folder, "spec.json"))
    status = read_json(os.path.join(folder, "status.json"))
    status["supervisor"] = os.getpid()
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.time()))
    if sys.platform.startswith("linux"):
        # orphans of the job become children of this process and end with it
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    locks = [lock]
    if spec["shared_lock"]:
        status["state"] = "waiting"
        write_status(folder, status)
        locks.append(wait_for(spec["shared_lock"], folder, status, ending))
    if ending:
        status.update(state="cancelled", ended=time.time())
        write_status(folder, status)
        return
    environment = dict(os.environ)
    environment.update(read_json(os.path.join(folder, "secrets.json")) or {})
    os.unlink(os.path.join(folder, "secrets.json"))
    with open(
        os.open(os.path.join(folder, "job.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        "ab",
    ) as log:
        job = subprocess.Popen(
            ["bash", os.path.join(folder, "job.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=locks,
            env=environment,
            cwd=folder,
        )
    status.update(state="running", pid=job.pid, running_since=time.time())
    beat = 0.0
    while True:
        code = job.poll()
        if code is not None:
            break
        if time.time() - beat > HEARTBEAT_S:
            write_status(folder, status)
            beat = time.time()
        if ending:
            asked = ending[0]
            signal_quietly(os.killpg, job.pid, signal.SIGTERM)
            while job.poll() is None and time.time() < asked + GRACE_S:
                time.sleep(0.1)
            signal_quietly(os.killpg, job.pid, signal.SIGKILL)
            code = job.wait()
            break
        time.sleep(0.2)
    # whatever the job left behind in its group ends with it
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    state = "cancelled" if ending else "succeeded" if code == 0 else "failed"
    status.update(state=state, exit_code=code, ended=time.time())
    write_status(folder, status)


def wait_for(path: str, folder: str, status: Answer, ending: List[float]) -> int:
    """The shared lock's descriptor, once it is free; None when asked to end first."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while not ending:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            write_status(folder, status)
            time.sleep(0.5)
    return lock


REQUESTS = {
    function.__name__: function
    for function in (check, verify, ready, listing, read_files, versions, submit, poll, stop)
}

if __name__ == "__main__" and len(sys.argv) == 3:
    supervise(sys.argv[1], int(sys.argv[2]))
