"""The corpus as training reads it: complete, packed, without held-out documents, built only once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.made import act, acts, bytes_of, general_folder, made, record, rows_of, text_of
from fastcpt.corpus import build as build_module
from fastcpt.corpus import documents as documents_module
from fastcpt.corpus import processes as processes_module
from fastcpt.corpus import token_ids as token_ids_module
from fastcpt.corpus.build import build, prepare_tokenizer, tokenize
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.corpus.selected import BuildError
from fastcpt.corpus.shards import plan_rows
from fastcpt.corpus.token_ids import TokenIds
from fastcpt.corpus.tokenizer import describe
from fastcpt.corpus.tokens import TokenFiles, write_ids
from fastcpt.files import sha256_of_file
from fastcpt.recipe import Recipe

Recipes = Callable[..., Recipe]
Writer = Callable[..., Path]


@pytest.fixture
def corpus(documents: Writer, recipe_for: Recipes, home: Path) -> dict[str, Any]:
    return made(recipe_for(documents(acts())), home)


def test_no_token_is_lost_and_documents_are_whole(
    corpus: dict[str, Any], tokenizer_folder: Path
) -> None:
    facts = describe(tokenizer_folder / "tokenizer.json")
    tokenizer = facts.load()
    held_out = rows_of(corpus, "validation*/*.parquet")
    pieces: list[list[int]] = []
    for row in rows_of(corpus):
        assert sum(row["lengths"]) == len(row["input_ids"]) <= 64
        at = 0
        for length in row["lengths"]:
            pieces.append(row["input_ids"][at : at + length])
            at += length
    assert sum(map(len, pieces)) == corpus["tokens"]
    # each document begins once and ends once
    begun = [piece for piece in pieces if piece[0] == facts.bos_id]
    ended = [piece for piece in pieces if piece[-1] == facts.end_id]
    assert len(begun) == len(ended) == corpus["documents"]
    for row in held_out:
        assert row["input_ids"][0] == facts.bos_id
        assert row["input_ids"][-1] == facts.end_id
    texts = {item["id"]: item["full_text"] for item in acts()}
    ids_of = {
        name: tokenizer.encode(text, add_special_tokens=False).ids for name, text in texts.items()
    }
    assert {row["id"]: row["input_ids"][1:-1] for row in held_out} == {
        row["id"]: ids_of[row["id"]] for row in held_out
    }
    trained = sorted(ids_of.keys() - {row["id"] for row in held_out})
    assert corpus["documents"] == len(trained)
    expected = sum(len(ids_of[name]) + 2 for name in trained)
    assert corpus["tokens"] == expected
    # token for token, whatever the order
    flat = sorted(token for piece in pieces for token in piece)
    whole = [token for name in trained for token in (facts.bos_id, *ids_of[name], facts.end_id)]
    assert flat == sorted(whole)


def test_what_a_validation_row_holds(documents: Writer, recipe_for: Recipes, home: Path) -> None:
    records = [
        record("ä", "Ünïcode " + text_of(1), date="2024-01-01", subject_matter=["Consumers"]),
        *acts(),
    ]
    del records[1]["metadata"]["doc_type"]
    corpus = made(recipe_for(documents(records), corpus__newest_share=0.02), home)
    (row,) = rows_of(corpus, "validation_newest/*.parquet")
    assert row["id"] == "ä"
    assert row["bytes"] == len(("Ünïcode " + text_of(1)).encode())
    assert (row["year"], row["doc_type"], row["areas"]) == (2024, "regulation", ["consumer"])


def test_each_piece_of_a_row_has_its_areas(
    documents: Writer, recipe_for: Recipes, home: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    topics = {1: (["Consumers"], ["consumer"]), 2: (["Fishing quotas"], ["fishing quota"])}
    records, areas_of = [], {}
    for n in range(1, 41):
        subjects, areas = topics.get(n % 3, ([], []))
        records.append(act(n, subject_matter=subjects))
        areas_of[records[-1]["full_text"]] = areas
    general = [record(f"story {n}", text_of(7000 + n)) for n in range(40)]
    areas_of |= dict.fromkeys((item["full_text"] for item in general), None)
    recipe = recipe_for(
        documents(records),
        documents__replay={"path": str(general_folder(tmp_path, general)), "share": 0.2},
        lora={"areas": {"sea": ["fishing quota"], "market": ["consumer", "competition"]}},
    )
    corpus = made(recipe, home)
    tokenizer = describe(tokenizer_folder / "tokenizer.json").load()
    seen = set()
    for row in rows_of(corpus):
        at = 0
        for length, areas in zip(row["lengths"], row["areas"], strict=True):
            piece = tokenizer.decode(row["input_ids"][at : at + length])
            at += length
            if length > 8:  # enough words to tell which document it is of
                (expected,) = [own for text, own in areas_of.items() if piece in text]
                assert areas == expected
                seen.add(None if areas is None else tuple(areas))
    assert seen == {None, (), ("consumer",), ("fishing quota",)}
    held_out = rows_of(corpus, "validation/*.parquet") + rows_of(
        corpus, "validation_newest/*.parquet"
    )
    for row in held_out:
        number = next(n for n in range(1, 41) if act(n)["id"] == row["id"])
        assert row["areas"] == topics.get(number % 3, ([], []))[1]


def test_an_adapter_without_documents_is_refused(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    recipe = recipe_for(documents(acts()), lora={"areas": {"air": ["air transport"]}})
    with pytest.raises(BuildError, match=r"lora\.areas\.air: no training document names air"):
        made(recipe, home)


def test_the_manifest_lists_every_file_with_its_digest(corpus: dict[str, Any]) -> None:
    folder = Path(corpus["path"])
    names = {item["file"] for item in corpus["files"]}
    assert names | {"corpus_manifest.json"} == set(bytes_of(folder))
    assert "tokenizer/tokenizer.json" in names
    assert "tokenizer/tokenizer_config.json" in names
    for item in corpus["files"]:
        assert sha256_of_file(folder / item["file"]) == item["sha256"]
        assert (folder / item["file"]).stat().st_size == item["bytes"]
    assert sum(shard["tokens"] for shard in corpus["shards"]) == corpus["tokens"]
    assert sum(shard["rows"] for shard in corpus["shards"]) == corpus["sequences"]
    assert {item["set"] for item in corpus["validation"]} == {"validation", "validation_newest"}


def test_shards_are_equal_within_a_percent(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    corpus = made(recipe_for(documents(acts(120, words=300)), corpus__num_shards=3), home)
    tokens = [shard["tokens"] for shard in corpus["shards"]]
    assert min(shard["rows"] for shard in corpus["shards"]) > 100
    assert max(tokens) - min(tokens) < 0.01 * max(tokens)
    assert corpus["padding_share"] < 0.005


@given(st.integers(0, 2**32), st.integers(2, 16), st.integers(64, 300))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_differ_by_a_row_at_most(
    recipe_for: Recipes, tmp_path: Path, seed: int, shards: int, size: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 4 * size, shards * 60 + seed % 97)
    recipe = recipe_for(tmp_path, corpus__num_shards=shards, corpus__max_seq_length=size)
    nothing = np.zeros(len(lengths), dtype=np.int64)
    plan = plan_rows(TokenIds([], nothing, nothing, lengths), recipe)
    tokens = np.bincount(plan.row % shards, weights=plan.length)
    assert tokens.sum() == lengths.sum()
    assert set(plan.row.tolist()) == set(range(plan.rows))
    assert tokens.max() - tokens.min() <= size


def test_the_same_bytes_for_any_number_of_processes(
    documents: Writer, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "LARGE", 0)
    records = acts()
    for n in range(4):
        documents(records[n::4], f"part-{n}.jsonl")
    recipe = recipe_for(tmp_path / "documents", corpus__num_shards=3)
    folders = [
        Path(made(recipe, tmp_path / f"home{processes}", processes)["path"]) for processes in (1, 3)
    ]
    assert bytes_of(folders[0]) == bytes_of(folders[1])
    assert folders[0].name == folders[1].name


def test_a_large_file_is_spread_over_processes(
    documents: Writer, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "LARGE", 0)
    monkeypatch.setattr(documents_module, "BATCH_CHARACTERS", 2000)
    shared: list[int] = []
    start = processes_module._start

    def started() -> Any:
        shared.append(1)
        return start()

    monkeypatch.setattr(processes_module, "_start", started)
    recipe = recipe_for(documents([*acts(), {"id": "no text"}]))
    alone = made(recipe, tmp_path / "alone", 1)
    assert not shared
    spread = made(recipe, tmp_path / "spread", 3)
    assert len(shared) >= 6  # three to score, three to tokenize
    assert bytes_of(Path(alone["path"])) == bytes_of(Path(spread["path"]))
    tables = [
        pq.read_table(next((tmp_path / name / "scores").glob("*/scores.parquet")))
        for name in ("alone", "spread")
    ]
    assert tables[0].equals(tables[1])


def test_the_same_bytes_from_tiktoken(
    documents: Writer, recipe_for: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(documents(acts()))
    slow = made(recipe, tmp_path / "slow")
    monkeypatch.setattr(build_module, "SMALL", 0)
    fast = made(recipe, tmp_path / "fast")
    (outcome,) = (tmp_path / "fast" / "tokenizers").glob("*.json")
    assert outcome.read_text() == '{\n  "ranked": true\n}\n'
    assert bytes_of(Path(slow["path"])) == bytes_of(Path(fast["path"]))


def test_twice_is_free(
    corpus: dict[str, Any], documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    again = made(recipe_for(documents(acts())), home)
    assert again["reused"]
    assert again["digest"] == corpus["digest"]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == before


def test_a_corpus_that_grew_tokenizes_only_what_is_new(
    corpus: dict[str, Any],
    documents: Writer,
    recipe_for: Recipes,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenized: list[tuple[str, int]] = []
    tokenize = token_ids_module.tokenize_part

    def counted(part: str, *arguments: Any) -> dict[str, Any]:
        result = tokenize(part, *arguments)
        tokenized.append((Path(part).name, result["documents"]))
        return result

    monkeypatch.setattr(token_ids_module, "tokenize_part", counted)
    new = [act(n, year=2010) for n in range(500, 506)]
    grown = made(recipe_for(documents(new, "part-01.jsonl")), home)
    assert not grown["reused"]
    assert tokenized == [("part-00.jsonl", 0), ("part-01.jsonl", 6)]


@pytest.mark.parametrize("trained", [False, True])
def test_tokenizing_can_be_spread_over_workers(
    documents: Writer, recipe_for: Recipes, home: Path, tmp_path: Path, trained: bool
) -> None:
    records = acts()
    for n in range(3):
        documents(records[n::3], f"part-{n}.jsonl")
    own = {"tokenizer__path": None, "tokenizer__train_vocab_size": 400} if trained else {}
    recipe = recipe_for(tmp_path / "documents", **own)
    parts = list_parts(recipe.documents)
    scores = score_parts(parts, recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)["path"]
    prepare_tokenizer(selection, recipe, home)
    tokenizers = {path: path.stat().st_mtime_ns for path in home.glob("tokenizers/*")}
    assert bool(tokenizers) == trained
    done = [tokenize(selection, [part], recipe, home)["documents"] for part in parts]
    assert sum(done) == 40
    ids = {path: path.stat().st_mtime_ns for path in home.glob("tokens/*/*")}
    spread = build(selection, recipe, home, 1)
    assert {path: path.stat().st_mtime_ns for path in home.glob("tokens/*/*")} == ids
    assert {path: path.stat().st_mtime_ns for path in home.glob("tokenizers/*")} == tokenizers
    alone = build(selection, recipe, tmp_path / "alone", 1)
    assert bytes_of(Path(spread["path"])) == bytes_of(Path(alone["path"]))


KILLED = """
import os, signal, sys
from pathlib import Path
from fastcpt.corpus import build, shards
from fastcpt.recipe import load_recipe
recipe, selection, home, moment = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "second shard":
    write, calls = shards.write_shard, []
    def write_shard(*arguments):
        calls.append(1)
        return die() if len(calls) == 2 else write(*arguments)
    shards.write_shard = write_shard
