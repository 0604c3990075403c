#!/usr/bin/env python3
"""Show a recipe's models and its champion; promote a model, roll back to the previous champion, or retire it."""

import argparse
import getpass
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.files import HOME
from fastcpt.recipe import DEFAULT_RECIPE
from fastcpt.registry import champion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="The recipe's name.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("show", help="Models, champion and history.")
    promote = actions.add_parser("promote", help="Make a model the champion.")
    promote.add_argument("model", help="A folder's name under models/.")
    rollback = actions.add_parser("rollback", help="Go back to the previous champion.")
    retire = actions.add_parser(
        "retire", help="Have no champion; tokenizer and set can change again."
    )
    for action in (promote, rollback, retire):
        action.add_argument("--why", required=True, help="Recorded with your name.")
    arguments = parser.parse_args()
    try:
        print(_done(arguments))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def _done(arguments: argparse.Namespace) -> str:
    recipe = arguments.recipe
    if arguments.action == "show":
        return _shown(recipe)
    who, why = getpass.getuser(), arguments.why
    if arguments.action == "promote":
        return champion.promote(HOME, recipe, arguments.model, who, why)
    if arguments.action == "rollback":
        return champion.rollback(HOME, recipe, who, why)
    return champion.retire(HOME, recipe, who, why)


def _shown(recipe: str) -> str:
    best, before = champion.champion(HOME, recipe), champion.predecessor(HOME, recipe)
    lines = [f"champion of {recipe}: {best or 'none'}; rollback goes to: {before or 'none'}"]
    for name, facts in champion.models(HOME, recipe).items():
        removed = Path(facts["path"]).is_absolute() and not (HOME / "models" / name).is_dir()
        standing = "champion" if name == best else "removed" if removed else "candidate"
        lines.append(f"{standing:9}  {name}  {facts['path']}  run {facts['run']}")
    for event in champion.events(HOME, recipe):
        lines.append(
            f"{event['time']}  {event['what']}  {event['model'] or ''}  {event['who']}: {event['why']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
