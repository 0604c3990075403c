#!/usr/bin/env python3
"""The time, money and memory that a recipe takes on a cluster, before anything is paid for.

    plan_run.py --config cpt_config_fast --cluster 4xB200          one recipe
    plan_run.py --all --cluster 8xH100 --tokens 900000000          the eight options
    plan_run.py --cluster 4xB200 --hours 6 --budget 180 --out my.yaml
                                                                  the most tokens for that
    plan_run.py --cluster 4xB200 --take 2 --out my.yaml            alternative 2 as a recipe
    plan_run.py --check                                            predicted against measured

The exit status is 1 if the recipe does not fit, 2 if it cannot run at all or cannot be planned.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.files import HOME, read_json, whole_file
from fastcpt.planning.alternatives import Keep, numbered, own_recipe, placed
from fastcpt.planning.hardware import hardware_of
from fastcpt.planning.history import FILE
from fastcpt.planning.jobs import changed
from fastcpt.planning.matrix import matrix, matrix_markdown, matrix_picture, matrix_text
from fastcpt.planning.measured import check_rows, check_text
from fastcpt.planning.plan import estimated_tokens, plan
from fastcpt.planning.result import CannotRun, Plan, PlanRefused
from fastcpt.planning.solve import fewest_gpus, most_tokens
from fastcpt.recipe import DEFAULT_RECIPE, Recipe, load_recipe

HISTORY = HOME / FILE


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
        return 2 if isinstance(refused, CannotRun) else 1
    except (ValueError, OSError) as error:
        print(f"plan_run.py: {error}", file=sys.stderr)
        return 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--cluster", help="Such as 4xB200; default: the recipe's.")
    parser.add_argument("--model", help="Name or folder in place of the recipe's model.")
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument("--tokens", type=count, help="Tokens in the corpus.")
    corpus.add_argument("--manifest", type=Path, help="corpus_manifest.json of a build.")
    corpus.add_argument(
        "--documents_bytes", type=count, help="Bytes of the uncompressed documents."
    )
    parser.add_argument(
        "--history", type=Path, default=HISTORY, help=f"Earlier runs; {FILE} of FASTCPT_HOME."
    )
    parser.add_argument("--all", action="store_true", help="All eight published options.")
    parser.add_argument("--markdown", action="store_true", help="--all as a Markdown table.")
    parser.add_argument("--picture", type=Path, help="--all as a picture (.svg, .png).")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hours", type=amount, help="Solve: available hours.")
    parser.add_argument("--budget", type=amount, help="Solve: available money (USD).")
    parser.add_argument(
        "--solve_for", choices=["tokens", "gpus"], help="Most tokens (default), fewest GPUs."
    )
    parser.add_argument("--out", type=recipe_file, help="Write the planned recipe (YAML).")
    parser.add_argument("--take", type=count, help="For --out: the alternative with this number.")
    parser.add_argument(
        "--keep_model", action="store_true", help="No alternatives with another model."
    )
    parser.add_argument(
        "--keep_method", action="store_true", help="No alternatives with LoRA for full training."
    )
    parser.add_argument(
        "--check", action="store_true", help="Compare predicted and measured rates."
    )
    arguments = parser.parse_args()
    of_one = ("documents_bytes", "hours", "budget", "solve_for", "out", "take", "keep_model",
              "keep_method")  # fmt: skip
    given = [f"--{name}" for name in of_one if getattr(arguments, name) not in (None, False)]
    if given and (arguments.all or arguments.check):
        parser.error(f"{given[0]} is for one recipe: leave out --all and --check, or {given[0]}")
    if arguments.take is not None and arguments.out is None:
        parser.error("--take writes an alternative: say where with --out FILE.yaml")
    if arguments.solve_for and not solving(arguments):
        parser.error("--solve_for: nothing to solve for: give --hours, --budget or both")
    return arguments


def count(text: str) -> int:
    if not re.fullmatch(r"\+?[0-9_]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{text}'")
    return int(text)


def amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")
    return value


def recipe_file(text: str) -> Path:
    path = Path(text)
    named = re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", path.stem)
    if not named or path.suffix not in {".yaml", ".yml"}:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no recipe's file: a name of letters, digits, . _ - that ends in .yaml"
        )
    return path


def solving(arguments: argparse.Namespace) -> bool:
    return arguments.hours is not None or arguments.budget is not None


def one_recipe(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config)
    if arguments.model:
        recipe = changed(recipe, {"model.name_or_path": arguments.model, "model.config": None})
    tokens = corpus_tokens(arguments, recipe)
    if solving(arguments):
        limits = {"budget.hours": arguments.hours, "budget.money": arguments.budget}
        recipe = changed(recipe, limits)
    if arguments.take is not None:
        recipe, found = taken(arguments, recipe, tokens)
    else:
        recipe, found = with_plan(arguments, recipe, tokens)
    print(json.dumps(found.to_json(), indent=2) if arguments.json else found.text())
    if arguments.out and (found.fits or arguments.take is not None):
        with whole_file(arguments.out) as aside:
            aside.write_text(recipe.to_yaml(), encoding="utf-8")
        print(f"recipe written to {arguments.out}", file=sys.stderr)
    elif arguments.out:
        print(f"{arguments.out} not written: the recipe does not fit", file=sys.stderr)
    return 2 if found.problems else 0 if found.fits else 1


def with_plan(
    arguments: argparse.Namespace, recipe: Recipe, tokens: int | None
) -> tuple[Recipe, Plan]:
    """The recipe as it is, or solved for hours and money; with its plan."""
    cluster, history, keep = arguments.cluster, arguments.history, kept(arguments)
    if arguments.out:
        words = f"{recipe.name} as planned (plan_run.py)"
        if solving(arguments):
            words = solved_words(arguments, recipe)
        recipe = own_recipe(recipe, arguments.out.stem, words)
    if solving(arguments):
        solve = fewest_gpus if arguments.solve_for == "gpus" else most_tokens
        return solve(recipe, tokens, cluster, history, keep)
    if arguments.out:
        recipe = placed(recipe, hardware_of(recipe.cluster, cluster))
    return recipe, plan(recipe, tokens, cluster, history, keep)


def taken(arguments: argparse.Namespace, recipe: Recipe, tokens: int | None) -> tuple[Recipe, Plan]:
    """The alternative under ``--take`` as a recipe, and its plan."""
    cluster, history = arguments.cluster, arguments.history
    if solving(arguments):
        try:
            with_plan(arguments, recipe, tokens)
        except PlanRefused:
            pass  # the alternatives are in its plan
        else:
            raise ValueError(f"--take {arguments.take}: solved it fits, nothing else is listed")
    choice = numbered(plan(recipe, tokens, cluster, history, kept(arguments)), arguments.take)
    words = f"{recipe.name}: {choice.what} (plan_run.py)"
    recipe = own_recipe(recipe, arguments.out.stem, words, choice.changes)
    return recipe, plan(recipe, tokens, choice.cluster, history, kept(arguments))


def kept(arguments: argparse.Namespace) -> list[Keep]:
    keep: list[Keep] = ["model"] if arguments.keep_model else []
    return [*keep, "method"] if arguments.keep_method else keep


def solved_words(arguments: argparse.Namespace, recipe: Recipe) -> str:
    limits = [f"{arguments.hours:g} h"] if arguments.hours is not None else []
    limits += [f"${arguments.budget:,.0f}"] if arguments.budget is not None else []
    what = "The fewest GPUs" if arguments.solve_for == "gpus" else "The most tokens"
    return f"{what} of {recipe.name} for {' and '.join(limits)} (plan_run.py)"


def all_options(arguments: argparse.Namespace) -> int:
    tokens = arguments.tokens
    if arguments.manifest:
        tokens = manifest_tokens(arguments.manifest)
    rows = matrix(tokens, arguments.cluster, arguments.model, arguments.history)
    if arguments.picture:
        matrix_picture(rows, arguments.picture)
    if arguments.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print(matrix_markdown(rows) if arguments.markdown else matrix_text(rows))
    problems = dict.fromkeys(problem for row in rows for problem in row.plan.problems)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 0


def corpus_tokens(arguments: argparse.Namespace, recipe: Recipe) -> int | None:
    if arguments.manifest:
        return manifest_tokens(arguments.manifest)
    if arguments.documents_bytes is not None:
        return estimated_tokens(arguments.documents_bytes, recipe)
    tokens: int | None = arguments.tokens
    return tokens


def manifest_tokens(manifest: Path) -> int:
    tokens = read_json(manifest).get("tokens")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"--manifest {manifest}: 'tokens' must be a whole number above 0")
    return tokens


if __name__ == "__main__":
    sys.exit(main())
