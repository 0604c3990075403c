#!/usr/bin/env python3
"""What a recipe will take on a cluster, before anything is paid for.

    plan_run.py --config cpt_config_fast --cluster 4xB200          one recipe
    plan_run.py --all --cluster 8xH100 --tokens 900000000          the eight options
    plan_run.py --cluster 4xB200 --hours 6 --budget 180 --out my.yaml
                                                                  the most tokens for that
    plan_run.py --check                                            predicted against measured

The exit status is 1 where the recipe does not fit, 2 where it cannot be planned.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.files import read_json, whole_file
from fastcpt.planning.history import FILE
from fastcpt.planning.matrix import matrix, matrix_markdown, matrix_picture, matrix_text
from fastcpt.planning.measured import check_rows, check_text
from fastcpt.planning.plan import (
    PlanRefused,
    changed,
    estimated_tokens,
    plan,
)
from fastcpt.planning.solve import fewest_gpus, most_tokens
from fastcpt.recipe import DEFAULT_RECIPE, Recipe, load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
HISTORY = Path(os.environ.get("FASTCPT_HOME") or REPOSITORY / ".fastcpt") / FILE


def main() -> int:
    arguments = parsed()
    try:
        if arguments.check:
            rows = check_rows()
            print(check_text(rows))
            return 0 if all(row.holds for row in rows) else 1
        return all_options(arguments) if arguments.all else one_recipe(arguments)
    except PlanRefused as refused:
        print(refused, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"plan_run.py: {error}", file=sys.stderr)
        return 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--cluster", help="Such as 4xB200; the recipe's own without it.")
    parser.add_argument("--model", help="Name or folder in place of the recipe's model.")
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument("--tokens", type=int, help="Tokens of the corpus.")
    corpus.add_argument("--manifest", type=Path, help="corpus_manifest.json of a build.")
    corpus.add_argument("--documents_bytes", type=int, help="Bytes of the documents, unpacked.")
    parser.add_argument(
        "--history", type=Path, default=HISTORY, help=f"Earlier runs; {FILE} of FASTCPT_HOME."
    )
    parser.add_argument("--all", action="store_true", help="All eight published options.")
    parser.add_argument("--markdown", action="store_true", help="--all as a Markdown table.")
    parser.add_argument("--picture", type=Path, help="--all as a picture (.svg, .png).")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hours", type=float, help="Solve: the hours there are.")
    parser.add_argument("--budget", type=float, help="Solve: the money there is (USD).")
    parser.add_argument(
        "--solve_for",
        choices=["tokens", "gpus"],
        default="tokens",
        help="Most tokens, fewest GPUs.",
    )
    parser.add_argument("--out", type=Path, help="Solve: the recipe's file (YAML).")
    parser.add_argument("--check", action="store_true", help="Predicted against measured rates.")
    return parser.parse_args()


def one_recipe(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config)
    if arguments.model:
        recipe = changed(recipe, {"model.name_or_path": arguments.model, "model.config": None})
    tokens = corpus_tokens(arguments, recipe)
    solving = arguments.hours is not None or arguments.budget is not None
    if solving:
        limits = {"budget.hours": arguments.hours, "budget.money": arguments.budget}
        solve = most_tokens if arguments.solve_for == "tokens" else fewest_gpus
        recipe = changed(recipe, limits)
        if arguments.out:
            # a recipe of its own: no claim of the guide's is about it
            own = {"name": arguments.out.stem, "description": solved_words(arguments, recipe)}
            recipe = changed(recipe, {**own, "claim": None})
        recipe, found = solve(recipe, tokens, arguments.cluster, arguments.history)
        if arguments.out:
            with whole_file(arguments.out) as aside:
                aside.write_text(recipe.to_yaml(), encoding="utf-8")
    else:
        found = plan(recipe, tokens, arguments.cluster, arguments.history)
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.text())
    if solving and arguments.out:
        print(f"recipe written to {arguments.out}", file=sys.stderr)
    return 0 if found.fits else 1


def solved_words(arguments: argparse.Namespace, recipe: Recipe) -> str:
    limits = [f"{arguments.hours:g} h"] if arguments.hours is not None else []
    limits += [f"${arguments.budget:,.0f}"] if arguments.budget is not None else []
    what = "The most tokens" if arguments.solve_for == "tokens" else "The fewest GPUs"
    return f"{what} of {recipe.name} for {' and '.join(limits)} (plan_run.py)"


def all_options(arguments: argparse.Namespace) -> int:
    tokens = arguments.tokens
    if arguments.manifest:
        tokens = int(read_json(arguments.manifest)["tokens"])
    rows = matrix(tokens, arguments.cluster, arguments.model, arguments.history)
    if arguments.picture:
        matrix_picture(rows, arguments.picture)
    if arguments.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print(matrix_markdown(rows) if arguments.markdown else matrix_text(rows))
    return 0


def corpus_tokens(arguments: argparse.Namespace, recipe: Recipe) -> int | None:
    if arguments.manifest:
        return int(read_json(arguments.manifest)["tokens"])
    if arguments.documents_bytes is not None:
        return estimated_tokens(arguments.documents_bytes, recipe)
    return arguments.tokens


if __name__ == "__main__":
    sys.exit(main())
