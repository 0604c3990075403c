#!/usr/bin/env python3
"""Tokenize and pack a folder of documents into training shards and validation sets.

All readable documents are used, without duplicates; `create_fast_cpt_corpus.py` writes a folder with
the best ones.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.corpus.build import MANIFEST, build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.funnel import funnel_table
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.files import HOME, read_json, whole_file
from fastcpt.recipe import DEFAULT_RECIPE, load_recipe
from fastcpt.recipe_sections import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True, help="Folder or URL of the documents.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_seq_length", type=int, help="Tokens per sequence.")
    parser.add_argument("--num_shards", type=int, help="Parquet files of training sequences.")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--tokenizer", help="Folder or tokenizer.json; default: the recipe's.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = {
        "documents.path": arguments.input_dir,
        "corpus.max_seq_length": arguments.max_seq_length,
        "corpus.num_shards": arguments.num_shards,
        "tokenizer.path": arguments.tokenizer,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    if arguments.tokenizer:
        given["tokenizer.train_vocab_size"] = None
    try:
        recipe = load_recipe(arguments.config, given)
        # the folder is already a selection: only duplicates are removed
        keep = recipe.selection.near_duplicate_threshold
        everything = Selection(near_duplicate_threshold=keep)
        recipe = recipe.model_copy(update={"selection": everything})
        scores = score_parts(list_parts(recipe.documents), recipe, HOME)
        selection = select([score["path"] for score in scores], recipe, HOME)
        corpus = build(selection["path"], recipe, HOME)
        _copy(Path(corpus["path"]), arguments.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(funnel_table(corpus["funnel"]))
    print(
        f"{corpus['tokens']:,} tokens in {corpus['sequences']:,} sequences, "
        f"{corpus['padding_share']:.2%} padding, {len(corpus['shards'])} shards "
        f"in {arguments.output_dir}"
    )


def _copy(corpus: Path, folder: Path) -> None:
    manifest = read_json(corpus / MANIFEST)
    if (folder / MANIFEST).exists():
        if read_json(folder / MANIFEST)["digest"] == manifest["digest"]:
            return
        raise ValueError(f"{folder} holds another corpus: give an empty folder")
    for name in [item["file"] for item in manifest["files"]] + [MANIFEST]:
        with whole_file(folder / name) as aside:
            shutil.copyfile(corpus / name, aside)


if __name__ == "__main__":
    main()
