"""A bad document affects only itself: it is set aside with file, line and reason."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.made import Record, act, text_of
from fastcpt.corpus.documents import Document, Unreadable, list_parts, read_documents
from fastcpt.corpus.export import export_documents
from fastcpt.corpus.score import score_part, score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.streams import DamagedError, elements, lines
from fastcpt.files import read_json
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Documents, Fields

Recipes = Callable[..., Recipe]
GOOD = [act(1), act(2)]


def read(path: Path, **options: Any) -> list[Document | Unreadable]:
    return list(read_documents(str(path), Fields(), **options))


def ids(found: list[Document | Unreadable]) -> list[str]:
    return [item.id for item in found if isinstance(item, Document)]


def set_aside(found: list[Document | Unreadable]) -> list[tuple[int | None, str]]:
    return [(item.line, item.reason) for item in found if isinstance(item, Unreadable)]


def scored(folder: Path, recipe_for: Recipes, home: Path) -> list[dict[str, Any]]:
    """What the step ``score`` set aside, over all files."""
    tables = score_parts(
        list_parts(Documents(path=str(folder))), recipe_for(folder), home, processes=1
    )
    assert sum(table["documents"] for table in tables) == len(GOOD)
    found = [read_json(Path(table["path"]) / "unreadable.json") for table in tables]
    assert sum(table["unreadable"] for table in tables) == sum(map(len, found))
    return [item for items in found for item in items]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": %s, "full_text": "a"}' % ("7" * 4301), "a number of more than 4300 digits"),
        ('{"id": "\\ud800", "full_text": "a"}', "'id' has half a surrogate pair at character 0"),
        (
            '{"full_text": "a", "metadata": {"doc_type": "x\\udfff"}}',
            "'metadata.doc_type' has half a surrogate pair at character 1",
        ),
        (
            '{"full_text": "a", "metadata": {"language": "\\ud800"}}',
            "'metadata.language' has half a surrogate pair at character 0",
        ),
        (
            '{"full_text": "a", "metadata": {"subject_matter": ["b", "\\ud800"]}}',
            "'metadata.subject_matter' has half a surrogate pair at character 0",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_that_python_cannot_hold(
    tmp_path: Path, recipe_for: Recipes, home: Path, line: str, reason: str, name: str
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = [json.dumps(GOOD[0]), line, json.dumps(GOOD[1])]
    whole = "\n".join(rows) if name == "a.jsonl" else "[" + ",\n".join(rows) + "]"
    (folder / name).write_text(whole)
    assert scored(folder, recipe_for, home) == [
        {"file": str(folder / name), "line": 2, "reason": reason}
    ]


# Lone surrogates, NUL, signs beyond the basic plane, digits of other scripts
TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4299, max_value=10**4310)
    | st.floats()
    | TEXTS
    | st.dates().map(str)
    | st.from_regex(r"[0-9CE]\d{4}[A-Z]{1,2}\d{1,4}(R\(\d+\))?", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = [path.split(".") for path in Fields().model_dump().values()]


def with_value(path: list[str], value: Any) -> Record:
    record = {"id": "odd", "full_text": text_of(9), "metadata": {}}
    (record["metadata"] if len(path) == 2 else record)[path[-1]] = value
    return record


@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=6), VALUES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_in_any_field(
    recipe_for: Recipes,
    tmp_path_factory: pytest.TempPathFactory,
    odd: list[tuple[list[str], Any]],
    whole: Any,
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    sys.set_int_max_str_digits(10_000)
    try:
        rows = [json.dumps(with_value(*item)) for item in odd] + [json.dumps(whole)]
    finally:
        sys.set_int_max_str_digits(4300)
    good = [json.dumps(act(n, subject_matter=["Consumers"])) for n in range(1, 21)]
    (folder / "a.jsonl").write_text("\n".join([good[0], *rows, *good[1:]]) + "\n")
    recipe = recipe_for(folder, documents__max_unreadable_share=1.0)
    table = score_part(str(folder / "a.jsonl"), recipe, folder / "home")
    assert table["documents"] + table["unreadable"] == 21 + len(odd)
    assert table["documents"] >= 20
    for item in read_json(Path(table["path"]) / "unreadable.json"):
        assert 2 <= item["line"] <= 2 + len(odd)
        assert item["reason"]
    selection = select([table["path"]], recipe, folder / "home")
    assert export_documents(selection["path"], Fields(), folder / "best") == selection["kept"]


@given(VALUES, st.binary(max_size=30), st.integers(1, 40), st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_elements_of_a_list_are_what_json_says(
    value: Any, garbage: bytes, chunk: int, count: int
) -> None:
    sys.set_int_max_str_digits(10_000)
    try:
        rows = [json.dumps(value).encode()] * count
        content = b" [\n" + b" ,\n".join(rows) + b"\r\n] "
        pieces = [content[n : n + chunk] for n in range(0, len(content), chunk)]
        found = list(elements(pieces, lambda _: 10**9))
        assert [json.dumps(json.loads(item or b"")).encode() for item in found] == rows
        # and whatever the bytes are, there is an end
        try:
            broken = list(elements([b"[", garbage, b"]"], lambda _: 10**9))
        except DamagedError:
            return
        assert all(item is not None and item in garbage for item in broken)
    finally:
        sys.set_int_max_str_digits(4300)


@given(st.lists(st.binary(max_size=9), max_size=9), st.integers(1, 7), st.integers(0, 9))
def test_lines_are_those_of_the_content(content: list[bytes], chunk: int, most: int) -> None:
    joined = b"\n".join(content)
    pieces = [joined[n : n + chunk] for n in range(0, len(joined), chunk)]
    expected = joined.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(lines(pieces, lambda _: most)) == [
        line if len(line) <= most else None for line in expected
    ]


@pytest.mark.parametrize(
    ("content", "good", "aside"),
    [
        (
            b'[{"full_text": "a"}, {"full_text": }, {"full_text": "b"}]',
            2,
            (2, "broken JSON: Expec"),
        ),
        (b'[{"full_text": "a"}, {"full_text": "b"', 1, (2, "is a list that has no end")),
        (b'[{"full_text": "a"}] {}', 1, (2, "something follows the end of the list")),
        (b'[{"full_text": "a"},]', 1, (2, "broken JSON")),
        (b'[{"full_text": "\\u00e9\\\\"}, 7]', 1, (2, "the record is a number")),
        (b"", 0, (1, "holds nothing")),
    ],
)
def test_a_damaged_list_costs_what_is_damaged(
    tmp_path: Path, content: bytes, good: int, aside: tuple[int, str]
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    found = read(tmp_path / "a.json")
    assert len(ids(found)) == good
    ((line, reason),) = set_aside(found)
    assert line == aside[0]
    assert aside[1] in reason


# Parquet


def test_a_date_that_no_calendar_of_python_has(
    tmp_path: Path, recipe_for: Recipes, home: Path
) -> None:
    days = pa.array([18_000, 10**7, 18_000], pa.date32())
    metadata = pa.StructArray.from_arrays([days], ["date"])
    columns = {"id": ["a", "b", "c"], "full_text": [text_of(n) for n in range(3)]}
    folder = tmp_path / "documents"
    folder.mkdir()
    pq.write_table(pa.table(columns | {"metadata": metadata}), folder / "a.parquet")
    (aside,) = scored(folder, recipe_for, home)
    assert (aside["file"], aside["line"]) == (str(folder / "a.parquet"), 2)
    assert "'metadata.date' cannot be read: date value out of range" in aside["reason"]


def test_nanoseconds_do_not_matter(tmp_path: Path) -> None:
    moments = pa.array([1_500_000_000_000_000_001] * 2, pa.timestamp("ns"))
    metadata = pa.StructArray.from_arrays([moments], ["date"])
    columns = {"id": ["a", "b"], "full_text": ["one", "two"], "metadata": metadata}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [item.date for item in read(tmp_path / "a.parquet") if isinstance(item, Document)] == [
        "2017-07-14 02:40:00"
    ] * 2


def test_a_value_that_no_field_asks_for_costs_nothing(tmp_path: Path) -> None:
    crawled = pa.array([10**7], pa.date32())
    metadata = pa.StructArray.from_arrays([crawled, pa.array(["en"])], ["crawled", "language"])
    columns = {"id": ["a"], "full_text": ["one"], "metadata": metadata}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (document,) = read(tmp_path / "a.parquet")
    assert isinstance(document, Document)
    assert document.language == "en"


def test_a_field_that_is_there_twice(tmp_path: Path) -> None:
    names = pa.array(["de"] * 2)
    metadata = pa.StructArray.from_arrays([names, names], ["language", "language"])
    columns = {"id": ["a", "b"], "full_text": ["one", "two"], "metadata": metadata}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    reason = "'metadata.language' is there twice in its object"
    assert set_aside(read(tmp_path / "a.parquet")) == [(1, reason), (2, reason)]
    ids_twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["id", "full_text", "id"])
    pq.write_table(ids_twice, tmp_path / "b.parquet")
    ((line, why),) = set_aside(read(tmp_path / "b.parquet"))
    assert line is None
    assert "the column 'id' is there twice" in why


MOMENTS = st.integers(-(2**63), 2**63 - 1)
SECONDS = st.integers(-(2**63 // 1000), 2**63 // 1000)  # which Parquet keeps as milliseconds
COLUMNS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    *[
        (pa.timestamp(unit, tz), SECONDS)
        for unit in ("s", "ms", "us", "ns")
        for tz in (None, "UTC")
    ],
    *[(pa.duration(unit), MOMENTS) for unit in ("s", "ns")],
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.time64("ns"), MOMENTS),
    (pa.decimal128(38, 0), st.integers(-(10**38) + 1, 10**38 - 1).map(Decimal)),
    (pa.int64(), MOMENTS),
    (pa.float32(), st.floats(width=32)),
    (pa.float16(), st.floats(width=16)),
    (pa.bool_(), st.booleans()),
    (pa.binary(), st.binary(max_size=9)),
    (pa.large_string(), st.text(max_size=9)),
    (pa.list_(pa.binary()), st.lists(st.binary(max_size=3), max_size=3)),
    (pa.list_(pa.timestamp("ns")), st.lists(MOMENTS, max_size=3)),
    (
        pa.map_(pa.string(), pa.int64()),
        st.lists(st.tuples(st.text(max_size=3), MOMENTS), max_size=2),
    ),
    (pa.struct([("a", pa.timestamp("ns"))]), st.fixed_dictionaries({"a": MOMENTS})),
]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_parquet_type_in_any_field(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind, values = data.draw(st.sampled_from(COLUMNS))
    path = data.draw(st.sampled_from(FIELDS))
    column = pa.array(data.draw(st.lists(st.none() | values, min_size=3, max_size=3)), kind)
    columns: dict[str, Any] = {"id": ["a", "b", "c"], "full_text": ["one", "two", "three"]}
    if len(path) == 2:
        columns["metadata"] = pa.StructArray.from_arrays([column], [path[1]])
    else:
        columns[path[0]] = column
    file = tmp_path_factory.mktemp("odd") / "a.parquet"
    pq.write_table(pa.table(columns), file)
    found = read(file)
    assert len(found) == 3
    for row, item in enumerate(found, start=1):
        if isinstance(item, Unreadable):
            assert item.line == row
            assert f"'{'.'.join(path)}'" in item.reason
        else:
            assert isinstance(item.id, str)
            item.id.encode()


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_damage_anywhere_in_a_parquet_file_is_no_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "a.parquet"
    pq.write_table(pa.Table.from_pylist([act(n, words=300) for n in range(30)]), file)
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= change
    file.write_bytes(content)
    for item in read(file):
        if isinstance(item, Unreadable):
            assert item.reason


# Files


@pytest.mark.parametrize("name", ["a::b.jsonl", "zip::a.jsonl", "x:y?#*[1].jsonl", "ä ö.jsonl"])
def test_any_name_of_a_file(tmp_path: Path, recipe_for: Recipes, home: Path, name: str) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / name).write_text("".join(json.dumps(item) + "\n" for item in GOOD))
    assert scored(folder, recipe_for, home) == []


def test_a_folder_whose_name_is_fsspec_s_chain(tmp_path: Path) -> None:
    (tmp_path / "a::b").mkdir()
    (tmp_path / "a::b" / "c.jsonl").write_text('{"full_text": "a"}\n')
    (part,) = list_parts(Documents(path=str(tmp_path / "a::b")))
    assert ids(list(read_documents(part, Fields()))) == ["c.jsonl:1"]


@pytest.mark.linux("a Mac's disk takes no name that is not UTF-8")
def test_a_name_that_is_not_utf_8(tmp_path: Path, recipe_for: Recipes, home: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "good.jsonl").write_text("".join(json.dumps(item) + "\n" for item in GOOD))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_text("{}")
    assert scored(folder, recipe_for, home) == [
        {
            "file": f"{folder}/caf\\xe9.jsonl",
            "line": None,
            "reason": "the file's name is not UTF-8 text; rename it",
        }
    ]


def test_what_is_no_regular_file_is_not_opened(
    tmp_path: Path, recipe_for: Recipes, home: Path
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "good.jsonl").write_text("".join(json.dumps(item) + "\n" for item in GOOD))
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "device.jsonl").symlink_to("/dev/zero")
    (folder / "dangling.jsonl").symlink_to("nowhere.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        try:
            server.bind("socket.jsonl")
        finally:
            os.chdir(before)
        found = scored(folder, recipe_for, home)
    special = "no regular file (a pipe, socket or device)"
    assert {(Path(item["file"]).name, item["line"], item["reason"]) for item in found} == {
        ("pipe.jsonl", None, special),
        ("device.jsonl", None, special),
        ("socket.jsonl", None, special),
        ("dangling.jsonl", None, "a link to nothing"),
    }


def test_a_url_with_a_chain_in_a_name_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("good", "a::b"):
        with fsspec.filesystem("memory").open(f"/chained/{name}.jsonl", "wb") as file:
            file.write(b'{"full_text": "a"}\n')
    assert list_parts(Documents(path="memory://chained")) == ["memory:///chained/good.jsonl"]
    assert "'/chained/a::b.jsonl' is left out" in caplog.text


# Memory


BOUNDED = """
import json, resource, sys
from fastcpt.corpus.documents import Document, read_documents
from fastcpt.recipe_sections import Fields
resource.setrlimit(resource.RLIMIT_AS, (2_500_000_000, 2_500_000_000))
wanted = {0, 2} if sys.argv[2] == "wanted" else None
found = list(read_documents(sys.argv[1], Fields(), wanted=wanted, max_record_mb=64))
print(json.dumps([item.id if isinstance(item, Document) else [item.line, item.reason]
                  for item in found]))
