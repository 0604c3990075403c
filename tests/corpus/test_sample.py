"""The generated corpus: deterministic, varied in the ways the pipeline has to handle."""

import gzip
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from fastcpt.corpus.sample import generate_sample

SCRIPT = Path(__file__).parents[2] / "include/scripts/generate_sample.py"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    generate_sample(folder, documents=400, seed=0)
    return folder


def raw_lines(parsed: Path) -> list[bytes]:
    packed = (parsed / "part-02.jsonl.zst").read_bytes()
    streams = (
        (parsed / "part-00.jsonl").read_bytes(),
        gzip.decompress((parsed / "part-01.jsonl.gz").read_bytes()),
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read(),
    )
    return [line for stream in streams for line in stream.split(b"\n") if line]


def is_readable(record) -> bool:
    text = record.get("full_text") if isinstance(record, dict) else None
    return isinstance(text, str) and bool(text)


def read_all(parsed: Path) -> tuple[list[dict], int]:
    """Every readable record of every format, and how many could not be read."""
    records, unreadable = [json.loads((parsed / "act-000.json").read_text())], 0
    records += pq.read_table(parsed / "part-03.parquet").to_pylist()
    for line in raw_lines(parsed):
        try:
            record = json.loads(line.decode())
        except ValueError:
            unreadable += 1
            continue
        if is_readable(record):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def words(text: str, count: int) -> set[tuple[str, ...]]:
    every = text.split()
    return {tuple(every[n : n + count]) for n in range(len(every) - count + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = words(one, 5), words(other, 5)
    return len(a & b) / len(a | b)


def test_counts_and_size(sample):
    records, unreadable = read_all(sample / "parsed")
    assert len(records) == 400
    assert unreadable == 5
    assert 1_500_000 <= sum(len(record["full_text"]) for record in records) <= 2_500_000


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(sample, tmp_path):
    generate_sample(tmp_path / "again", documents=400, seed=0)
    generate_sample(tmp_path / "other", documents=400, seed=1)
    names = [path.relative_to(sample) for path in sorted(sample.rglob("*")) if path.is_file()]
    assert len(names) == 6
    for name in names:
        assert (sample / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (sample / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("documents", [20, 60, 1000])
def test_other_sizes_hold_as_many_documents_and_few_broken_ones(tmp_path, documents):
    generate_sample(tmp_path, documents=documents, seed=3)
    records, unreadable = read_all(tmp_path / "parsed")
    assert len(records) == documents
    assert 1 <= unreadable <= 0.05 * documents


def test_metadata_is_that_of_legal_acts(sample):
    records, _ = read_all(sample / "parsed")
    metadata = [record["metadata"] for record in records]
    kinds = Counter(entry["doc_type"] for entry in metadata)
    assert set(kinds) == {"regulation", "directive", "decision"}
    dates = [entry["date"] for entry in metadata if entry.get("date")]
    assert "1990" <= min(dates) < "1996"
    assert "2026" <= max(dates) < "2027"
    assert 0.05 <= 1 - len(dates) / len(records) <= 0.2
    subjects = {subject for entry in metadata for subject in entry["subject_matter"]}
    assert {"Data protection", "Consumer protection", "Environment"} <= subjects
    for entry in metadata:
        if entry.get("celex"):
            assert re.fullmatch(r"3\d{4}[RLD]\d{4}|0\d{4}[RLD]\d{4}-\d{8}", entry["celex"])


def test_versions_reprints_and_copies(sample):
    records, _ = read_all(sample / "parsed")
    by_celex = {record["metadata"].get("celex"): record["full_text"] for record in records}
    versions = [celex for celex in by_celex if celex and celex.startswith("0")]
    assert len(versions) >= 40
    for celex in versions:
        assert jaccard(by_celex[celex], by_celex["3" + celex[1:10]]) > 0.5
    copies = len(records) - len({record["full_text"] for record in records})
    assert copies == 5
    reprints = [celex for celex in by_celex if celex and celex[0] == "3" and celex[6:] >= "5000"]
    works = [celex for celex in by_celex if celex and celex[0] == "3" and celex[6:] < "5000"]
    assert len(reprints) == 20
    for celex in reprints:
        assert max(jaccard(by_celex[celex], by_celex[work]) for work in works) > 0.7


@pytest.mark.parametrize("seed", [0, 1])
def test_different_acts_share_little(tmp_path, seed):
    """Neither near-duplicates nor, by 13-word overlap, copies of what is held out."""
    generate_sample(tmp_path, documents=400, seed=seed)
    texts = [
        record["full_text"]
        for record in read_all(tmp_path / "parsed")[0]
        if re.fullmatch(r"3\d{4}[RLD][0-4]\d{3}", record["id"])
    ]
    texts = sorted(set(texts))[::2]
    for count, limit in ((5, 0.5), (13, 0.3)):
        acts = [words(text, count) for text in texts]
        highest = max(
            len(a & b) / min(len(a), len(b)) if count == 13 else len(a & b) / len(a | b)
            for n, a in enumerate(acts)
            for b in acts[:n]
        )
        assert highest < limit


def test_acts_cite_earlier_acts_of_the_set(sample):
    titles = [json.loads(line)["title"] for line in (sample / "instructions.jsonl").open()]
    number = r"(?:Regulation|Directive|Decision) (?:\(\w+\) )?(?:No )?\d+/\d+(?:/\w+)?"
    numbers = {re.match(number, title).group() for title in titles}
    assert len(numbers) == len(titles)
    cited = Counter()
    for record in read_all(sample / "parsed")[0]:
        cited.update(set(re.findall(number, record["full_text"])) & numbers)
    assert sum(cited.values()) > 1000
    assert cited.most_common(1)[0][1] > 15


def test_summaries_follow_from_their_acts(sample):
    texts = {record["id"]: record["full_text"] for record in read_all(sample / "parsed")[0]}
    instructions = [json.loads(line) for line in (sample / "instructions.jsonl").open()]
    assert len(instructions) > 250
    for instruction in instructions:
        act, summary = texts[instruction["id"]], instruction["summary"]
        subject = re.search(r"lays down rules on (the \w+ of [^.]+)\.", summary).group(1)
        assert subject in act
        assert subject in instruction["title"]
        duty = re.search(r"\. [A-Z]\w+ must ([^.]+)\.", summary).group(1)
        assert f"shall {duty}." in act
        for number in re.findall(r"\d+/\d+", summary):
            assert number in act


def test_too_few_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 20 documents, not 5"):
        generate_sample(tmp_path, documents=5)


def test_the_command_writes_the_sample(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path), "--documents", "30"]
    subprocess.run(command, check=True, capture_output=True)
    assert len(read_all(tmp_path / "parsed")[0]) == 30
    refused = subprocess.run([*command[:-1], "3"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "at least 20 documents" in refused.stderr
    assert "Traceback" not in refused.stderr
