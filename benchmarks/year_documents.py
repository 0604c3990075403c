"""The year's documents, from the generated sample, in their order of arrival; and the judges."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zstandard

from fastcpt.corpus.sample import generate_sample

Record = dict[str, Any]
JUDGES = 300  # documents that no decision sees
MORE = 800  # documents of the sample, for the judges and unreadable records


def stream_of(
    folder: Path, seed: int, documents: int, characters: int | None
) -> tuple[list[Record], list[str]]:
    """Documents in their order of arrival (the last comes first), and the texts of the judges.

    Of each document the middle ``characters``, as beginnings and ends are formulas; None: the whole.
    """
    generate_sample(folder / "sample", documents=MORE + documents, seed=seed)
    parsed = folder / "sample" / "parsed"
    packed = (parsed / "part-02.jsonl.zst").read_bytes()
    lines = [
        *(parsed / "part-00.jsonl").read_bytes().splitlines(),
        *gzip.decompress((parsed / "part-01.jsonl.gz").read_bytes()).splitlines(),
        *zstandard.ZstdDecompressor().decompress(packed).splitlines(),
    ]
    records = pq.read_table(parsed / "part-03.parquet").to_pylist()
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the sample has records that cannot be read
            continue
    records = [
        record
        for record in records
        if isinstance(record, dict) and isinstance(record.get("full_text") or None, str)
    ]
    if characters:
        for record in records:
            begin = max(0, (len(record["full_text"]) - characters) // 2)
            record["full_text"] = record["full_text"][begin : begin + characters]
    random.Random(seed).shuffle(records)
    judges = [record for record in records if record["id"].startswith("3")][:JUDGES]
    works = {record["id"][1:] for record in judges}
    stream = [record for record in records if not any(work in record["id"] for work in works)]
    return stream, [record["full_text"] for record in judges]
