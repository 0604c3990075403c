"""What runs on the cluster: one program of the standard library, for any Python from 3.8.

It is not installed there. ``remote.ask`` sends it through ``ssh host python3 -`` together with one
request (JSON) and reads one answer (JSON), so both sides are always of one version and nothing a
user typed is ever interpreted by a shell. A job's supervisor is this same file, copied into the
job's folder and started in a session of its own.

    <root>/jobs/<name>/   job.sh, spec.json, secrets.json (0600), job.log, status.json, lock

The locks are the supervisor's alone: a job is over when its processes are, and those carry the
job's folder in their environment, so that they are found and ended wherever they fled to. What ends
or watches a job needs no room on the disk: notes are kept where there is some. A job that ends
without saying so is seen by its supervisor's pid or the host's other boot id. Under Slurm the
supervisor runs inside the allocation, and the queue answers for it while it waits or was ended.
"""

import base64
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, Optional

HEARTBEAT_S = 5.0
# Training saves a checkpoint on SIGTERM; 20 s keep the promise that all has ended within 30.
GRACE_S = 20.0
# A host of several ends its part when it has not heard of the first one for so long.
SILENCE_S = 60.0
SSH_ALIVE = [
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=4",
    "-o",
    "ConnectTimeout=20",
    # a connection of its own: ended with the job, it must not be one that the user shares
    "-o",
    "ControlMaster=no",
    "-o",
    "ControlPath=none",
]
# Digests of several files at a time: hashing leaves the interpreter's lock.
READERS = 8
LOG_PIECE = 1024 * 1024
ANSWER_PIECES = 8
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND
PR_SET_CHILD_SUBREAPER = 36
# In the environment of what belongs to a job: its folder; of its own processes: who holds which locks.
MARK = "FASTCPT_JOB"
HOLDS = "FASTCPT_HOLDS"
# Given up when a job has ended on a full disk, so that its last status can be written.
RESERVE = 64 * 1024
# A folder that is not there for so long was removed, and is not just being mounted again.
GONE_S = 10.0
ACTIVE = ("starting", "waiting", "running")
# this file's own text, set by whoever sends it
SOURCE = ""

Answer = Dict[str, Any]
# Slurm's jobs (state and reason by id); None where its controller does not answer
Queue = Optional[Dict[str, List[str]]]


def expand(path: str) -> str:
    """An absolute path; relative ones count from the login's home."""
    return os.path.join(os.path.expanduser("~"), os.path.expanduser(path))


def write_whole(path: str, text: str, mode: int = 0o600) -> None:
    aside = "%s.%d.partial" % (path, os.getpid())
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        unlink(aside)
        raise


