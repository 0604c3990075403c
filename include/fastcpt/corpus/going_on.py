"""The documents for a training that continues from the champion: new ones, and a replay of earlier ones."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcpt.corpus.budget import take_within
from fastcpt.corpus.fingerprint import spread
from fastcpt.corpus.selected import BuildError, Selected
from fastcpt.held_out import trained_on
from fastcpt.manifests import GoneOn
from fastcpt.recipe import Recipe
from fastcpt.recurring import Start

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
BEFORE = "trained_on_before"  # why a document is not trained on again
NEWEST = "validation_newest"


class NothingNew(BuildError):
    """The champion was trained on every document that would be trained on."""


def keep_new(
    documents: Selected, lengths: Ints, start: Start, recipe: Recipe, home: Path
) -> GoneOn:
    """Keep the training documents that the champion was not trained on, and a replay of the others.

    ``lengths`` are the tokens of every document. Earlier documents get the share ``recurring.replay``
    of the tokens, drawn by a hash of text and champion, so they differ each time. The newest acts that
    the champion was trained on no longer count in the evaluation. Raises ``NothingNew``, or
    ``HeldOutError`` if the ledger does not have the champion's training documents.
    """
    texts, works = trained_on(home, start["corpora"])
    newest = documents.rows(NEWEST)
    seen = np.isin(documents.content[newest], texts) | np.isin(documents.work_hash[newest], works)
    documents.split[newest[seen]] = BEFORE
    if recipe.gate.validation_set == "newest" and seen.all():
        raise BuildError(
            f"champion {start['model']} was trained on all of the newest acts, which are to judge "
            "(gate.validation_set): set it to random, or recurring.start to base"
        )
    train = documents.rows("train")
    known = np.isin(documents.content[train], texts)
    new, earlier = train[~known], train[known]
    if not len(new):
        raise NothingNew(
            f"nothing new: champion {start['model']} was trained on all {len(train)} documents"
        )
    seed = int(start["training"], 16)
    earlier = earlier[np.argsort(spread(documents.content[earlier].view(np.int64), seed))]
    replay = recipe.recurring.replay
    budget = math.floor(int(lengths[new].sum()) * replay / (1 - replay))
    again = take_within(lengths[earlier], budget)
    documents.split[earlier[~again]] = BEFORE
    tokens = int(lengths[new].sum()), int(lengths[earlier[again]].sum())
    log.info(
        "going on from %s: %d new documents of %d tokens, %d earlier ones of %d",
        *(start["model"], len(new), tokens[0], int(again.sum()), tokens[1]),
    )
    return {
        "model": start["model"],
        "new_documents": len(new),
        "new_tokens": tokens[0],
        "replayed_documents": int(again.sum()),
        "replayed_tokens": tokens[1],
        "all_tokens": int(lengths[train].sum()),
    }
