#!/usr/bin/env python3
"""What a recipe will take on a cluster, before anything is paid for."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.planning.plan import plan
from fastcpt.recipe import DEFAULT_RECIPE, load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--cluster", help="For example 4xB200; the recipe's own without it.")
    parser.add_argument("--tokens", type=int, help="Tokens of the corpus.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        found = plan(load_recipe(arguments.config), arguments.tokens, arguments.cluster)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.text())
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main())
