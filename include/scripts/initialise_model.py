"""Make a Llama with random weights, in the shape of the recipe's ``model.config``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--tokenizer", required=True, type=Path, help="its vocabulary's folder")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args()
    if (args.output_dir / "config.json").is_file():
        print(f"{args.output_dir} is complete", flush=True)
        return
    from fastcpt.training.model import initialise_model

    initialise_model(load_recipe(args.config), args.tokenizer, args.output_dir)


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
