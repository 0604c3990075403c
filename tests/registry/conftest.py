"""A home in which models can be registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcpt.files import write_json
from fastcpt.held_out import HELD_OUT_SCHEMA, TEXTS_SCHEMA, write_ledger

GOOD = {"what": "bits", "value": 0.1, "low": 0.1, "high": 0.1, "bound": 0.0, "met": True}


def add_corpus(home: Path) -> None:
    """Add the corpus ``c``, on which models were trained."""
    write_ledger(home, "c", TEXTS_SCHEMA.empty_table(), HELD_OUT_SCHEMA.empty_table())
    (home / "corpora" / "c" / "tokenizer").mkdir(parents=True)
    write_json(home / "corpora" / "c" / "corpus_manifest.json", {"selection": "s"})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a corpus that models were trained on."""
    add_corpus(tmp_path)
    return tmp_path
