"""Perplexity of a model, and of its base, on held-out documents (docs/evaluation.md).

Runs by plain python on one device, or under deepspeed or torchrun on several.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a model folder, or the output of a training"
    )
    parser.add_argument("--validation_data", required=True, type=Path, help="a built corpus folder")
    parser.add_argument("--base_model", help="the model before training: evaluated beside it")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"))
    parser.add_argument("--config", help="the recipe (YAML): gate's set, dtype, attention")
    parser.add_argument("--batch_size", type=int, help="full windows at a time on a device")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    args = parser.parse_args()
    if not args.validation_data.is_dir():
        raise ValueError(f"--validation_data {args.validation_data}: there is no such folder")
    settings = {}
    if args.config:
        recipe = load_recipe(args.config)
        settings = {
            "gate_set": recipe.gate.validation_set,
            "attention": recipe.model.attn_implementation,
            "dtype": recipe.model.dtype,
        }
    from fastcpt.training.evaluation import evaluate

    evaluate(
        args.checkpoint,
        args.validation_data,
        args.output,
        base=args.base_model,
        batch_size=args.batch_size,
        **settings,
    )


if __name__ == "__main__":
    from fastcpt.training.exits import exit_code

    sys.exit(exit_code(main))
