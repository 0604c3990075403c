"""Continued pre-training; started by ``deepspeed --num_gpus N`` (docs/cluster.md)."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recurring import share_of_all, shortened


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--deepspeed", required=True, type=Path, help="DeepSpeed's file (JSON)")
    parser.add_argument("--data_dir", required=True, type=Path, help="a built corpus folder")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1")
    parser.add_argument("--model", help="folder of the model to train; else the recipe's")
    parser.add_argument("--use_fp8", action="store_true", help="transformer-engine FP8 layers")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    return parser.parse_args()


def base_model(recipe: Recipe, given: str | None) -> str:
    """The model to train. Raises ``ValueError`` if the recipe's model has to be initialised first."""
    model = given or recipe.model.name_or_path
    if model is None:
        raise ValueError(
            "the recipe initialises a model (model.config): make it with "
            "scripts/initialise_model.py and give its folder as --model"
        )
    return model


def main() -> None:
    args = arguments()
    if (args.output_dir / "training.json").is_file():
        print(f"{args.output_dir} is complete", flush=True)
        return
    recipe = load_recipe(args.config)
    if recipe.cluster.cpu_only:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    model = base_model(recipe, args.model)
    from fastcpt.training.data import AreaRows, CorpusRows, Rows, decode_corpus, manifest_of
    from fastcpt.training.ranks import once_a_host
    from fastcpt.training.trainer import train
    from fastcpt.training.validation import tokens_read

    size = recipe.corpus.max_seq_length
    scratch = args.output_dir / "rows" / socket.gethostname()

    areas = recipe.lora.areas if recipe.lora else {}

    def rows() -> Rows | dict[str, Rows]:
        decoded = once_a_host(lambda: str(decode_corpus(args.data_dir, size, scratch, areas)))
        if areas:
            return {area: AreaRows(Path(decoded), size, n) for n, area in enumerate(areas)}
        return CorpusRows(Path(decoded), size)

    training = recipe.stage2 if args.stage == "stage2" else recipe.training
    training = shortened(training, share_of_all(manifest_of(args.data_dir)))
    evaluated = 0
    if training.time_budget_hours and any(args.data_dir.glob("validation*")):
        evaluated = 2 * tokens_read(args.data_dir, size)  # the trained model and its base
    train(
        recipe,
        training,
        rows,
        model=model,
        tokenizer=args.data_dir / "tokenizer",
        output=args.output_dir,
        deepspeed_file=args.deepspeed,
        use_fp8=args.use_fp8,
        evaluated_tokens=evaluated,
    )


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
