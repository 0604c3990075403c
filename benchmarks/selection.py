"""Selection over a generated score table: time and memory for ten million documents.

    python benchmarks/selection.py [--documents 10000000]

The table has everything that selection reads: components, dates, subject matters, four citations
per document, signatures; every twentieth document is a near-duplicate of another, every tenth an
older version of an act. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include"))

from fastcpt.corpus.fingerprint import BINS
from fastcpt.corpus.score import LEGAL_COMPONENTS, score_schema
from fastcpt.corpus.select import select
from fastcpt.files import write_json
from fastcpt.recipe import load_recipe

SUBJECTS = [f"Subject {n}" for n in range(40)]
KINDS = ["regulation", "directive", "decision", "recommendation"]


def columns_of(part: int, rows: int, documents: int) -> dict[str, Any]:
    """One part's columns of the score table."""
    rng = np.random.default_rng(part)
    first = part * rows
    numbers = np.arange(first, first + rows)
    # every tenth is a version of the previous document
    act = np.where(numbers % 10 == 9, numbers - 1, numbers)
    version = np.where(numbers % 10 == 8, 20_200_101, 0)
    hashes = (act.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    own = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    year = rng.integers(1980, 2026, rows)
    signatures = rng.integers(0, 1 << 16, (rows, BINS), dtype=np.uint16)
    # every twentieth agrees with the previous one in nine tenths of the entries
    again = np.arange(1, rows, 20)
    shared = rng.random((len(again), BINS)) < 0.9
    signatures[again] = np.where(shared, signatures[again - 1], signatures[again])
    cites = rng.integers(0, documents, rows * 4).astype(np.uint64) + np.uint64(1)
    pieces = np.maximum(20, rng.lognormal(8.5, 1.2, rows)).astype(np.int32)
    names = pa.array([f"doc-{number}" for number in numbers.tolist()])
    chosen = rng.integers(0, len(SUBJECTS), rows * 2)
    offsets = pa.array(np.arange(0, rows * 2 + 1, 2, dtype=np.int32))
    return {
        "position": numbers - first,
        "id": names,
        "id_hash": own,
        "content": own,
        "work": names,
        "named": np.ones(rows, dtype=bool),
        "work_hash": hashes,
        "version": version,
        "version_of": hashes,
        "date": year * 10_000 + 101,
        "year": year,
        "act_year": year,
        "doc_type": pa.array(KINDS).take(pa.array(rng.integers(0, 4, rows))),
        "title": pa.array(["An act"] * rows),
        "subjects": pa.ListArray.from_arrays(offsets, pa.array(SUBJECTS).take(pa.array(chosen))),
        "directory_code": pa.nulls(rows, pa.string()),
        "areas": pa.array([[]] * rows, pa.list_(pa.string())),
        "language": pa.array(["en"] * rows),
        "characters": pieces * 5,
        "bytes": pieces.astype(np.int64) * 5,
        "words": pieces,
        "pieces": pieces,
        "cites": pa.ListArray.from_arrays(
            pa.array(np.arange(0, rows * 4 + 1, 4, dtype=np.int32)),
            pa.array(cites * np.uint64(0x9E3779B97F4A7C15)),
        ),
        "signature": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(BINS * 2), rows, [None, pa.py_buffer(signatures.tobytes())]
        ),
        "sketch": pa.array([[]] * rows, pa.list_(pa.uint64())),
        "excerpt": pa.nulls(rows, pa.string()),
        **{f"score_{name}": rng.random(rows) for name in LEGAL_COMPONENTS},
    }


def write_part(folder: Path, part: int, rows: int, documents: int) -> Path:
    columns = columns_of(part, rows, documents)
    schema = score_schema("legal")
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
    path = folder / f"{part:05}"
    path.mkdir()
    pq.write_table(pa.table(arrays, schema=schema), path / "scores.parquet", compression="zstd")
    facts = {"digest": f"{part:016x}", "part": f"part-{part:05}", "source": "generated"}
    write_json(path / "manifest.json", facts | {"documents": rows, "unreadable": 0})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = min(200_000, arguments.documents)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.monotonic()
        scores = [
            str(write_part(folder, part, rows, arguments.documents))
            for part in range(arguments.documents // rows)
        ]
        generated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"generated in {time.monotonic() - started:.0f} s, {generated / 1e6:.2f} GB")
        recipe = load_recipe(
            "sample",
            {
                "selection.top_share": 0.4,
                "selection.quality_threshold": 30.0,
                "selection.target_tokens": 2_000 * arguments.documents,
            },
        )
        started, cpu = time.monotonic(), time.process_time()
        selection = select(scores, recipe, folder)
        figures = {
            "documents": arguments.documents,
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "kept": selection["kept"],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
