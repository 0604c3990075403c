"""Remove results that nothing needs and that can be made again, under FASTCPT_HOME or on a GPU host.

Corpora that no run's record names, selections and scores that no corpus needs, and token ids are removed
if they were last used more than ``--days`` ago. With ``--candidates N`` older candidates of each
recipe and the records and checkpoints of runs without a model are removed too; champions, their
predecessors, the newest N candidates, the last success of each schedule and their inputs stay. With
``--host`` the host is cleaned instead, by the same policy. See docs/models.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt import files
from fastcpt.cluster.remote import Remote, ask_through
from fastcpt.recipe_sections import Cluster
from fastcpt.registry.cleaning import clean, line
from fastcpt.registry.in_use import Policy, on_host

HOME = files.HOME.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=float, default=30.0, help="unused for this long; default 30")
    parser.add_argument(
        "--candidates", type=int, help="candidates of each recipe to keep; default: all"
    )
    parser.add_argument("--dry_run", action="store_true", help="only list what would be removed")
    parser.add_argument("--host", help="clean this GPU host; default: this machine")
    parser.add_argument("--root", default=Cluster.model_fields["root"].default, help="its root")
    for option in ("--port", "--user", "--key_file", "--known_hosts"):
        parser.add_argument(option, help="of the host")
    arguments = parser.parse_args()
    if arguments.candidates is not None and arguments.candidates < 0:
        parser.error("--candidates: 0 or more")
    policy, freed = Policy(arguments.days, arguments.candidates), 0
    try:
        if arguments.host:
            found = ask_through(
                _remote(arguments),
                "clean",
                root=arguments.root,
                remove=not arguments.dry_run,
                **on_host(HOME, policy),
            )["folders"]
            gone = iter([(Path(one["path"]), int(one["bytes"])) for one in found])
        else:
            gone = clean(HOME, policy, arguments.dry_run)
        for folder, size in gone:
            freed += size
            print(line(folder, size), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(line("would be freed" if arguments.dry_run else "freed", freed))


def _remote(arguments: argparse.Namespace) -> Remote:
    return Remote(
        arguments.host,
        arguments.user,
        int(arguments.port) if arguments.port else None,
        arguments.key_file,
        arguments.known_hosts,
    )


if __name__ == "__main__":
    main()
