"""The host's side of copying checkpoints away and back.

In the training's folder, ``leaving/step_N`` holds the newest checkpoint while it is copied, with all
else that a training resumes from: its metrics and the adapters of finished areas. Its files are hard
links, so they survive when the training removes old checkpoints. ``returned`` is where such a folder
arrives on another host.
"""

import json
import os
import re
import shutil
import time
from contextlib import suppress
from typing import Any, List

from fastcpt.cluster.agent.files import Answer, expand, json_or_none, listing, write_whole

STEP = re.compile(r"step_(\d+)")
# Files with sizes and digests: of a checkpoint (fastcpt.training.digests), and of a folder that leaves.
DIGESTS, FILES = "digests.json", "files.json"
CURVE, AREAS = "metrics.jsonl", "areas"


def steps(folder: str) -> List[int]:
    """The steps of the complete checkpoints in a folder, the oldest first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(int(match[1]) for match in map(STEP.fullmatch, names) if match)


def newest_checkpoint(folder: str, beyond: int) -> Answer:
    """The newest complete checkpoint of a training: ``{step, path, files}``; step None if there is none.

    If it is later than the step ``beyond``, it is linked into ``path``, ``files`` ({file, bytes,
    sha256}) lists it, and ``age_s`` is how long ago it was saved; otherwise ``files`` is empty. Folders
    linked before are removed.
    """
    folder = expand(folder)
    leaving = os.path.join(folder, "leaving")
    there = steps(os.path.join(folder, "checkpoints"))
    step = there[-1] if there else None
    wanted = [step] if step is not None and step > beyond else []
    for old in steps(leaving):
        if old not in wanted:
            shutil.rmtree(os.path.join(leaving, f"step_{old}"), ignore_errors=True)
    if not wanted:
        with suppress(OSError):
            os.rmdir(leaving)
        return {"step": step, "path": None, "files": []}
    held = os.path.join(leaving, f"step_{step}")
    files = json_or_none(os.path.join(held, FILES), list) or hold(folder, f"step_{step}", held)
    age = age_s(os.path.join(held, "checkpoints", f"step_{step}"))
    return {"step": step, "path": held, "files": files, "age_s": age}


def age_s(checkpoint: str) -> float:
    """Seconds since the first file of a checkpoint was written, by this host's clock; never below 0."""
    written = [os.stat(os.path.join(checkpoint, name)).st_mtime for name in os.listdir(checkpoint)]
    return max(0.0, time.time() - min(written))


def hold(folder: str, name: str, held: str) -> List[Any]:
    """Link all that a training resumes from into ``held``; its files. ``OSError`` if it was just removed."""
    checkpoint = os.path.join(folder, "checkpoints", name)
    digests = json_or_none(os.path.join(checkpoint, DIGESTS), dict)
    if digests is None:
        raise OSError(f"{checkpoint} has no {DIGESTS}: it was removed just now")
    shutil.rmtree(held, ignore_errors=True)
    inside = os.path.join(held, "checkpoints", name)
    os.makedirs(inside, mode=0o700)
    # the small files first: `listing` hashes these, the checkpoint's digests are known
    os.link(os.path.join(checkpoint, DIGESTS), os.path.join(inside, DIGESTS))
    curve = os.path.join(folder, CURVE)
    if os.path.exists(curve):  # a copy, as the training appends to it
        shutil.copyfile(curve, os.path.join(held, CURVE))
    areas = os.path.join(folder, AREAS)
    if os.path.isdir(areas):
        shutil.copytree(areas, os.path.join(held, AREAS), copy_function=os.link)
    files: List[Any] = listing(held)["files"]
    for file, digest in digests.items():
        os.link(os.path.join(checkpoint, file), os.path.join(inside, file))
        files.append({"file": f"checkpoints/{name}/{file}", **digest})
    write_whole(os.path.join(held, FILES), json.dumps(files))
    return files


def take_in(folder: str, step: int) -> Answer:
    """Move what arrived in ``returned/step_N`` into the training's folder, the checkpoint last."""
    folder, name = expand(folder), f"step_{step}"
    returned, own = os.path.join(folder, "returned", name), os.path.join(folder, "checkpoints")
    os.makedirs(own, mode=0o700, exist_ok=True)
    if os.path.exists(os.path.join(returned, CURVE)):
        os.replace(os.path.join(returned, CURVE), os.path.join(folder, CURVE))
    if os.path.isdir(os.path.join(returned, AREAS)):
        shutil.rmtree(os.path.join(folder, AREAS), ignore_errors=True)
        os.rename(os.path.join(returned, AREAS), os.path.join(folder, AREAS))
    os.rename(os.path.join(returned, "checkpoints", name), os.path.join(own, name))
    shutil.rmtree(os.path.join(folder, "returned"))
    return {}
