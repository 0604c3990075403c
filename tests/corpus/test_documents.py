"""Readers of every format, and the records that are set aside."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastcpt.corpus.documents import (
    Document,
    DocumentsError,
    Unreadable,
    list_parts,
    read_documents,
)
from fastcpt.recipe_sections import Documents, Fields

RECORDS = [
    {
        "id": f"32020R000{n}",
        "full_text": f"Article {n}: über alles",
        "metadata": {"title": f"Act {n}", "date": "2020-03-04", "subject_matter": ["Consumers"]},
    }
    for n in range(4)
]
LINES = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in RECORDS).encode()


def read(path: Path, fields: Fields | None = None) -> list[Document | Unreadable]:
    return list(read_documents(str(path), fields or Fields()))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        # two frames one after another, as parallel compressors write
        ("b.jsonl.zst", zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    ],
)
def test_a_format_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    documents = read(written(tmp_path, name, content))
    assert [document.id for document in documents] == [item["id"] for item in RECORDS]
    first = documents[0]
    assert isinstance(first, Document)
    assert first.text == "Article 0: über alles"
    assert (first.title, first.date, first.year) == ("Act 0", "2020-03-04", 2020)
    assert first.subjects == ("Consumers",)
    assert first.in_force is None


def test_parquet_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    documents = read(tmp_path / "a.parquet")
    assert [document.text for document in documents] == [item["full_text"] for item in RECORDS]


def test_a_json_file_of_one_document(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps(RECORDS[1], indent=2).encode())
    assert [document.id for document in read(path)] == ["32020R0001"]


def test_other_names_by_a_mapping(tmp_path: Path) -> None:
    record = {"key": 7, "body": {"en": "Text"}, "when": "1999-12-31", "matters": "Transport"}
    path = written(tmp_path, "a.jsonl", json.dumps(record).encode())
    fields = Fields(id="key", text="body.en", date="when", subject_matter="matters")
    (document,) = read(path, fields)
    assert isinstance(document, Document)
    assert (document.id, document.text, document.year) == ("7", "Text", 1999)
    assert document.subjects == ("Transport",)


def test_a_document_without_an_id_is_named_by_its_place(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'{"full_text": "one"}\n\n{"full_text": "two"}\n')
    assert [document.id for document in read(path)] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "x", "full_text": "cut', "broken JSON: Unterminated string"),
        (b'{"id": "x"}', "'full_text' is missing"),
        (b'{"id": "x", "full_text": null}', "'full_text' is missing"),
        (b'{"id": "x", "full_text": " \\n"}', "'full_text' is empty"),
        (b'{"id": "x", "full_text": 17}', "'full_text' is a number, not text"),
        (b'{"id": "x", "full_text": ["a"]}', "'full_text' is a list, not text"),
        (b'{"id": {}, "full_text": "a"}', "'id' is an object, not text"),
        (b'{"full_text": "a", "metadata": [1]}', "a list where an object is expected"),
        (
            b'{"full_text": "a", "metadata": {"subject_matter": [1]}}',
            "'metadata.subject_matter' is a list, not a list of texts",
        ),
        (b"null", "the record is nothing, not an object"),
        (b'["a"]', "the record is a list, not an object"),
        (b'{"full_text": "caf\xe9"}', "not UTF-8 text at byte 18"),
        ('{"full_text": "a"}'.encode("utf-16-le"), "not UTF-8 text (zero bytes; UTF-16?)"),
        (b'{"full_text": "\\ud800"}', "half a surrogate pair at character 0"),
    ],
)
def test_a_bad_line_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = LINES.splitlines(keepends=True)
    path = written(tmp_path, "a.jsonl", good[0] + b"\n" + line + b"\n" + good[1])
    documents = read(path)
    assert len(documents) == 3
    bad = documents[1]
    assert isinstance(bad, Unreadable)
    assert (bad.file, bad.line) == (str(path), 3)
    assert reason in bad.reason
    assert documents[2].id == "32020R0001"


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_truncated_file_yields_what_is_whole_and_says_so(tmp_path: Path, suffix: str) -> None:
    # incompressible, so that half of the file holds about half of the documents
    import random

    rng = random.Random(0)
    lines = "".join(
        json.dumps({"id": str(n), "full_text": "".join(rng.choices("0123456789abcdef", k=200_000))})
        + "\n"
        for n in range(20)
    ).encode()
    packed = zstandard.compress(lines) if suffix == ".zst" else gzip.compress(lines)
    path = written(tmp_path, f"a.jsonl{suffix}", packed[: len(packed) // 2])
    *whole, last = read(path)
    assert 5 <= len(whole) <= 10
    assert all(isinstance(item, Document) for item in whole)
    assert isinstance(last, Unreadable)
    assert last.line == len(whole) + 1
    assert "cut short" in last.reason


def test_damage_inside_a_zst_file(tmp_path: Path) -> None:
    packed = bytearray(zstandard.compress(LINES * 2000))
    packed[len(packed) // 2 :] = bytes(len(packed) - len(packed) // 2)
    assert isinstance(read(written(tmp_path, "a.jsonl.zst", bytes(packed)))[-1], Unreadable)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS * 100), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (bad,) = read(written(tmp_path, "b.parquet", content[: len(content) // 2]))
    assert isinstance(bad, Unreadable)
    assert "Parquet" in bad.reason


def test_parts_are_the_readable_files_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.parquet", "a.json.zst", ".hidden/d.jsonl", "notes.txt", "x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    parts = list_parts(Documents(path=str(tmp_path)))
    assert [str(Path(part).relative_to(tmp_path)) for part in parts] == [
        "a.json.zst",
        "a/c.parquet",
        "b.jsonl",
    ]


def test_a_url_is_read_like_a_folder() -> None:
    with fsspec.open("memory://acts/one.jsonl", "wb") as file:
        file.write(LINES)
    (part,) = list_parts(Documents(path="memory://acts"))
    assert part == "memory:///acts/one.jsonl"
    assert [item.id for item in read_documents(part, Fields())][:1] == ["32020R0000"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "documents.path is empty"),
        ("/no/such/folder", "'/no/such/folder' does not exist"),
        ("nosuch://bucket", "cannot open 'nosuch://bucket'"),
    ],
)
def test_missing_documents(path: str | None, message: str) -> None:
    with pytest.raises(DocumentsError, match=message):
        list_parts(Documents(path=path))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(DocumentsError, match=r"no JSON, JSONL .* in .*\(1 other files\)"):
        list_parts(Documents(path=str(tmp_path)))
