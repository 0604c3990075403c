"""Removes folders below the root that nothing uses any more.

``touch_named`` renews the age of what a job's script names, when the job is started or found. So a folder's age
tells whether a run may still need it. Until a job has ended, all that its script names stays at any age.
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

# Suffix of a folder while it is removed, so that a half-removed folder is never used.
REMOVED = ".removed"


def clean(
    root: str,
    idle_s: float,
    keep: Dict[str, List[str]],
    only: Dict[str, List[str]],
    remove: bool,
) -> Answer:
    """Remove, or only list, what was not used for ``idle_s`` seconds: ``{folders: [{path, bytes}]}``.

    The keys of ``keep`` are the kinds of folders that are cleaned, its values the names that stay. Of a
    kind in ``only`` no other names than those are cleaned.
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
            if not may_go or not is_unused(root, kind, name, idle_s, scripts):
                continue
            folder = os.path.join(root, kind, name)
            size = bytes_below(folder)
            if not remove or take_away(root, kind, name, idle_s):
                gone.append({"path": folder, "bytes": size})
    return {"folders": gone}


def entries(folder: str, hidden: bool = False) -> List[str]:
    """The folders in a folder; with ``hidden``, those whose removal was interrupted."""
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    left = [name for name in found if name.startswith(".") and name.endswith(REMOVED)]
    return sorted(left if hidden else [name for name in found if not name.startswith(".")])


def is_unused(root: str, kind: str, name: str, idle_s: float, scripts: str) -> bool:
    """Whether a folder is old and no unfinished job is in it or names it."""
    folder = os.path.join(root, kind, name)
    if time.time() - last_changed(folder) < idle_s:
        return False
    return not is_unfinished(folder) if kind == "jobs" else f"/{kind}/{name}" not in scripts


def scripts_of_jobs(root: str) -> str:
    """The scripts of all unfinished jobs, joined."""
    found = []
    for name in entries(os.path.join(root, "jobs")):
        folder = os.path.join(root, "jobs", name)
        if is_unfinished(folder):
            with open(os.path.join(folder, "job.sh"), encoding="utf-8") as script:
                found.append(script.read())
    return "\n".join(found)


def is_unfinished(folder: str) -> bool:
    """Whether a job has not ended or has left a process."""
    folder = os.path.realpath(folder)
    if not os.path.exists(os.path.join(folder, "lock")):
        return False  # never started: its result was found
    return job_state(folder)["state"] in ACTIVE or bool(processes_of(folder))


def last_changed(folder: str) -> float:
    """Seconds since 1970; looks two levels deep only, because an environment has 50,000 files."""
    moments = [os.lstat(folder).st_mtime]
    for entry in os.scandir(folder):
        moments.append(entry.stat(follow_symlinks=False).st_mtime)
        if entry.is_dir(follow_symlinks=False):
            moments += [one.stat(follow_symlinks=False).st_mtime for one in os.scandir(entry.path)]
    return max(moments)


def bytes_below(folder: str) -> int:
    """Bytes of the files below a folder; files that vanish meanwhile are not counted."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def take_away(root: str, kind: str, name: str, idle_s: float) -> bool:
    """Rename a folder, then remove it; False if it came into use since it was listed."""
    aside = os.path.join(root, kind, "." + name + REMOVED)
    with cleaning_lock(root, fcntl.LOCK_EX):
        if not is_unused(root, kind, name, idle_s, scripts_of_jobs(root)):
            return False
        os.rename(os.path.join(root, kind, name), aside)
    shutil.rmtree(aside)
    return True
