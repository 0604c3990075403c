"""A training that goes on from the recipe's champion: its settings, where it begins, its length.

It begins with the champion as it was before fine-tuning, and reads the documents that the champion was
not trained on and a replay of the others. The learning rate is warmed up and decays again; the number of
steps shrinks in proportion to the documents, so each is read as often as from the base model (A. Ibrahim
et al., Simple and Scalable Strategies to Continually Pre-train Large Language Models, 2024).
"""

from __future__ import annotations

import math
from typing import Literal, TypedDict

from pydantic import Field

from fastcpt.manifests import CorpusManifest
from fastcpt.recipe_sections import Section, Training


class Recurring(Section):
    start: Literal["base", "champion"] = Field(
        "base",
        description="champion: training goes on from the champion, on new documents and a replay.",
    )
    replay: float = Field(
        0.25,
        ge=0.0,
        lt=1.0,
        description="Share of its legal tokens that the champion was trained on before.",
    )


class Start(TypedDict):
    """``start.json`` of a record: the champion that a run goes on from."""

    model: str
    training: str  # its training before fine-tuning: models/<training>/final on the GPU host
    record: str  # the name of its run's record folder
    corpora: list[str]  # digests of all corpora it was trained on, the oldest first


def share_of_all(corpus: CorpusManifest) -> float:
    """The share of all documents' tokens that the corpus trains on: 1 for the base model."""
    gone_on = corpus.get("gone_on")
    if not gone_on:
        return 1.0
    return (gone_on["new_tokens"] + gone_on["replayed_tokens"]) / gone_on["all_tokens"]


def shortened(training: Training, share: float) -> Training:
    """The training for ``share`` (0..1) of the corpus's tokens: as many passes, the warm-up in proportion."""
    steps = max(1, math.ceil(training.max_steps * share))
    warmup = min(training.warmup_steps * steps // training.max_steps, steps - 1)
    return training.model_copy(update={"max_steps": steps, "warmup_steps": warmup})
