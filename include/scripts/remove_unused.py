"""Remove what nothing under FASTCPT_HOME needs any more: results that can be made again.

Corpora that no run's record names, selections and scores that no corpus needs, and token ids go when
they were last used longer than ``--days`` ago. With ``--candidates N`` older candidates of each
recipe, the records of runs and checkpoints that came to no model go too: champions, their predecessors, the newest N candidates, the
last success of each schedule and all that these were made from stay. See docs/models.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt import files
from fastcpt.registry.in_use import Policy, unused

HOME = files.HOME.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=float, default=30.0, help="unused for so long; default 30")
    parser.add_argument(
        "--candidates", type=int, help="candidates of each recipe that stay; all without it"
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would go")
    arguments = parser.parse_args()
    if arguments.candidates is not None and arguments.candidates < 0:
        parser.error("--candidates: 0 or more")
    try:
        gone = unused(HOME, Policy(arguments.days, arguments.candidates))
    except ValueError as error:
        sys.exit(str(error))
    if not arguments.dry_run:
        for left in HOME.glob("*/.*.removed"):
            shutil.rmtree(left)  # what a removal that was killed had begun
    freed = 0
    for folder in gone:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        freed += size
        print(f"{size / 1e9:8.2f} GB  {folder}", flush=True)
        if not arguments.dry_run:
            # under another name first: half of a folder is never taken for the whole
            aside = folder.with_name(f".{folder.name}.removed")
            folder.rename(aside)
            shutil.rmtree(aside)
    print(f"{freed / 1e9:8.2f} GB  {'would be freed' if arguments.dry_run else 'freed'}")


if __name__ == "__main__":
    main()