def note(path: str, value: Any) -> bool:
    """Write JSON where the disk has room: what ends or watches a job does not depend on it."""
    try:
        write_whole(path, json.dumps(value))
    except OSError:
        return False
    return True


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def read_json(path: str, kind: type) -> Any:
    """What a file of JSON holds; None where there is none or it is damaged: not a ``kind``."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


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
    # where jobs of several roots take turns on the GPUs
    turns = expand("~/.fast_cpt")
    wrong = {folder: why_unwritable(folder) for folder in (root, turns)}
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
    """Why no file can be made in a folder; empty where one can."""
    trial = os.path.join(folder, "written-by-check-%d" % os.getpid())
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

    def same(wanted: Answer) -> bool:
        path = os.path.join(folder, wanted["file"])
        right_size = os.path.isfile(path) and os.path.getsize(path) == wanted["bytes"]
        return bool(right_size and sha256(path) == wanted["sha256"])

    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(same, files))
    differ = [wanted["file"] for number, wanted in enumerate(files) if not found[number]]
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
    return os.path.realpath(os.path.join(expand(root), "jobs", name))


class Door:
    """Held while a job is started or ended: two that come at once go in one after the other."""

    def __init__(self, folder: str) -> None:
        self.folder, self.lock = folder, -1

    def __enter__(self) -> None:
        try:
            self.lock = os.open(os.path.join(self.folder, "door"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return  # a full or read-only disk, or no folder any more: a job can be ended all the same
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self.lock >= 0:
            os.close(self.lock)


def locked(folder: str) -> Optional[int]:
    """The lock's descriptor, or None while the job's supervisor lives."""
    lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def held(folder: str) -> bool:
    """Whether a supervisor holds the job's lock; one that cannot be opened is nobody's."""
    try:
        lock = locked(folder)
    except OSError:
        return False
    if lock is not None:
        os.close(lock)
    return lock is None


def submit(
    root: str,
    name: str,
    script: str,
    digest: str,
    secrets: Dict[str, str],
    result: Optional[str],
    alone: str,
    owner: str = "",
    slurm: Optional[List[str]] = None,
    extra_lines: Optional[List[str]] = None,
) -> Answer:
    """Start a job, or find it: running, or complete by its result file.

    ``digest`` names what the job does: a job that runs under the same name with another one is
    ended first. ``alone`` (no, root, host) says beside which other jobs it does not run.
    ``owner`` is the try that asks; it may later end what it started or found, and nothing else.
    ``slurm`` are options of sbatch: with them Slurm runs the job and shares out the GPUs.
    """
    folder = job_folder(root, name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with Door(folder):
        status = state_of(folder)
        if status["state"] in ACTIVE:
            spec = read_json(os.path.join(folder, "spec.json"), dict) or {}
            if spec.get("digest") == digest:
                if not note(os.path.join(folder, "owners.json"), [*owners(folder), owner]):
                    return {"unavailable": "no room in %s to note whose job %s is" % (folder, name)}
                return {"found": "running", "folder": folder}
        if status["state"] in ACTIVE or living(folder):
            answer = end(folder, owner)
            if "unavailable" in answer:
                return answer
            if not answer["ended"]:
                return {"error": "job %s is running and could not be ended" % name}
        if result and os.path.exists(expand(result)):
            return {"found": "complete", "folder": folder}
        lock = locked(folder)
        if lock is None:
            return {"error": "something of job %s lives and could not be ended" % name}
        begin_folder(folder, owner)
        write_whole(os.path.join(folder, "job.sh"), script)
        write_whole(os.path.join(folder, "supervisor.py"), SOURCE)
        spec = {"name": name, "digest": digest, "locks": shared_locks(root, alone)}
        write_whole(os.path.join(folder, "spec.json"), json.dumps(spec))
        waiting = {"state": "waiting", "started": time.time()}
        starting = {"state": "starting", "started": time.time(), "boot_id": boot_id()}
        status = waiting if slurm is not None else starting
        write_whole(os.path.join(folder, "status.json"), json.dumps(status))
        write_whole(os.path.join(folder, "secrets.json"), json.dumps(secrets))
        if slurm is not None:
            os.close(lock)
            return sbatch(folder, spec, slurm, extra_lines or [])
        complaints = os.open(os.path.join(folder, "supervisor.log"), LOG_FLAGS, 0o600)
        subprocess.Popen(
            [sys.executable, os.path.join(folder, "supervisor.py"), folder, str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            start_new_session=True,
            pass_fds=[lock],
            env={**os.environ, MARK: folder},
            cwd=folder,
        )
    return {"found": "started", "folder": folder}


def begin_folder(folder: str, owner: str) -> None:
    """A new start: the log begins again, and nobody has asked for its end."""
    log = os.path.join(folder, "job.log")
    if os.path.exists(log):
        os.replace(log, log + ".1")
    for name in ("stopped.json", "status.json"):
        unlink(os.path.join(folder, name))
    write_whole(os.path.join(folder, "reserve"), os.urandom(RESERVE // 2).hex())
    write_whole(os.path.join(folder, "seen"), "0")
    write_whole(os.path.join(folder, "owners.json"), json.dumps([owner]))


def owners(folder: str) -> List[str]:
    return read_json(os.path.join(folder, "owners.json"), list) or []


def said(folder: str) -> Optional[Answer]:
    """What the job's supervisor has last said; None where that is not there or damaged."""
    status: Optional[Answer] = read_json(os.path.join(folder, "status.json"), dict)
    return status if status and isinstance(status.get("state"), str) else None


