"""The documents of a selection as columns, which the steps of a build work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcpt.corpus.documents import Document, read_documents
from fastcpt.manifests import SelectionManifest
from fastcpt.recipe_sections import Fields

Ints = npt.NDArray[np.int64]

HELD_OUT = ("validation", "validation_newest")  # splits, and the names of their folders


class BuildError(ValueError):
    """The corpus cannot be built from this selection; the message says what to change."""


@dataclass
class Selected:
    """The selection's documents as columns, one entry each; a dropped document keeps its row."""

    parts: list[tuple[str, str]]  # path, content identity
    fields: Fields
    part: Ints
    position: Ints
    split: npt.NDArray[Any]  # a name of SPLITS, or the build's reason for dropping it
    rank: Ints
    characters: Ints
    tokens: Ints  # estimated
    content: npt.NDArray[np.uint64]  # of the text
    work_hash: npt.NDArray[np.uint64]
    about: pa.Table  # id, work, bytes, year, doc_type, areas
    # row of a training document -> rows of held-out documents that share passages with it
    quoted: dict[int, list[int]] = field(default_factory=dict)
    held_out: Ints = field(init=False)  # rows held out by the selection; some may be dropped later
    frozen: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # never dropped

    def __post_init__(self) -> None:
        self.held_out = self.rows(*HELD_OUT)

    @classmethod
    def of_selection(cls, folder: Path, manifest: SelectionManifest, fields: Fields) -> Selected:
        table = pq.read_table(folder / "documents.parquet", filters=pc.field("split").is_valid())
        table = table.sort_by([("part", "ascending"), ("position", "ascending")])
        split = table["split"].cast(pa.string()).combine_chunks().dictionary_encode()
        return cls(
            parts=[(part["part"], part["source"]) for part in manifest["parts"]],
            fields=fields,
            part=table["part"].to_numpy().astype(np.int64),
            position=table["position"].to_numpy(),
            split=np.array(split.dictionary.to_pylist(), dtype=object)[split.indices.to_numpy()],
            rank=table["rank"].to_numpy(),
            characters=table["characters"].to_numpy().astype(np.int64),
            tokens=table["tokens"].to_numpy(),
            content=table["content"].to_numpy(),
            work_hash=table["work_hash"].to_numpy(),
            about=table.select(["id", "work", "bytes", "year", "doc_type", "areas"]),
        )

    def rows(self, *splits: str) -> Ints:
        return np.flatnonzero(np.isin(self.split, splits))

    def rows_at(self, part: int, positions: Ints) -> Ints:
        """The rows of a part's documents; rows are ordered by part and position."""
        begin, end = np.searchsorted(self.part, [part, part + 1]).tolist()
        rows: Ints = begin + np.searchsorted(self.position[begin:end], positions)
        return rows

    def by_part(self, rows: Ints) -> Iterator[tuple[str, str, Ints]]:
        """For each part with some of the (sorted) rows: path, content identity and positions."""
        bounds = np.searchsorted(self.part[rows], np.arange(len(self.parts) + 1)).tolist()
        for (part, source), (begin, end) in zip(self.parts, pairwise(bounds), strict=True):
            if begin < end:
                yield part, source, self.position[rows[begin:end]]

    def texts(self, rows: Ints) -> Iterator[str]:
        """The texts of the (sorted) rows, read from the documents."""
        for part, _, positions in self.by_part(rows):
            wanted = set(positions.tolist())
            for document in read_documents(part, self.fields, wanted=wanted):
                if isinstance(document, Document):
                    yield document.text
