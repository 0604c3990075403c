"""ROUGE-L and citation accuracy of a fine-tuned model on the held-out instructions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--model", required=True, help="the fine-tuned model (or adapter)")
    parser.add_argument("--base_model", help="answers a few of the prompts too, to be compared")
    parser.add_argument("--instructions", required=True, type=Path, help="folder of held_out.jsonl")
    parser.add_argument("--output", type=Path, default=Path("evaluation_sft.json"))
    parser.add_argument("--batch", type=int, help="prompts per batch and device")
    parser.add_argument(
        "--in_parts",
        action="store_true",
        default=None,
        help="partition the model over all GPUs even if it fits one",
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    args = parser.parse_args()
    recipe = load_recipe(args.config)
    from fastcpt.training.generation import BATCH, evaluate_sft

    evaluate_sft(
        recipe,
        args.model,
        args.instructions,
        args.output,
        batch=args.batch or BATCH,
        in_parts=args.in_parts,
        base=args.base_model,
    )


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