def state_of(folder: str, queue: Callable[[], Queue] = lambda: squeue()) -> Answer:
    """The job's status as it is: what it says of itself, checked against what is there."""
    status = said(folder)
    spec = read_json(os.path.join(folder, "spec.json"), dict) or {}
    if spec.get("slurm_id"):
        status = state_in_slurm(status or {"state": "waiting"}, spec["slurm_id"], queue())
    elif status is None:
        if not held(folder):
            return {"state": "absent", "why": "there is no status of it any more"}
        status = {"state": "running", "why": "its status.json is damaged"}
    elif status["state"] in ACTIVE and not lives(folder, status):
        # it may have ended between the two looks
        status = said(folder) or status
        if status["state"] in ACTIVE:
            rebooted = status.get("boot_id") != boot_id()
            status["state"] = "lost"
            status["why"] = "the host was rebooted" if rebooted else "its supervisor is gone"
    elif status["state"] in ACTIVE and stands_still(status.get("supervisor")):
        again = "kill -CONT %d" % status["supervisor"]
        status["why"] = "its supervisor is stopped and sees nothing; go on with: " + again
    stopped = read_json(os.path.join(folder, "stopped.json"), dict)
    if stopped and status["state"] in ("lost", "cancelled"):
        status.update(stopped)
    return status


def poll(root: str, jobs: List[Answer]) -> Answer:
    """Status and next piece of log of each of ``jobs`` ({name, seen}); ``error`` where it has none.

    ``seen`` bytes of the log have arrived; None asks for what the reader before left. It is kept
    here, so that a reader that was restarted goes on where the last one ended. ``cut`` tells that
    the log has become shorter than what was seen of it: it is read from its beginning.
    """
    queue = lru_cache(maxsize=None)(squeue)
    answers: List[Answer] = []
    budget = ANSWER_PIECES * LOG_PIECE
    for job in jobs:
        folder = job_folder(root, job["name"])
        try:
            # first the state, then the log: what a job wrote before it ended is there
            status = state_of(folder, queue)
            answer = next_piece(folder, job["seen"], budget)
        except (OSError, ValueError, TypeError, KeyError) as error:
            # one job's damaged files are no matter of the others
            answers.append({"error": "%s in %s: %s" % (type(error).__name__, folder, error)})
            continue
        piece = answer["log"]
        budget -= len(piece)
        answers.append({**answer, "status": status, "log": base64.b64encode(piece).decode()})
    return {"jobs": answers}


def next_piece(folder: str, seen: Optional[int], most: int) -> Answer:
    """The next bytes of a job's log, at most ``most``, as ``{log, seen, size}``."""
    kept, log = os.path.join(folder, "seen"), os.path.join(folder, "job.log")
    before = max(0, read_json(kept, int) or 0)
    if seen is None:
        seen = before
    size = os.path.getsize(log) if os.path.exists(log) else 0
    answer: Answer = {"size": size}
    if size < seen:
        answer["cut"], seen = seen, 0
    if seen != before and os.path.isdir(folder):
        note(kept, seen)
    piece = b""
    if size:
        with open(log, "rb") as file:
            file.seek(seen)
            piece = file.read(min(LOG_PIECE, most))
    return {**answer, "seen": seen, "log": piece}


def lives(folder: str, status: Answer) -> bool:
    """Whether a job's supervisor is there; before it has said its pid, whether the lock is held."""
    if status.get("boot_id") != boot_id():
        return False
    if status.get("supervisor") and os.path.isdir("/proc/self"):
        return mark(status["supervisor"]) == folder
    return held(folder)


def stop(root: str, name: str, owner: Optional[str] = None) -> Answer:
    """End a job and all that is left of it; ``{ended, was}`` says whether, and its state before.

    A job that ``owner`` neither started nor found is left alone: it is a later try's. One whose
    folder was removed is ended by what its processes carry.
    """
    folder = job_folder(root, name)
    with Door(folder):
        if owner is not None and os.path.isdir(folder) and owner not in owners(folder):
            return {"ended": True, "left_alone": True}
        return end(folder, owner or "")


def end(folder: str, owner: str) -> Answer:
    """Signals first; what is to be noted is noted where the disk has room."""
    status = state_of(folder)
    active = status["state"] in ACTIVE
    stopped = {"state": "cancelled", "stopped_for": owner}
    spec = read_json(os.path.join(folder, "spec.json"), dict) or {}
    if spec.get("slurm_id"):
        run_slurm(["scancel", "--batch", "--signal=TERM", spec["slurm_id"]], {})
        if active and squeue() is not None:
            note(os.path.join(folder, "stopped.json"), stopped)
        gone = scancel(spec["slurm_id"])
        if gone is None:
            return {"unavailable": NO_CONTROLLER}
        if gone:
            end_strays(folder)
            forget_secrets(folder)
        return {"ended": gone, "was": status["state"]}
    told: List[int] = []
    noted = not active
    until = time.monotonic() + GRACE_S + 2
    while time.monotonic() < until:
        there = supervisors(folder)
        for pid in there:
            if pid not in told:
                signal_quietly(os.kill, pid, signal.SIGTERM)
                signal_quietly(os.kill, pid, signal.SIGCONT)
                told.append(pid)
        if told and not noted:
            noted = note(os.path.join(folder, "stopped.json"), stopped)
        # held and nobody there: it has just been started
        if not there and not held(folder):
            break
        time.sleep(0.1)
    end_strays(folder)
    if living(folder) or held(folder):
        return {"ended": False, "was": status["state"]}
    forget_secrets(folder)
    if not noted:
        note(os.path.join(folder, "stopped.json"), stopped)
    left = said(folder)
    if active and left and left["state"] in ACTIVE:
        note(os.path.join(folder, "status.json"), {**left, **stopped})
    return {"ended": True, "was": status["state"]}