else:
    setattr(build, moment, die)
build.build(selection, load_recipe(recipe), Path(home), 1)
"""


@pytest.mark.parametrize(
    "moment", ["ids_of_all", "plan_rows", "second shard", "write_validation", "_files"]
)
def test_a_build_killed_at_any_instant_goes_on(
    documents: Writer, recipe_for: Recipes, home: Path, tmp_path: Path, moment: str
) -> None:
    recipe = recipe_for(documents(acts()))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)["path"]
    command = [sys.executable, "-c", KILLED, tmp_path / "recipe.yaml", selection, home, moment]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([*map(str, command)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    complete = {
        path: path.stat().st_mtime_ns
        for path in [*home.glob("tokens/*/*.ids?"), *home.rglob("*.parquet")]
        if not path.name.startswith(".")
    }
    corpus = build(selection, recipe, home, 1)
    whole = build(selection, recipe, tmp_path / "another", 1)
    assert bytes_of(Path(corpus["path"])) == bytes_of(Path(whole["path"]))
    # what was complete was not made again
    assert {path: path.stat().st_mtime_ns for path in complete} | complete == complete


@pytest.mark.parametrize(("largest", "width"), [(65_535, 2), (65_536, 3), (128_255, 3)])
def test_kept_ids_take_two_bytes_where_the_vocabulary_allows(
    tmp_path: Path, largest: int, width: int
) -> None:
    ids = np.array([0, 255, 256, largest, 7], dtype=np.int32)
    file = write_ids(tmp_path / "some", ids)
    assert file.stat().st_size == width * len(ids)
    with TokenFiles([str(file)]) as files:
        places = (np.array(column) for column in ([0, 0], [3, 0], [2, 3]))
        assert files.read(*places).tolist() == [largest, 7, 0, 255, 256]


KILLED_AT_A_FILE = """
import os, signal, sys
from pathlib import Path
from fastcpt.corpus.build import build
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.score import score_parts
from fastcpt.corpus.select import select
from fastcpt.recipe import load_recipe
recipe, home, instant = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
# each file is flushed before it gets its name, and its folder after
flush, flushed = os.fsync, []
def fsync(file):
    flush(file)
    flushed.append(file)
    if len(flushed) == instant:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
