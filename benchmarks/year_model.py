"""The year's small language model: trigram counts, interpolated with those of a base model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Counts(NamedTuple):
    """How often each sequence of one, two and three tokens occurs in the training data."""

    keys: tuple[Ids, Ids, Ids]
    values: tuple[Ids, Ids, Ids]
    vocabulary: int

    @classmethod
    def of(cls, documents: Iterable[Ids], vocabulary: int) -> Counts:
        every = [sequences(one, vocabulary) for one in documents]
        found = [
            np.unique(np.concatenate([one[n] for one in every]), return_counts=True)
            for n in range(3)
        ]
        keys, values = zip(*found, strict=True)
        return cls(keys, values, vocabulary)

    def shares(self, ids: Ids) -> tuple[Floats, ...]:
        """The probability of each token from the third on, given none, one and two preceding tokens."""
        found = [
            self._count(n, key[2 - n :]) for n, key in enumerate(sequences(ids, self.vocabulary))
        ]
        before = [
            np.full(len(found[0]), self.values[0].sum()),
            self._count(0, ids[1:-1]),
            self._count(1, sequences(ids, self.vocabulary)[1][:-1]),
        ]
        return tuple(
            np.divide(a, b, out=np.zeros(len(a)), where=b > 0)
            for a, b in zip(found, before, strict=True)
        )

    def _count(self, length: int, keys: Ids) -> npt.NDArray[np.float64]:
        known = self.keys[length]
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[place] == keys, self.values[length][place], 0).astype(np.float64)


def sequences(ids: Ids, vocabulary: int) -> tuple[Ids, Ids, Ids]:
    two = ids[:-1] * vocabulary + ids[1:]
    return ids, two, two[:-1] * vocabulary + ids[2:]


class Model(NamedTuple):
    """``rate``: the weight of what was learnt; the rest is the base model's."""

    base: Counts
    learnt: Counts
    rate: float

    def read(self, documents: Iterable[Ids]) -> Read:
        texts = list(documents)
        ends = np.cumsum([len(ids) - 2 for ids in texts])
        learnt, base = (
            np.concatenate([_likelihoods(counts, ids) for ids in texts])
            for counts in (self.learnt, self.base)
        )
        return Read(learnt, base, ends)


class Read(NamedTuple):
    """The probability of each token of some documents by what a model learnt, and by its base model."""

    learnt: Floats
    base: Floats
    ends: Ids

    def losses(self, rate: float) -> list[float]:
        """The summed loss (nats) of each document without its first two tokens; rate 0 is the base model."""
        nats = -np.log(rate * self.learnt + (1 - rate) * self.base)
        return np.diff(np.cumsum(nats)[self.ends - 1], prepend=0.0).tolist()

    def nats(self, rate: float) -> float:
        return float(-np.log(rate * self.learnt + (1 - rate) * self.base).sum())


def _likelihoods(counts: Counts, ids: Ids) -> Floats:
    one, two, three = counts.shares(ids)
    return 0.5 * three + 0.3 * two + 0.19 * one + 0.01 / counts.vocabulary


def weaker(judges: Read, rate: float, nats: float) -> float:
    """The rate below ``rate`` at which a model's loss on the judges is ``nats`` (bisection)."""
    low = 0.0
    for _ in range(30):
        middle = (low + rate) / 2
        low, rate = (middle, rate) if judges.nats(middle) > nats else (low, middle)
    return rate