def forget_secrets(folder: str) -> None:
    unlink(os.path.join(folder, "secrets.json"))


# Processes, by what they carry in their environment


def processes() -> Iterator[int]:
    """All but this one; none on a host without /proc."""
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                yield int(entry)


def environment_of(pid: int) -> Dict[str, str]:
    """A process's environment at its start; empty where it has ended or is somebody else's."""
    try:
        with open("/proc/%d/environ" % pid, "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:
        return {}
    pairs = [entry.partition("=") for entry in entries]
    return {name: value for name, _, value in pairs}


def mark(pid: int) -> str:
    """The folder of the job that a process belongs to; empty for any other.

    Not its name: another orchestrator's job with another root may have the same one.
    """
    return environment_of(pid).get(MARK, "")


def living(folder: str) -> List[int]:
    return [pid for pid in processes() if mark(pid) == folder]


def supervisors(folder: str) -> List[int]:
    """A job's supervisor: what carries its folder and is no process of the job itself."""
    if not os.path.isdir("/proc/self"):
        pid = (said(folder) or {}).get("supervisor")
        return [pid] if pid and held(folder) else []
    found = [(pid, environment_of(pid)) for pid in processes()]
    return [pid for pid, its in found if its.get(MARK) == folder and HOLDS not in its]


def stands_still(pid: Optional[int]) -> bool:
    """Whether a process was stopped (SIGSTOP)."""
    try:
        with open("/proc/%d/stat" % (pid or 0)) as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def end_strays(folder: str) -> None:
    """Kill every other process that carries the job's mark: what outlived its supervisor or it."""
    for _ in range(50):
        alive = living(folder)
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


def other_holder(lock: str, folder: str) -> str:
    """The folder of another job that works under a lock, whatever became of the lock's file.

    What no supervisor watches any more is ended: nobody else would, and it has the GPUs.
    """
    for pid in processes():
        environment = environment_of(pid)
        boot, supervisor, *locks = environment.get(HOLDS, "\n").split("\n")
        other = environment.get(MARK, "")
        if lock in locks and other != folder:
            if boot == boot_id() and mark(int(supervisor)) != other:
                signal_quietly(os.kill, pid, signal.SIGKILL)
            return other
    return ""


# The supervisor


def supervise(folder: str, lock: Optional[int]) -> None:
    """Run job.sh to its end, and say how it ended when nothing of it lives any more.

    Without a ``lock`` it is Slurm that runs this, and that may run it again (a requeue).
    """
    spec = read_json(os.path.join(folder, "spec.json"), dict)
    status: Answer = {"state": "starting", "started": (said(folder) or {}).get("started")}
    status.update(name=spec["name"], supervisor=os.getpid(), boot_id=boot_id())
    status.update(host=os.uname().nodename)
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.monotonic()))
    if lock is not None:
        os.set_inheritable(lock, False)
    if sys.platform.startswith("linux"):
        # orphans of the job become children of this process and end with it
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    locks = [wait_for(path, folder, status, ending) for path in spec["locks"]]
    began = time.monotonic()
    try:
        code = None if ending else run_job(folder, lock, spec["locks"], status, ending)
    except OSError as error:
        code = None
        status["why"] = "it could not be started: %s" % error
    else:
        status["why"] = "ended from outside"
    end_strays(folder)
    for shared in locks:
        if shared >= 0:
            os.close(shared)
    status.update(exit_code=code, ended=time.time(), seconds=round(time.monotonic() - began, 1))
    if code is None or (ending and code):
        # `stop` says so in a file of its own; anything else may be a host going down
        status["state"] = "lost"
    else:
        status["state"] = "succeeded" if code == 0 else "failed"
        status.pop("why")
    if lock is not None or status["state"] != "lost":
        forget_secrets(folder)
    unlink(os.path.join(folder, "reserve"))
    removed = Removed(folder)
    while not note(os.path.join(folder, "status.json"), status) and not ending and not removed():
        time.sleep(1)


