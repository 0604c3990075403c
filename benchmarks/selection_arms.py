"""The arms of ``selection_value.py``: ways to spend a budget of tokens on one pool of documents.

An arm is a function of the pool, the budget and a random generator; it returns spans of the
pool's tokens: an array ``[n, 2]`` of begin and length, in the pool's order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from selection_pool import Pool

from fastcpt.corpus.budget import cut_for, take_within
from fastcpt.files import whole_file

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

POINTS_A_DOUBLING = (
    12.0  # ``short-legal`` subtracts these from the score per doubling of the length
)
PASSAGE = 512  # tokens
RUNNING = 0.7  # a passage with less running text is a table, a form or a list of codes
HALF_LIFE = 15.0  # years, as in the score's recency


# The trivial arms


def lots(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """Whole documents drawn at random."""
    return _whole(pool, drawn.permutation(len(pool.length)), budget)


def shortest(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    return _whole(pool, np.argsort(pool.length, kind="stable"), budget)


def head(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """Every document cut at one number of tokens."""
    return np.stack([pool.begin, np.minimum(pool.length, cut_for(pool.length, budget))], axis=1)


def window(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """As many tokens of every document as ``head`` takes, from a random place."""
    taken = np.minimum(pool.length, cut_for(pool.length, budget))
    return np.stack([pool.begin + drawn.integers(0, pool.length - taken + 1), taken], axis=1)


def whole_pool(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    return np.stack([pool.begin, pool.length], axis=1)


# By score


def legal(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    return _whole(pool, np.argsort(pool.table["legal_rank"].to_numpy()), budget)


def published(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    return _whole(pool, np.argsort(pool.table["published_rank"].to_numpy()), budget)


def short_legal(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """The legal score minus points for length."""
    score = pool.table["legal"].to_numpy() - POINTS_A_DOUBLING * np.log2(pool.length)
    return _whole(pool, np.argsort(-score, kind="stable"), budget)


# Passages


def articles(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """Every document's running text, without tables and lists of codes, cut at one length."""
    begin, length, document = passages(pool)
    return _heads_of(
        pool, begin, length, document, _running(pool, begin, length) >= RUNNING, budget
    )


