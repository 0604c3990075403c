"""Supervised fine-tuning on instructions; started by ``deepspeed --num_gpus N``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed's file (JSON); else the recipe's")
    parser.add_argument("--model", required=True, type=Path, help="folder of the model to train")
    parser.add_argument("--instructions", required=True, type=Path, help="folder of train.jsonl")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--use_fp8", action="store_true", help="transformer-engine FP8 layers")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    args = parser.parse_args()
    if (args.output_dir / "training.json").is_file():
        print(f"{args.output_dir} is complete", flush=True)
        return
    recipe = load_recipe(args.config)
    if recipe.cluster.cpu_only:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from fastcpt.training.data import Rows
    from fastcpt.training.sft import Chat, save_tokenizer, sft_rows
    from fastcpt.training.trainer import train

    configs = Path(__file__).resolve().parents[1] / "configs"
    tokenizer = args.output_dir / "tokenizer"

    def rows() -> Rows:
        chat = Chat(args.model)
        save_tokenizer(chat, tokenizer)
        return sft_rows(args.instructions, chat, recipe.corpus.max_seq_length)

    train(
        recipe,
        recipe.sft.training,
        rows,
        model=str(args.model),
        tokenizer=tokenizer,
        output=args.output_dir,
        deepspeed_file=args.deepspeed or configs / recipe.sft.training.deepspeed,
        use_fp8=args.use_fp8,
    )


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