def run_job(
    folder: str, lock: Optional[int], locks: List[str], status: Answer, ending: List[float]
) -> Optional[int]:
    """The exit code of job.sh; None where it was ended because this process was told to end."""
    environment = {**os.environ, HOLDS: "\n".join([boot_id(), str(os.getpid()), *locks])}
    environment.update(read_json(os.path.join(folder, "secrets.json"), dict) or {})
    with open(os.open(os.path.join(folder, "job.log"), LOG_FLAGS, 0o600), "ab") as log:
        job = subprocess.Popen(
            ["bash", os.path.join(folder, "job.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=folder,
        )
    if lock is not None:
        forget_secrets(folder)
    status.update(state="running", pid=job.pid, running_since=time.time())
    removed = Removed(folder)
    noted, tried = False, -HEARTBEAT_S
    while job.poll() is None and not ending:
        if not noted and time.monotonic() - tried > HEARTBEAT_S:
            tried = time.monotonic()
            noted = note(os.path.join(folder, "status.json"), status)
        if removed():
            ending.append(time.monotonic())
        time.sleep(0.2)
    code = job.poll()
    if code is None:
        end_group(job)
    # whatever the job left behind in its group ends with it
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    return code


class Removed:
    """Whether a job's folder was removed while it ran; one that is away for a moment was not."""

    def __init__(self, folder: str) -> None:
        self.spec, self.missed = os.path.join(folder, "spec.json"), 0.0

    def __call__(self) -> bool:
        try:
            os.stat(self.spec)
        except FileNotFoundError:
            self.missed = self.missed or time.monotonic()
            return time.monotonic() - self.missed > GONE_S
        except OSError:
            pass
        self.missed = 0.0
        return False


def end_group(job: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to a process group, SIGKILL to what is left of it after the grace."""
    until = time.monotonic() + GRACE_S
    signal_quietly(os.killpg, job.pid, signal.SIGTERM)
    while job.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    job.wait()


def shared_locks(root: str, alone: str) -> List[str]:
    """The locks that a job holds against others: of its root, and of all roots on this host."""
    of_root = os.path.join(os.path.realpath(expand(root)), "gpus.lock")
    # a home may be shared by several hosts
    of_host = expand("~/.fast_cpt/gpus-%s.lock" % os.uname().nodename)
    return {"no": [], "root": [of_root], "host": [of_root, of_host]}[alone]


def same_file(lock: int, path: str) -> bool:
    """Whether a lock is still the one at its path: somebody may have removed the file."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(lock))


def sign(lock: int, name: str) -> None:
    """For those that wait: whose turn it is. On a full disk they are not told."""
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, name.encode(), 0)
    except OSError:
        pass


def wait_for(path: str, folder: str, status: Answer, ending: List[float]) -> int:
    """A shared lock's descriptor, once it is free or the job is asked to end."""
    lock, told = -1, ""
    removed = Removed(folder)
    while not ending:
        try:
            if lock < 0:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same_file(lock, path):
                os.close(lock)
                lock = -1
                continue
            holder = os.path.basename(other_holder(path, folder))
            if not holder:
                sign(lock, status["name"])
                break
            why = "job %s has the GPUs (%s)" % (holder, path)
        except BlockingIOError:
            holder = os.pread(lock, 1024, 0).decode(errors="replace")
            why = "job %s has the GPUs (%s)" % (holder, path)
        except OSError as error:
            why = str(error)
        status.update(state="waiting", why=why)
        if why != told and note(os.path.join(folder, "status.json"), status):
            told = why
        if removed():
            ending.append(time.monotonic())
        time.sleep(0.5)
    status.pop("why", None)
    return lock


# Slurm. The same supervisor runs inside the allocation; the queue tells what it cannot say itself.

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
ENDED = {
    "TIMEOUT": "Slurm ended it at its time limit (cluster.slurm.time_limit)",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "Slurm preempted it",
    "OUT_OF_MEMORY": "it took more memory than Slurm gave it",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "Slurm ended it at its deadline",
}
NO_CONTROLLER = "Slurm's controller does not answer"


def sbatch(folder: str, spec: Answer, options: List[str], extra_lines: List[str]) -> Answer:
    # a singleton: Slurm itself runs one job of a name at a time
    fixed = [
        *("--parsable", "--requeue", "--open-mode=append", "--dependency=singleton"),
        *("--job-name=" + spec["name"], "--chdir=" + folder, "--output=slurm.log"),
    ]
    lines = ["#!/bin/bash"] + ["#SBATCH " + line for line in extra_lines]
    lines.append("exec python3 ./supervisor.py . slurm")
    write_whole(os.path.join(folder, "batch.sh"), "\n".join(lines) + "\n")
    command = ["sbatch", *fixed, *options, os.path.join(folder, "batch.sh")]
    done = run_slurm(command, {MARK: folder}, 60)
    if done.returncode:
        answer = done.stderr.decode(errors="replace").strip()
        if "ontact" in answer or "imed out" in answer:
            return {"unavailable": "%s: %s" % (NO_CONTROLLER, answer)}
        forget_secrets(folder)
        return {"error": "sbatch refused the job: " + answer}
    spec["slurm_id"] = done.stdout.decode().strip().split(";")[0]
    write_whole(os.path.join(folder, "spec.json"), json.dumps(spec))
    return {"found": "started", "folder": folder, "slurm_id": spec["slurm_id"]}


def run_slurm(
    command: List[str], mark: Dict[str, str], patience: float = 15
) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **mark},
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, b"", b"timed out")


