"""Documents made for tests."""

from __future__ import annotations

import random
from typing import Any

Record = dict[str, Any]


def text_of(seed: int, words: int = 120) -> str:
    """Text that shares no run of words with that of another seed."""
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices("abcdefghiklmnoprstuv", k=rng.randint(2, 9))) for _ in range(words)
    )


def record(identifier: str, text: str, **metadata: Any) -> Record:
    metadata = {"doc_type": "regulation", "date": "2020-01-01", "language": "en"} | metadata
    return {"id": identifier, "full_text": text, "metadata": metadata}


def act(number: int, year: int = 2020, words: int = 120, **metadata: Any) -> Record:
    """A regulation with a text of its own."""
    celex = f"3{year}R{number:04}"
    text = text_of(year * 10_000 + number, words)
    return record(celex, text, **({"celex": celex, "date": f"{year}-05-01"} | metadata))
