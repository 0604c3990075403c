"""Files on the host: writing them, and answers for transfers."""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List

Answer = Dict[str, Any]
# Files hashed in parallel: hashlib releases the GIL.
READERS = 8


def expand(path: str) -> str:
    """An absolute path; relative paths start at the login's home."""
    return os.path.join(os.path.expanduser("~"), os.path.expanduser(path))


def write_whole(path: str, text: str, mode: int = 0o600) -> None:
    aside = f"{path}.{os.getpid()}.partial"
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        unlink(aside)
        raise


def write_if_room(path: str, value: Any) -> bool:
    """Write JSON if the disk has room; False if not. Watching and ending jobs must work on a full disk."""
    try:
        write_whole(path, json.dumps(value))
    except OSError:
        return False
    return True


def unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def json_or_none(path: str, kind: type) -> Any:
    """The content of a JSON file; None if it is missing, damaged or not a ``kind``."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


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
    """Mark a folder as complete."""
    write_whole(os.path.join(expand(folder), "READY"), digest + "\n")
    return {}


def listing(folder: str) -> Answer:
    """The files below a folder with sizes and digests, for a transfer back."""
    folder = expand(folder)
    if not os.path.isdir(folder):
        return {"error": f"no folder '{folder}' on the cluster"}
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
    """The text of small files; None for missing ones."""
    found: Answer = {}
    for name, path in paths.items():
        try:
            with open(expand(path), encoding="utf-8") as file:
                found[name] = file.read()
        except OSError:
            found[name] = None
    return found