def squeue() -> Queue:
    command = [
        "squeue",
        "--noheader",
        "--states=all",
        "--user=%d" % os.getuid(),
        "--format=%A|%T|%r",
    ]
    done = run_slurm(command, {})
    if done.returncode:
        return None
    rows = [line.split("|") for line in done.stdout.decode().splitlines()]
    return {row[0]: row[1:] for row in rows}


def state_in_slurm(status: Answer, slurm_id: str, queue: Queue) -> Answer:
    if status["state"] in ("succeeded", "failed"):
        return status
    if queue is None:
        return {**status, "state": "running", "why": NO_CONTROLLER}
    state, reason = queue.get(slurm_id, ["", ""])
    if state in WAITING:
        return {**status, "state": "waiting", "why": "Slurm: %s, %s" % (state, reason)}
    if state in RUNNING:
        return {**status, "state": "running"}
    if state == "CANCELLED":
        return {**status, "state": "cancelled"}
    why = ENDED.get(state, "Slurm: " + (state or "it is not in the queue any more"))
    return {**status, "state": "lost", "why": why}


def scancel(slurm_id: str) -> Optional[bool]:
    """Wait for the end of a job that has its SIGTERM, and see to it after the grace.

    True when Slurm has nothing of the job left, None when its controller does not answer.
    """
    asked = time.monotonic()
    while True:
        queue = squeue()
        if queue is None:
            return None
        state = queue.get(slurm_id, ["gone"])[0]
        waited = time.monotonic() - asked
        if state not in WAITING + RUNNING or waited > GRACE_S + 7:
            return state not in WAITING + RUNNING
        if state in WAITING or waited > GRACE_S:
            run_slurm(["scancel", slurm_id], {})
        time.sleep(0.5)


# Several hosts: one command on each, started over SSH or by srun, ended together.


