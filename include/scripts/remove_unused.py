"""Remove what nothing needs any more, under FASTCPT_HOME and on a GPU host: results that can be made again.

Corpora that no run's record names, selections and scores that no corpus needs, and token ids go when
they were last used longer than ``--days`` ago. With ``--candidates N`` older candidates of each
recipe, the records of runs and checkpoints that came to no model go too: champions, their predecessors, the newest N candidates, the
last success of each schedule and all that these were made from stay. With ``--host`` the same policy
holds there instead. See docs/models.md.
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
    parser.add_argument("--days", type=float, default=30.0, help="unused for so long; default 30")
    parser.add_argument(
        "--candidates", type=int, help="candidates of each recipe that stay; all without it"
    )
    parser.add_argument("--dry_run", action="store_true", help="only say what would go")
    parser.add_argument("--host", help="clean this GPU host; without it, this machine")
    parser.add_argument("--root", default=Cluster.model_fields["root"].default, help="there")
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