def unrepeated(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """Every document without passages that mostly repeat earlier documents, cut at one length."""
    begin, length, document = passages(pool)
    grams = _grams(pool.ids, 8)
    of = np.repeat(np.arange(len(begin)), length)
    _, first, which = np.unique(grams, return_index=True, return_inverse=True)
    again = np.bincount(of, (document[of] != document[of[first[which]]]).astype(float), len(begin))
    return _heads_of(pool, begin, length, document, again / length < 0.5, budget)


def novel(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """The passages that together cover most of the content that the pool's documents share."""
    return _covering(pool, budget, np.ones(len(pool.length)))


def novel_recent(pool: Pool, budget: int, drawn: np.random.Generator) -> Ints:
    """``novel``, with more weight for newer documents."""
    year = pool.table["year"].to_numpy().astype(float)
    age = np.maximum(0.0, np.quantile(year, 0.99) - np.where(year > 0, year, np.median(year)))
    return _covering(pool, budget, 0.5 ** (age / HALF_LIFE))


Arm = Callable[[Pool, int, np.random.Generator], Ints]
ARMS: dict[str, Arm] = {
    "lots": lots,
    "shortest": shortest,
    "head": head,
    "window": window,
    "all": whole_pool,
    "legal": legal,
    "published": published,
    "short-legal": short_legal,
    "articles": articles,
    "unrepeated": unrepeated,
    "novel": novel,
    "novel-recent": novel_recent,
}
TRIVIAL = ("lots", "shortest", "head", "window", "all")
DRAWN = ("lots", "window")  # arms that choose documents or places by the seed


def spans_of(arm: str, seed: int, pool: Pool, budget: int, folder: Path) -> Ints:
    """An arm's spans, computed once and kept in ``folder``."""
    drawn = seed if arm in DRAWN else 0
    file = folder / f"{arm}-{drawn}-{budget}.npy"
    if not file.is_file():
        spans = ARMS[arm](pool, budget, np.random.default_rng([1, drawn]))
        with whole_file(file) as aside, aside.open("wb") as out:
            np.save(out, spans[np.argsort(spans[:, 0])])
    found: Ints = np.load(file)
    return found


def _whole(pool: Pool, order: Ints, budget: int) -> Ints:
    rows = order[take_within(pool.length[order], budget)]
    return np.stack([pool.begin[rows], pool.length[rows]], axis=1)


def passages(pool: Pool) -> tuple[Ints, Ints, Ints]:
    """Begin, length and document of all passages of ``PASSAGE`` tokens."""
    counts = -(-pool.length // PASSAGE)
    document = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = pool.begin[document] + place * PASSAGE
    return begin, np.minimum(PASSAGE, (pool.begin + pool.length)[document] - begin), document


def _heads_of(
    pool: Pool,
    begin: Ints,
    length: Ints,
    document: Ints,
    wanted: npt.NDArray[np.bool_],
    budget: int,
) -> Ints:
    """The first wanted passages of every document, as many as the budget allows."""
    left = np.where(wanted, length, 0)
    most = cut_for(np.bincount(document, left, len(pool.length)).astype(np.int64), budget)
    before = np.cumsum(left) - left
    before -= before[np.searchsorted(document, document)]
    taken = np.clip(most - before, 0, left)
    return merged(np.stack([begin, taken], axis=1)[taken > 0], pool)


def merged(spans: Ints, pool: Pool) -> Ints:
    """Spans in order, with adjacent spans of a document merged."""
    spans = spans[np.argsort(spans[:, 0])]
    ends = spans.sum(axis=1)
    apart = np.ones(len(spans), dtype=bool)
    apart[1:] = (ends[:-1] != spans[1:, 0]) | np.isin(spans[1:, 0], pool.begin)
    first = np.flatnonzero(apart)
    last = np.append(first[1:], len(spans)) - 1
    return np.stack([spans[first, 0], ends[last] - spans[first, 0]], axis=1)


def _running(pool: Pool, begin: Ints, length: Ints) -> Floats:
    """Each passage's share of characters in running text, as the score counts it."""
    from tokenizers import Tokenizer

    from fastcpt.corpus.fingerprint import fingerprint

    words = Tokenizer.from_file(str(pool.tokenizer))
    ids = [
        pool.ids[b : b + n].tolist() for b, n in zip(begin.tolist(), length.tolist(), strict=True)
    ]
    shares = []
    for first in range(0, len(ids), 4096):
        for text in words.decode_batch(ids[first : first + 4096]):
            shares.append(fingerprint(text).running / max(1, len(text)))
    return np.array(shares)


def _grams(ids: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.uint64]:
    """A hash of the ``size`` tokens that end at each token."""
    words = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    hashed = np.zeros(len(ids), dtype=np.uint64)
    for back in range(size):
        shifted = np.concatenate([np.zeros(back, np.uint64), words[: len(words) - back]])
        hashed = hashed * np.uint64(0xBF58476D1CE4E5B9) + shifted
    return hashed ^ (hashed >> np.uint64(31))


def _covering(pool: Pool, budget: int, weight: Floats) -> Ints:
    """Passages chosen one by one, each for what it adds to the sum over n-grams of w log(1 + c).

    c is the n-gram's count in the chosen passages, w its weighted count over the documents, without
    n-grams that occur in only one document. The sum is submodular: the
    greedy choice reaches 63 % of the best one (Nemhauser et al. 1978), and a passage's gain only
    falls, so most passages need not be evaluated again (Minoux 1978).
    """
    begin, length, _ = passages(pool)
    gram, value = shared_grams(pool, np.repeat(np.arange(len(pool.length)), pool.length), weight)
    found = gram >= 0
    counts = np.zeros(len(value))
    features = []
    for b, n in zip(begin.tolist(), length.tolist(), strict=True):
        own = gram[b : b + n][found[b : b + n]]
        features.append(np.unique(own, return_counts=True))

    def gain(passage: int) -> float:
        grams, times = features[passage]
        have = counts[grams]
        return float(value[grams] @ (np.log1p(have + times) - np.log1p(have))) / length[passage]

    heap = [(-gain(n), n) for n in range(len(begin))]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and budget >= PASSAGE:
        _, best = heapq.heappop(heap)
        now = gain(best)
        if heap and now < -heap[0][0] - 1e-12:
            heapq.heappush(heap, (-now, best))
            continue
        chosen.append(best)
        counts[features[best][0]] += features[best][1]
        budget -= int(length[best])
    return merged(np.stack([begin, length], axis=1)[np.array(chosen)], pool)


def shared_grams(pool: Pool, document: Ints, weight: Floats, size: int = 3) -> tuple[Ints, Floats]:
    """Each token's n-gram (-1 if only one document has it), and the n-grams' values."""
    hashes = _grams(pool.ids, size)
    _, gram = np.unique(hashes, return_inverse=True)
    order = np.lexsort((document, gram))
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (gram[order][1:] != gram[order][:-1]) | (
        document[order][1:] != document[order][:-1]
    )
    grams = int(gram.max()) + 1
    of_documents = np.bincount(gram[order][fresh], minlength=grams)
    times = np.bincount(gram, weight[document], grams)
    kept = of_documents > 1
    number = np.full(grams, -1)
    number[kept] = np.arange(int(kept.sum()))
    return number[gram], times[kept]
