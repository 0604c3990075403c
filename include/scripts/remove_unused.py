"""Remove corpora and token caches under FASTCPT_HOME that nothing refers to any more.

A corpus goes when no run's record names it, token ids when no build has used them; both only when
they were last used longer than ``--days`` ago. What is removed is made again when it is wanted:
recipe and documents are all that it comes from. Models, records and scores are never touched.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt import files

HOME = files.HOME.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=float, default=30.0, help="unused for so long; default 30")
    parser.add_argument("--dry_run", action="store_true", help="only say what would go")
    arguments = parser.parse_args()
    before = time.time() - arguments.days * 86_400
    freed = 0
    if not arguments.dry_run:
        for left in (*HOME.glob("corpora/.*.removed"), *HOME.glob("tokens/.*.removed")):
            shutil.rmtree(left)  # what a removal that was killed had begun
    for folder in unused(HOME, before):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        freed += size
        print(f"{size / 1e9:8.2f} GB  {folder}", flush=True)
        if not arguments.dry_run:
            # under another name first: half of a folder is never taken for the whole
            gone = folder.with_name(f".{folder.name}.removed")
            folder.rename(gone)
            shutil.rmtree(gone)
    print(f"{freed / 1e9:8.2f} GB  {'would be freed' if arguments.dry_run else 'freed'}")


def unused(home: Path, before: float) -> Iterator[Path]:
    """Folders last used before a time (seconds since 1970) that no record of a run names."""
    # by name, which is a digest: the folder of all may have been moved since
    named = {Path(path).name for path in corpora_of_runs(home)}
    for folder in sorted(path for path in home.glob("corpora/[!.]*") if path.is_dir()):
        if folder.name not in named and last_used(folder) < before:
            yield folder
    for folder in sorted(path for path in home.glob("tokens/[!.]*") if path.is_dir()):
        if last_used(folder) < before:
            yield folder


def corpora_of_runs(home: Path) -> Iterator[str]:
    """The corpora that the records of runs name. A record that cannot be read ends it all."""
    for file in home.glob("runs/*/outputs/build.json"):
        try:
            yield str(json.loads(file.read_text())["path"])
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"{file} cannot be read ({error!r}), so nothing is removed: mend or remove it")


def last_used(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


if __name__ == "__main__":
    main()
