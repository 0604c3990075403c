#!/usr/bin/env python3
"""Explain a document's score, component by component, and whether the document was selected."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.explain import explain
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.files import HOME
from fastcpt.recipe import DEFAULT_RECIPE, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("id", help="The document's id.")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help="Recipe, by name or file.")
    parser.add_argument("--input_dir", help="Folder or URL; default: the recipe's documents.")
    parser.add_argument("--tokenizer", help="Folder or tokenizer.json; default: the recipe's.")
    arguments = parser.parse_args()
    given = {
        key: value
        for key, value in (
            ("documents.path", arguments.input_dir),
            ("tokenizer.path", arguments.tokenizer),
        )
        if value
    }
    if arguments.tokenizer:
        given["tokenizer.train_vocab_size"] = None
    try:
        recipe = load_recipe(arguments.config, given)
        scores = score_parts(list_parts(recipe.documents), recipe, HOME)
        selection = select([score["path"] for score in scores], recipe, HOME)
        print(explain(arguments.id, selection["path"], recipe))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