"""
BLANKS = b" " * (1 << 26)


def bomb(path: Path, before: bytes, after: bytes, blanks: int) -> None:
    """Some 64 MiB of blanks between two records, in kilobytes."""
    if path.suffix == ".zst":
        with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
            packed.write(before)
            for _ in range(blanks):
                packed.write(BLANKS)
            packed.write(after)
    else:
        packed_blanks = gzip.compress(BLANKS, 1)
        path.write_bytes(gzip.compress(before) + packed_blanks * blanks + gzip.compress(after))


@pytest.mark.parametrize("wanted", ["all", "wanted"])
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.json.zst", "a.json.gz"])
@pytest.mark.linux("RLIMIT_AS holds")
def test_a_line_that_unpacks_to_gigabytes_costs_itself(
    tmp_path: Path, name: str, wanted: str
) -> None:
    first, last = b'{"id": "first", "full_text": "a"}', b'{"id": "last", "full_text": "b"}'
    is_list = ".jsonl" not in name
    begin, between, end = (b"[", b",\n", b"]") if is_list else (b"", b"\n", b"\n")
    odd = b'{"id": "long", "full_text": "x'
    bomb(
        tmp_path / name,
        begin + first + between + odd,
        b'"}' + between + last + end,
        blanks=32,
    )
    assert (tmp_path / name).stat().st_size < 12_000_000
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / name), wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    long = [2, "the record is longer than 64 MB (documents.max_record_mb)"]
    expected = ["first", "last"] if wanted == "wanted" else ["first", long, "last"]
    assert json.loads(done.stdout) == expected


@pytest.mark.linux("RLIMIT_AS holds")
def test_a_parquet_column_that_repeats_one_long_value_is_read_row_by_row(tmp_path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays([0] * 64, ["x" * 30_000_000])
    table = pa.table({"id": list(map(str, range(64))), "full_text": texts})
    pq.write_table(
        table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    # 64 rows of 30 MB, one after another
    script = BOUNDED.replace("list(read_documents", "(read_documents")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "a.parquet"), "all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == list(map(str, range(64)))


def test_a_long_row_of_parquet(tmp_path: Path) -> None:
    texts = ["one", "x" * 3_000_000, "two"]
    pq.write_table(pa.table({"id": ["a", "b", "c"], "full_text": texts}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", max_record_mb=1.0)
    assert ids(found) == ["a", "c"]
    assert set_aside(found) == [(2, "the record is longer than 1 MB (documents.max_record_mb)")]


def test_the_recipe_says_how_long_a_record_may_be(
    tmp_path: Path, recipe_for: Recipes, home: Path
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    records = [*GOOD, act(3, words=9000)]
    (folder / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
    part = str(folder / "a.jsonl")
    recipe = recipe_for(folder, documents__max_record_mb=0.02)
    assert score_part(part, recipe, home)["unreadable"] == 1
    assert score_part(part, recipe_for(folder), home)["unreadable"] == 0


def test_a_day_is_a_day(tmp_path: Path) -> None:
    rows = [{"full_text": "a", "metadata": {"date": datetime.date(2020, 3, 4)}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (document,) = read(tmp_path / "a.parquet")
    assert isinstance(document, Document)
    assert document.date == "2020-03-04"