def on_hosts(gpus: int, hosts: List[str], command: List[str]) -> int:
    """Run ``command`` on this host and on ``hosts`` (a Slurm allocation's own, where there is one).

    ``{node_rank}``, ``{master_addr}`` and ``{hostfile}`` in the command are filled in; the host
    file is DeepSpeed's. The hosts share the file system. The first that fails ends the others.
    """
    inside_slurm = "SLURM_JOB_ID" in os.environ
    if inside_slurm:
        listed = run_slurm(["scontrol", "show", "hostnames"], {}).stdout.decode().split()
        names, master = listed, listed[0]
    else:
        master = address_towards(hosts[0]) if hosts else "127.0.0.1"
        names = [master, *hosts]
    if gpus % len(names):
        print(
            "ValueError: cluster.gpus (%d) must be a multiple of the %d hosts" % (gpus, len(names))
        )
        return 78
    hostfile = os.path.abspath("hostfile")
    slots = gpus // len(names)
    write_whole(hostfile, "".join("%s slots=%d\n" % (name, slots) for name in names))
    values = {"{master_addr}": master, "{hostfile}": hostfile}
    command = [values.get(word, word) for word in command]
    here = [sys.executable, os.path.abspath(__file__), "node"]
    if inside_slurm:
        srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--ntasks=%d" % len(names)]
        return subprocess.call([*srun, *here, *command])
    settings = {"cwd": os.getcwd(), "environment": dict(os.environ)}
    nodes = []
    for rank, host in enumerate(["", *hosts]):
        far = "exec python3 '%s' node" % os.path.abspath(__file__).replace("'", "'\\''")
        ssh = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *SSH_ALIVE]
        node = subprocess.Popen([*ssh, "--", host, far] if host else here, stdin=subprocess.PIPE)
        words = [str(rank) if word == "{node_rank}" else word for word in command]
        tell(node, json.dumps({**settings, "command": words}))
        nodes.append(node)
    ending: List[float] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ending.append(time.monotonic()))
    beat, code, told = time.monotonic(), 0, False
    while None in [node.poll() for node in nodes]:
        failed = [node.returncode for node in nodes if node.returncode]
        if (failed or ending) and not told:
            told, code = True, failed[0] if failed else 143
            for node in nodes:
                hang_up(node)
        elif time.monotonic() - beat > HEARTBEAT_S and not told:
            beat = time.monotonic()
            for node in nodes:
                tell(node, "alive")
        time.sleep(0.2)
    return code or next((node.returncode for node in nodes if node.returncode), 0)


def tell(node: "subprocess.Popen[bytes]", line: str) -> None:
    try:
        assert node.stdin is not None
        node.stdin.write(line.encode() + b"\n")
        node.stdin.flush()
    except OSError:
        pass  # it has ended: its exit code says so


def hang_up(node: "subprocess.Popen[bytes]") -> None:
    try:
        assert node.stdin is not None
        node.stdin.close()
    except OSError:
        pass


def node() -> int:
    """One host's part of ``on_hosts``: ends with the connection, or when that falls silent."""
    if "SLURM_NODEID" in os.environ:
        rank = os.environ["SLURM_NODEID"]
        command = [rank if word == "{node_rank}" else word for word in sys.argv[2:]]
        os.execvp(command[0], command)
    settings = json.loads(sys.stdin.buffer.readline())
    # what says which host and login this is stays this host's own
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
        return 143
    signal_quietly(os.killpg, job.pid, signal.SIGKILL)
    return job.returncode if job.returncode >= 0 else 128 - job.returncode


def address_towards(host: str) -> str:
    """This host's address as ``host`` (a name of the SSH configuration) sees it."""
    known = subprocess.run(["ssh", "-G", "--", host], stdout=subprocess.PIPE, check=True)
    pairs = [line.split(" ", 1) for line in known.stdout.decode().splitlines() if " " in line]
    place = dict(reversed(pairs))["hostname"]
    family, kind, _, _, address = socket.getaddrinfo(place, 22, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


REQUESTS = {
    function.__name__: function
    for function in (check, verify, ready, listing, read_files, versions, submit, poll, stop)
}

# What does not pass by itself, unlike what a file server does while it starts.
STAYS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def answer(do: str, values: Answer) -> Answer:
    """A request's answer; what stood in its way is one too (``unavailable`` where it may pass).

    A job that runs is watched and ended through whatever happens to the disk: that is asked again.
    """
    try:
        return REQUESTS[do](**values)
    except Exception as error:
        why = "'%s' failed there: %s" % (do, traceback.format_exc().strip())
        if isinstance(error, OSError):
            why = "'%s' failed there: %s" % (do, error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why += ". The disk there is full: free some, then clear this task"
        watching = do in ("poll", "stop")
        stays = not isinstance(error, OSError) or error.errno in STAYS
        return {"error" if stays and not watching else "unavailable": why}


if __name__ == "__main__" and len(sys.argv) > 1:
    os.umask(0o077)
    if sys.argv[1] == "on-hosts":
        sys.exit(
            on_hosts(int(sys.argv[2]), sys.argv[3].split(",") if sys.argv[3] else [], sys.argv[4:])
        )
    elif sys.argv[1] == "node":
        sys.exit(node())
    else:
        place = os.path.abspath(sys.argv[1])
        supervise(place, None if sys.argv[2] == "slurm" else int(sys.argv[2]))
