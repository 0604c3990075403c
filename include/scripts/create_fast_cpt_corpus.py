#!/usr/bin/env python3
"""Score documents, select the best, and write these as a folder of JSONL (.zst) files.

`cpt_corpus_builder.py --input_dir` reads that folder, which also contains `funnel.md`. `explain.py ID`
says why a document was selected or not.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.export import export_documents
from fastcpt.corpus.funnel import funnel_table
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.tokenizer import TokenizerError, find_tokenizer
from fastcpt.files import HOME, read_json, whole_file, write_json
from fastcpt.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from fastcpt.recipe_sections import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True, help="Folder or URL of the documents.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--target_tokens", type=int, help="Token budget; default: the recipe's.")
    parser.add_argument("--quality_threshold", type=float, help="Least score of a document.")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--tokenizer", help="Folder or tokenizer.json; default: the recipe's.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = {
        "documents.path": arguments.input_dir,
        "selection.target_tokens": arguments.target_tokens,
        "selection.quality_threshold": arguments.quality_threshold,
        "tokenizer.path": arguments.tokenizer,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    given["selection.max_document_tokens"] = None  # documents are written whole
    if arguments.tokenizer:
        given["tokenizer.train_vocab_size"] = None
    try:
        recipe = _with_some_tokenizer(load_recipe(arguments.config, given))
        scores = score_parts(list_parts(recipe.documents), recipe, HOME)
        selection = select([score["path"] for score in scores], recipe, HOME)
        made_of = arguments.output_dir / ".selection.json"
        if made_of.exists() and read_json(made_of)["digest"] == selection["digest"]:
            print(f"{arguments.output_dir} holds this selection already")
            return
        if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
            sys.exit(f"{arguments.output_dir} holds something else: give an empty folder")
        documents = export_documents(
            selection["path"], recipe.documents.fields, arguments.output_dir
        )
        with whole_file(arguments.output_dir / "funnel.md") as aside:
            aside.write_text(funnel_table(selection["funnel"]) + "\n", encoding="utf-8")
        write_json(made_of, {"digest": selection["digest"], "documents": documents})
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(funnel_table(selection["funnel"]))
    print(f"{documents} documents in {arguments.output_dir}")


def _with_some_tokenizer(recipe: Recipe) -> Recipe:
    """If the model's tokenizer is not on this machine, tokens are estimated from words."""
    try:
        find_tokenizer(recipe)
    except TokenizerError as error:
        if recipe.tokenizer.path:
            raise
        print(f"tokens are estimated from words: {error}", file=sys.stderr)
        # for a tokenizer that is trained later, the selection counts a typical number of tokens per word
        trained_later = Tokenizer(train_vocab_size=128_000)
        return recipe.model_copy(update={"tokenizer": trained_later})
    return recipe


if __name__ == "__main__":
    main()
