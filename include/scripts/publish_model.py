"""Publish a trained model as a folder: merged weights, tokenizer and model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--model", required=True, type=Path, help="a training's final folder")
    parser.add_argument("--record", required=True, type=Path, help="the run's record")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.config)
    from fastcpt.training.publish import publish

    publish(recipe, args.model, args.record, args.output_dir)


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