build(select([score["path"] for score in scores], recipe, home)["path"], recipe, home, 1)
"""


@given(st.integers(1, 36))
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_killed_at_any_file_the_outcome_is_the_same(
    documents: Writer,
    recipe_for: Recipes,
    tmp_path_factory: pytest.TempPathFactory,
    instant: int,
) -> None:
    """From the first table of scores to the last line of the manifest, before and after a file."""
    recipe = recipe_for(documents(acts()))
    folder = tmp_path_factory.mktemp("killed")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", KILLED_AT_A_FILE, folder / "recipe.yaml", folder / "home"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([*map(str, command), str(instant)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    corpus = Path(made(recipe, folder / "home")["path"])
    for begun in corpus.rglob(".*.partial"):
        begun.unlink()
    assert bytes_of(corpus) == bytes_of(Path(made(recipe, folder / "another")["path"]))


def test_the_counted_budget_is_exact_to_one_document(
    documents: Writer, recipe_for: Recipes, home: Path
) -> None:
    records = acts(60)
    everything = made(recipe_for(documents(records)), home)
    budget = everything["tokens"] // 2
    corpus = made(recipe_for(documents(records), selection__target_tokens=budget), home)
    held_out = sum(item["tokens"] for item in corpus["validation"])
    used = corpus["tokens"] + held_out
    shortest = min(map(len, (row["input_ids"] for row in rows_of(everything, "validation*/*"))))
    assert budget - 2 * shortest < used <= budget
    funnel = {row["reason"]: row for row in corpus["funnel"] if row["stage"] in {"kept", "build"}}
    assert funnel["train"]["tokens"] == corpus["tokens"]
    assert funnel["train"]["documents"] == corpus["documents"]
    rows = [row for row in corpus["funnel"] if row["stage"] != "read"]
    whole = next(row for row in corpus["funnel"] if row["stage"] == "read" and not row["reason"])
    assert whole["tokens"] == sum(row["tokens"] for row in rows)


def test_too_little_for_the_shards(documents: Writer, recipe_for: Recipes, home: Path) -> None:
    recipe = recipe_for(documents(acts(6, words=10)), corpus__num_shards=500)
    with pytest.raises(BuildError, match=r"sequences of 64 for 500 shards; take more documents"):
        made(recipe, home)


def test_a_tokenizer_trained_on_the_documents_is_the_same_again(
    documents: Writer, recipe_for: Recipes, tmp_path: Path
) -> None:
    recipe = recipe_for(documents(acts()), tokenizer__path=None, tokenizer__train_vocab_size=400)
    one, other = (made(recipe, tmp_path / name) for name in ("one", "other"))
    assert one["tokenizer"] == other["tokenizer"]
    assert one["tokenizer"]["vocab_size"] == 400
    assert one["digest"] == other["digest"]


def test_progress_is_logged_with_rate_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcpt.progress import Progress

    clock = iter([0.0, 4.0, 12.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO")
    progress = Progress("tokenize", "documents", 100)
    for _ in range(3):
        progress.add(12)
    assert caplog.messages == ["tokenize: 24 of 100 documents, 2 documents/s, 38 s left"]


def test_documents_by_url(recipe_for: Recipes, home: Path) -> None:
    import fsspec

    with fsspec.open("memory://acts-by-url/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write("".join(json.dumps(item) + "\n" for item in acts()).encode())
    recipe = recipe_for("memory://acts-by-url")
    assert made(recipe, home)["documents"] > 30
    assert made(recipe, home)["reused"]
