"""Perplexity of a checkpoint, and of its base model, on the held-out documents."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="the trained model (or adapter)")
    parser.add_argument(
        "--validation_data", required=True, type=Path, help="a built corpus, or its validation/"
    )
    parser.add_argument("--base_model", help="evaluated too, to compare")
    parser.add_argument(
        "--base_evaluation",
        type=Path,
        help="an earlier evaluation, to reuse its figures for the same base model",
    )
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"))
    parser.add_argument("--config", help="the recipe (YAML)")
    parser.add_argument(
        "--in_parts",
        action="store_true",
        default=None,
        help="partition the model over all GPUs even if it fits one",
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    args = parser.parse_args()
    recipe = load_recipe(args.config) if args.config else None
    from fastcpt.training.evaluation import evaluate

    evaluate(
        args.checkpoint,
        args.validation_data,
        args.output,
        base=args.base_model,
        base_evaluation=args.base_evaluation,
        recipe=recipe,
        in_parts=args.in_parts,
    )


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
