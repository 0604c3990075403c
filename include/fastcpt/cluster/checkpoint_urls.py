"""Copies a training's newest checkpoint to an fsspec URL, in case Airflow's machine is lost too.

    <url>/<training>/step_N/   the same folder as ``checkpoints`` keeps here, files.json last

Any URL works if its file system's package is installed (``s3://`` needs s3fs). Credentials come from
the environment.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import fsspec

from fastcpt.files import read_json
from fastcpt.manifests import FileEntry

FILES = "files.json"


def _steps(system: Any, root: str) -> dict[int, str]:
    """The complete folders at ``root``, by step."""
    if not system.isdir(root):
        return {}
    names = [str(path).rstrip("/").rpartition("/")[2] for path in system.ls(root, detail=False)]
    found = [name for name in names if re.fullmatch(r"step_\d+", name)]
    whole = [name for name in found if system.exists(f"{root}/{name}/{FILES}")]
    return {int(name.removeprefix("step_")): f"{root}/{name}" for name in whole}


def upload(newest: Path, url: str) -> bool:
    """Copy a complete folder to ``url``, then remove older ones there; False if it was there already.

    A file of the right size is not sent again, so an interrupted upload resumes.
    """
    system, root = fsspec.url_to_fs(url)
    target = f"{root}/{newest.name}"
    if system.exists(f"{target}/{FILES}"):
        return False
    for file in read_json(newest / FILES):
        there = f"{target}/{file['file']}"
        if not (system.exists(there) and system.size(there) == file["bytes"]):
            system.makedirs(there.rpartition("/")[0], exist_ok=True)
            system.put_file(str(newest / file["file"]), there)
    system.put_file(str(newest / FILES), f"{target}/{FILES}")
    for path in _steps(system, root).values():
        if path != target:
            system.rm(path, recursive=True)
    return True


def newest_at(url: str) -> tuple[int, list[FileEntry]] | None:
    """The step and files of the newest complete folder at ``url``; None if there is none."""
    system, root = fsspec.url_to_fs(url)
    found = _steps(system, root)
    if not found:
        return None
    step = max(found)
    return step, json.loads(system.cat_file(f"{found[step]}/{FILES}"))


def download(url: str, step: int, files: list[FileEntry], local: Path) -> None:
    """Copy the files of a step at ``url`` to the folder ``local``, except those already of the right size."""
    system, root = fsspec.url_to_fs(url)
    for file in files:
        here = local / file["file"]
        if not (here.is_file() and here.stat().st_size == file["bytes"]):
            here.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{root}/step_{step}/{file['file']}", str(here))


def remove(url: str) -> None:
    """Remove everything at ``url``."""
    system, root = fsspec.url_to_fs(url)
    if system.isdir(root):
        system.rm(root, recursive=True)
