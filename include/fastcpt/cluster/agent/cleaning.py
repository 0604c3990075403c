"""What under the root nothing uses any more, and its removal.

What a job's script names is touched when the job is started or found (``touch_named``), so a folder's age tells
whether a run may still want it. A job that has not ended keeps all that its script names, however old that is.
"""

import fcntl
import os
import shutil
import time
from contextlib import suppress
from typing import Dict, List

from fastcpt.cluster.agent.files import Answer, expand
from fastcpt.cluster.agent.job_folder import ACTIVE, cleaning_lock
from fastcpt.cluster.agent.jobs import job_state
from fastcpt.cluster.agent.processes import processes_of

# The end of a folder's name while it is removed: half of it is never taken for the whole.
REMOVED = ".removed"


def clean(
    root: str,
    idle_s: float,
    keep: Dict[str, List[str]],
    only: Dict[str, List[str]],
    remove: bool,
) -> Answer:
    """Remove, or only name, what was not used for ``idle_s`` seconds: ``{folders: [{path, bytes}]}``.

    ``keep`` has the kinds of folders below the root that are looked at, each with the names that stay;
    of a kind in ``only`` no other names are looked at.
    """
    root = expand(root)
    if remove:
        for kind in keep:
            for name in entries(os.path.join(root, kind), hidden=True):
                shutil.rmtree(os.path.join(root, kind, name))
    scripts, gone = scripts_of_jobs(root), []
    for kind, stay in keep.items():
        for name in entries(os.path.join(root, kind)):
            may_go = name not in stay and name in only.get(kind, [name])
            if not may_go or not unused(root, kind, name, idle_s, scripts):
                continue
            folder = os.path.join(root, kind, name)
            size = size_of(folder)
            if not remove or take_away(root, kind, name, idle_s):
                gone.append({"path": folder, "bytes": size})
    return {"folders": gone}


def entries(folder: str, hidden: bool = False) -> List[str]:
    """The folders in a folder; ``hidden``: those whose removal was not finished."""
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    left = [name for name in found if name.startswith(".") and name.endswith(REMOVED)]
    return sorted(left if hidden else [name for name in found if not name.startswith(".")])


def unused(root: str, kind: str, name: str, idle_s: float, scripts: str) -> bool:
    """Whether a folder is old, and is and has no part in a job that has not ended."""
    folder = os.path.join(root, kind, name)
    if time.time() - last_used(folder) < idle_s:
        return False
    return not goes_on(folder) if kind == "jobs" else f"/{kind}/{name}" not in scripts


def scripts_of_jobs(root: str) -> str:
    """The scripts of the jobs that have not ended, one after another."""
    found = []
    for name in entries(os.path.join(root, "jobs")):
        folder = os.path.join(root, "jobs", name)
        if goes_on(folder):
            with open(os.path.join(folder, "job.sh"), encoding="utf-8") as script:
                found.append(script.read())
    return "\n".join(found)


def goes_on(folder: str) -> bool:
    """Whether a job has not ended, or left a process."""
    folder = os.path.realpath(folder)
    if not os.path.exists(os.path.join(folder, "lock")):
        return False  # its result was there: it was never started
    return job_state(folder)["state"] in ACTIVE or bool(processes_of(folder))


def last_used(folder: str) -> float:
    """Seconds since 1970, by what lies in it at most two levels deep: an environment has 50,000 files."""
    moments = [os.lstat(folder).st_mtime]
    for entry in os.scandir(folder):
        moments.append(entry.stat(follow_symlinks=False).st_mtime)
        if entry.is_dir(follow_symlinks=False):
            moments += [one.stat(follow_symlinks=False).st_mtime for one in os.scandir(entry.path)]
    return max(moments)


def size_of(folder: str) -> int:
    """Bytes of the files below a folder; what vanishes meanwhile counts nothing."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def take_away(root: str, kind: str, name: str, idle_s: float) -> bool:
    """Remove a folder under another name first; False where it is in use since it was looked at."""
    aside = os.path.join(root, kind, "." + name + REMOVED)
    with cleaning_lock(root, fcntl.LOCK_EX):
        if not unused(root, kind, name, idle_s, scripts_of_jobs(root)):
            return False
        os.rename(os.path.join(root, kind, name), aside)
    shutil.rmtree(aside)
    return True
