"""Merge a trained adapter into its base: one folder that transformers loads."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=Path, help="a training's final, or one of its areas/"
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} is there already: give another")
    from transformers import AutoTokenizer

    from fastcpt.training.publish import merge_lora

    model, merged = merge_lora(args.model, args.dtype)
    if not merged:
        raise ValueError(f"--model {args.model} is no adapter: there is nothing to merge")
    partial = args.output_dir.with_name(f".{args.output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))
    AutoTokenizer.from_pretrained(str(args.model)).save_pretrained(str(partial))
    partial.rename(args.output_dir)
    print(f"merged into {args.output_dir}")


if __name__ == "__main__":
    from fastcpt.training.exits import end

    end(main)
