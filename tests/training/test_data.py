"""Loading a corpus for training: memory and disk use, and which rank reads what."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fastcpt.files import sha256_of_file, write_json
from fastcpt.training.data import (
    CorpusRows,
    DataError,
    ListRows,
    Order,
    Reader,
    Row,
    decode_corpus,
    make_batch,
    targets_of,
)
from training.conftest import INCLUDE, write_shards

SEQUENCE, GROUP = 2048, 256  # tokens of a row, rows of a row group


def random_corpus(folder: Path, tokens: int, vocabulary: int) -> Path:
    """One shard of so many drawn tokens, two segments a row, written a row group at a time."""
    folder.mkdir()
    shard = folder / "cpt_train_shard_00.parquet"
    kind = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", kind), ("lengths", kind)])
    drawn = np.random.default_rng(0)
    pieces = pa.array([[2000, 48]] * GROUP, kind)
    ends = pa.array(np.arange(GROUP + 1, dtype=np.int32) * SEQUENCE)
    with parquet.ParquetWriter(shard, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(tokens // (GROUP * SEQUENCE)):
            ids = drawn.integers(0, vocabulary, GROUP * SEQUENCE, dtype=np.int32)
            rows = pa.ListArray.from_arrays(ends, pa.array(ids))
            writer.write_table(pa.table([rows, pieces], schema=schema))
    entry = {"file": shard.name, "bytes": shard.stat().st_size, "sha256": sha256_of_file(shard)}
    write_json(folder / "corpus_manifest.json", {"files": [entry]})
    return folder


# What a rank does, but for the products: every row once, in the training's order.
READS_ALL = """
import sys
from pathlib import Path
from fastcpt.training.data import CorpusRows, Order, decode_corpus
corpus, scratch = map(Path, sys.argv[1:])
rows = CorpusRows(decode_corpus(corpus, 2048, scratch), 2048)
order, tokens = Order(len(rows), 0), 0
for n in range(len(rows)):
    tokens += len(rows[order[n]].input_ids)
# VmHWM: getrusage's peak would be that of the process that started this one, where it is larger
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(tokens, int(status["VmHWM"].split()[0]) * 1024)
"""


def peak_of_loading(corpus: Path, scratch: Path) -> tuple[int, int]:
    """Tokens read, and the most bytes the process had in memory."""
    done = subprocess.run(
        [sys.executable, "-c", READS_ALL, corpus, scratch],
        env={**os.environ, "PYTHONPATH": str(INCLUDE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    tokens, peak = map(int, done.stdout.split())
    return tokens, peak


@pytest.mark.linux("a process's peak in /proc")
def test_two_billion_tokens_are_loaded_in_less_than_two_gigabytes(tmp_path: Path) -> None:
    peaks = {}
    for n in (16, 32):  # row groups of half a million tokens
        corpus = random_corpus(tmp_path / str(n), n * 2 * GROUP * SEQUENCE, 65_536)
        tokens, peak = peak_of_loading(corpus, tmp_path / f"scratch{n}")
        assert tokens == n * 2 * GROUP * SEQUENCE
        peaks[tokens] = peak
    (small, low), (large, high) = sorted(peaks.items())
    a_token = max(0.0, (high - low) / (large - small))
    whole = high + a_token * (2e9 - large)
    assert whole < 2e9, f"{a_token:.2f} bytes per token, {whole / 1e9:.1f} GB for 2 B tokens"


@pytest.mark.parametrize(("vocabulary", "width"), [(65_536, 2), (65_537, 3), (128_256, 3)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(
    tmp_path: Path, vocabulary: int, width: int
) -> None:
    ids = np.arange(vocabulary - 900, vocabulary).tolist()
    shards = [[ids[:300], [5, 6]], [ids[300:]]]
    lengths = [[[100, 200], [1, 1]], [[600]]]
    write_shards(tmp_path, shards, lengths)
    folder = decode_corpus(tmp_path, 1000, tmp_path / "scratch")
    stored = sum(file.stat().st_size for file in folder.glob("tokens.*"))
    assert stored == 902 * width
    rows = CorpusRows(folder, 1000)
    assert [rows[n].input_ids.tolist() for n in range(3)] == [ids[:300], [5, 6], ids[300:]]
    for n in range(3):
        assert rows.lengths_of(n).tolist() == rows[n].lengths.tolist()
        assert rows.targets_in(n) == int((targets_of(rows[n]) != -100).sum())


def test_a_segment_without_a_token_is_named_by_its_row(tmp_path: Path) -> None:
    write_shards(tmp_path, [[[1, 2]] * 9], [[[2]] * 8 + [[1, 2]]])
    with pytest.raises(DataError, match=r"row 8: 'lengths' do not add up to 'input_ids'"):
        decode_corpus(tmp_path, 64, tmp_path / "a")
    write_shards(tmp_path, [[[1, 2]]], [[[2, 0]]])
    with pytest.raises(DataError, match=r"'lengths' has a segment without a token"):
        decode_corpus(tmp_path, 64, tmp_path / "b")


class Watched(ListRows):
    """Rows that remember who read which of them."""

    def __init__(self, rows: list[Row], size: int) -> None:
        super().__init__(rows, size)
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.changed = threading.Condition()

    def __getitem__(self, number: int) -> Row:
        with self.changed:
            self.read.append(number)
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
        return super().__getitem__(number)


def drawn_rows(count: int) -> list[Row]:
    drawn = np.random.default_rng(0)
    found = []
    for _ in range(count):
        lengths = drawn.integers(1, 5, 3).astype(np.int32)
        ids = drawn.integers(3, 99, int(lengths.sum())).astype(np.int32)
        labels = np.where(drawn.random(len(ids)) < 0.3, -100, ids).astype(np.int32)
        found.append(Row(ids, lengths, labels))
    return found


def test_a_rank_reads_its_own_rows_alone_and_a_step_ahead() -> None:
    rows, micro, accumulation, world = drawn_rows(40), 2, 3, 2
    for rank in range(world):
        watched = Watched(rows, 16)
        reader = Reader(watched, Order(40, seed=1), micro, accumulation, rank, world)
        order = Order(40, seed=1)
        for number in range(4):  # 48 rows: into the second epoch
            step = reader.step(number)
            samples = [order[number * 12 + n] for n in range(12)]
            # of twelve rows in six micro-batches, those of every second one
            own = [samples[4 * turn + 2 * rank :][:2] for turn in range(3)]
            batches = [make_batch([rows[n] for n in some], 16) for some in own]
            for got, expected in zip(step.batches, batches, strict=True):
                assert got.input_ids.equal(expected.input_ids)
                assert got.targets.equal(expected.targets)
                assert got.lengths == expected.lengths
            # what concerns the whole step is the same on all ranks
            assert step.targets == sum(int((targets_of(rows[n]) != -100).sum()) for n in samples)
            assert [one.tolist() for one in step.lengths] == [
                rows[n].lengths.tolist() for n in samples
            ]
            with watched.changed:  # the next step's rows come without being asked for
                more = 6 * (number + 2)
                assert watched.changed.wait_for(
                    lambda w=watched, m=more: len(w.read) >= m, timeout=10
                )
        reader.close()
        assert len(watched.read) == 30
        assert all(name.startswith("reader") for name in watched.threads)
