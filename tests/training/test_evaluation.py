"""Perplexity: each token once, the same figure for any batches, ranks or sharding."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from fastcpt.recipe import load_recipe
from fastcpt.training import evaluation, scoring
from fastcpt.training.evaluation import evaluate, loss_figures
from fastcpt.training.exits import exit_code
from fastcpt.training.model import ModelError
from fastcpt.training.scoring import Scorer, document_losses
from fastcpt.training.validation import (
    EvaluationError,
    HeldOutDocument,
    Window,
    validation_files,
    windows_of,
)
from training.conftest import INCLUDE, launch, write_recipe
from training.tiny import BOS, END, WORDS, adapter_folder, llama, model_folder

CPU = torch.device("cpu")
SIZE = 64


def document(
    name: str, length: int, year: int | None = None, areas: tuple[str, ...] = (), seed: int = 0
) -> HeldOutDocument:
    """BOS, random bytes, END: ``length`` tokens in all."""
    text = np.random.default_rng([seed, length]).integers(0, 256, length - 2)
    return HeldOutDocument(name, np.array([BOS, *text, END], np.int32), length - 2, year, areas)


DOCUMENTS = [
    document("long", 101, 2016, ("privacy", "digital")),
    document("short", 5, 2016, ("digital",)),
    document("as long as a window", SIZE, None),
    document("one more", SIZE + 1, 1995),
]
NEWEST = [document("new", 40, 2026, ("digital",), seed=1)]


def write_set(folder: Path, documents: list[HeldOutDocument]) -> None:
    folder.mkdir(parents=True)
    table = {
        "id": pa.array([one.id for one in documents]),
        "input_ids": pa.array([one.input_ids for one in documents], pa.list_(pa.int32())),
        "bytes": pa.array([one.bytes for one in documents], pa.int64()),
        "year": pa.array([one.year for one in documents], pa.int32()),
        "areas": pa.array([list(one.areas) for one in documents], pa.list_(pa.string())),
    }
    # several row groups, as the corpus room writes
    parquet.write_table(pa.table(table), folder / "validation_shard_00.parquet", row_group_size=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    write_set(folder / "validation", DOCUMENTS)
    write_set(folder / "validation_newest", NEWEST)
    (folder / "corpus_manifest.json").write_text(json.dumps({"max_seq_length": SIZE}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("trained"), seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base"), seed=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), corpus={"max_seq_length": SIZE})


# Windows


def test_a_window_counts_what_the_one_before_has_not() -> None:
    assert windows_of([10, 1, 4, 2], 4) == [
        Window(0, 0, 1, 4),
        Window(0, 2, 4, 6),
        Window(0, 4, 6, 8),
        Window(0, 6, 8, 10),
        Window(2, 0, 1, 4),
        Window(3, 0, 1, 2),
    ]


@given(length=st.integers(0, 300), size=st.integers(2, 64))
def test_every_token_but_the_first_is_counted_once(length: int, size: int) -> None:
    windows = windows_of([length], size)
    counted = [token for w in windows for token in range(w.first, w.end)]
    assert counted == list(range(1, length))
    for window in windows:
        assert window.end - window.begin <= size
        # past the first window no token has less than half a window of context
        assert window.begin == 0 or window.first - window.begin >= size // 2


# Losses


def plain_loss(model: LlamaForCausalLM, ids: list[int], size: int) -> float:
    """Summed negative log likelihood, a token and a forward at a time."""
    total, half = 0.0, size // 2
    for token in range(1, len(ids)):
        # the first window that reaches the token begins at a multiple of half a window
        begin = 0
        while begin + size <= token:
            begin += half
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:token]])).logits[0, -1]
        total -= torch.log_softmax(logits.double(), dim=-1)[ids[token]].item()
    return total


def test_the_figure_is_that_of_one_token_at_a_time() -> None:
    model = llama()
    found = document_losses(Scorer(model), DOCUMENTS, SIZE, CPU)
    plain = [plain_loss(model, one.input_ids.tolist(), SIZE) for one in DOCUMENTS]
    assert found == pytest.approx(plain, rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_words() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    figures = loss_figures(DOCUMENTS, document_losses(Scorer(model), DOCUMENTS, SIZE, CPU))
    lengths = [101, 5, 64, 65]
    tokens, size = sum(lengths) - 4, sum(lengths) - 8
    assert figures["tokens"] == tokens
    assert figures["perplexity"] == pytest.approx(WORDS, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(WORDS) * tokens / size, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_the_size_of_batches_does_not_show(
    batch_tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scorer(llama())
    expected = document_losses(model, DOCUMENTS, SIZE, CPU)
    monkeypatch.setattr(scoring, "SCORED_AT_ONCE", chunk)
    found = document_losses(model, DOCUMENTS, SIZE, CPU, batch_tokens)
    assert found == pytest.approx(expected, rel=1e-6)


def test_batches_hold_no_more_tokens_than_asked() -> None:
    windows = sorted(windows_of([101, 5, 64, 65], SIZE), key=lambda w: w.begin - w.end)
    for batch in scoring._batches(windows, 200):
        longest = max(window.end - window.begin for window in batch)
        assert len(batch) * longest <= 200


# Figures


def test_figures_by_area_and_year_are_those_of_their_documents() -> None:
    nats = np.array([100 * math.log(8), 4 * math.log(2), 63 * math.log(4), 64 * math.log(4)])
    figures = loss_figures(DOCUMENTS, nats)
    # 100 x 3 + 4 x 1 + 63 x 2 + 64 x 2 = 558 bits over 231 tokens and 227 bytes
    assert figures["perplexity"] == pytest.approx(2 ** (558 / 231))
    assert figures["bits_per_byte"] == pytest.approx(558 / 227)
    assert figures["loss"] == pytest.approx(558 / 231 * math.log(2))
    assert (figures["tokens"], figures["documents"]) == (231, 4)
    assert set(figures["by_area"]) == {"privacy", "digital"}
    assert figures["by_area"]["privacy"]["perplexity"] == pytest.approx(8)
    digital = figures["by_area"]["digital"]
    assert digital["perplexity"] == pytest.approx(2 ** (304 / 104))
    assert digital["bits_per_byte"] == pytest.approx(304 / 102)
    assert digital["documents"] == 2
    # the document without a year is in none
    assert {year: one["tokens"] for year, one in figures["by_year"].items()} == {
        "1995": 64,
        "2016": 104,
    }


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e9])
def test_a_broken_model_has_no_figure(broken: float) -> None:
    with pytest.raises(EvaluationError, match="weights are broken"):
        loss_figures(DOCUMENTS, np.array([broken, 1.0, 1.0, 1.0]))


# The whole evaluation


def run(checkpoint: Path, corpus: Path, recipe: Path, output: Path, **more: Any) -> dict[str, Any]:
    settings = load_recipe(recipe)
    return evaluate(str(checkpoint), corpus, output, recipe=settings, **more)


def test_trained_and_base_stand_side_by_side(
    trained: Path, base: Path, corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation.json"
    result = run(trained, corpus, recipe, output, base=str(base))
    assert json.loads(output.read_text()) == result
    assert result["validation_set"] == "random"
    for who, folder in (("model", trained), ("base", base)):
        model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        nats = plain_loss(model, NEWEST[0].input_ids.tolist(), SIZE)
        newest = result["newest"][who]
        assert newest["perplexity"] == pytest.approx(math.exp(nats / 39), rel=1e-5)
        assert newest["bits_per_byte"] == pytest.approx(nats / math.log(2) / 38, rel=1e-5)
        assert result["random"][who]["tokens"] == 231
    assert result["random"]["model"]["perplexity"] != result["random"]["base"]["perplexity"]
    # document by document, so that two models can be compared in pairs
    for who in ("model", "base"):
        by_document = result["random"]["by_document"]
        assert len(by_document["id"]) == len(by_document["bytes"]) == len(by_document[who])
        assert sum(by_document[who]) / 231 == pytest.approx(result["random"][who]["loss"])


def test_the_same_inputs_are_not_evaluated_again(
    trained: Path, corpus: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "evaluation.json"
    folder = model_folder(tmp_path / "model", seed=1)
    first = run(folder, corpus, recipe, output)
    loaded = []
    real = evaluation.model_for_inference
    monkeypatch.setattr(
        evaluation,
        "model_for_inference",
        lambda path, *more, **named: loaded.append(path) or real(path, *more, **named),
    )
    assert run(folder, corpus, recipe, output) == first
    assert not loaded
    llama(seed=3).save_pretrained(str(folder))
    assert run(folder, corpus, recipe, output)["random"] != first["random"]
    assert loaded == [str(folder)]


# Questions


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A corpus whose held-out documents can be asked about."""
    folder = tmp_path_factory.mktemp("acts")
    words = AutoTokenizer.from_pretrained(str(trained))
    held_out = []
    for number, subject in enumerate(["ships", "honey", "toys", "lifts", "seeds", "banks"]):
        keep = f"Operators who deal in {subject} shall keep what the authority asks them to keep. "
        text = (
            f"on common rules for the trade in {subject} between the Member States\n{keep * 4}\n"
            f"Under Regulation (EC) No {100 + number}/{2001 + number} the maker of {subject} has "
            f"until {1 + number} March {2005 + number} to pay {3120 + 7 * number} euro. {keep}"
        )
        ids = np.array([BOS, *words(text, add_special_tokens=False)["input_ids"], END], np.int32)
        held_out.append(HeldOutDocument(f"act-{number}", ids, len(text.encode()), 2001, ("trade",)))
    write_set(folder / "validation", held_out)
    return folder


def test_model_and_base_are_asked_the_same_questions(
    trained: Path, base: Path, acts: Path, recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation.json"
    asked = run(trained, acts, recipe, output, base=str(base))["questions"]
    model, known = asked["model"], asked["base"]
    assert {kind: row["asked"] for kind, row in model["table"].items()} == {
        "citation": 6, "date": 6, "number": 6, "title": 6, "sentence": 6, "all": 30
    }  # fmt: skip
    assert len(model["right"]) == len(known["right"]) == 30
    share = model["right"].count("1") / 30
    assert model["table"]["all"]["value"] == pytest.approx(share)
    gain = model["table"]["all"]["gain"]
    assert gain["value"] == pytest.approx(share - known["right"].count("1") / 30)
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert "gain" not in known["table"]["all"]
    # after stage 2 the base's answers are taken from here
    later = run(
        base, acts, recipe, tmp_path / "later.json", base=str(base), base_evaluation=output
    )["questions"]
    assert later["base"] == known
    assert later["model"]["right"] == known["right"]
    assert later["model"]["table"]["all"]["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_recipe_may_ask_nothing(trained: Path, acts: Path, recipe: Path, tmp_path: Path) -> None:
    silent = load_recipe(recipe, {"evaluation.questions": 0})
    assert "questions" not in evaluate(
        str(trained), acts, tmp_path / "evaluation.json", recipe=silent
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded from here on."""
    paths: list[str] = []
    real = evaluation.model_for_inference
    monkeypatch.setattr(
        evaluation,
        "model_for_inference",
        lambda path, *more, **named: paths.append(str(path)) or real(path, *more, **named),
    )
    return paths


def test_after_stage_2_the_base_model_is_not_evaluated_again(
    trained: Path, base: Path, corpus: Path, recipe: Path, tmp_path: Path, loaded: list[str]
) -> None:
    first = run(trained, corpus, recipe, tmp_path / "first.json", base=str(base))
    second = model_folder(tmp_path / "second", seed=5)
    plain = run(second, corpus, recipe, tmp_path / "plain.json", base=str(base))
    loaded.clear()
    output, known = tmp_path / "second.json", tmp_path / "first.json"
    found = run(second, corpus, recipe, output, base=str(base), base_evaluation=known)
    assert loaded == [str(second)]
    assert found == plain
    assert found["random"]["base"] == first["random"]["base"]


def test_figures_of_another_base_or_other_documents_are_not_taken(
    trained: Path, base: Path, corpus: Path, recipe: Path, tmp_path: Path, loaded: list[str]
) -> None:
    known = tmp_path / "known.json"
    run(trained, corpus, recipe, known, base=str(model_folder(tmp_path / "another", seed=7)))
    loaded.clear()
    run(trained, corpus, recipe, tmp_path / "a.json", base=str(base), base_evaluation=known)
    assert loaded == [str(trained), str(base)]
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    write_set(folder / "validation_general", [document("general", 90, seed=2)])
    known, loaded[:] = tmp_path / "a.json", []
    run(trained, folder, recipe, tmp_path / "b.json", base=str(base), base_evaluation=known)
    assert loaded == [str(trained), str(base)]


def test_adapters_are_evaluated_on_their_base_and_without(
    base: Path, corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    adapter = adapter_folder(tmp_path / "final", base)
    both = run(adapter, corpus, recipe, tmp_path / "both.json", base=str(base))
    plain = run(base, corpus, recipe, tmp_path / "plain.json")
    assert both["random"]["base"] == plain["random"]["model"]
    assert both["random"]["model"]["perplexity"] != both["random"]["base"]["perplexity"]
    # the output folder of a training stands for its final model
    again = run(tmp_path, corpus, recipe, tmp_path / "again.json")
    assert again["random"]["model"] == both["random"]["model"]


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
def test_two_ranks_give_the_figure_of_one(
    in_parts: bool, trained: Path, base: Path, corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    expected = run(trained, corpus, recipe, tmp_path / "one.json", base=str(base))
    output = tmp_path / "two.json"
    ranks = launch(
        "evaluate_cpt_checkpoint.py",
        *("--config", recipe, "--checkpoint", trained, "--base_model", base),
        *("--validation_data", corpus, "--output", output),
        *(["--in_parts"] if in_parts else []),
    )
    said, _ = ranks.communicate(timeout=300)
    assert ranks.returncode == 0, said
    found = json.loads(output.read_text())
    for name in ("random", "newest"):
        for who in ("model", "base"):
            for figure in ("perplexity", "bits_per_byte"):
                one, two = expected[name][who][figure], found[name][who][figure]
                assert f"{one:.4g}" == f"{two:.4g}"
            assert found[name][who]["tokens"] == expected[name][who]["tokens"]
    assert said.count("evaluated model, random") == 1


def test_general_texts_show_what_was_forgotten(
    trained: Path, base: Path, corpus: Path, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    write_set(folder / "validation_general", [document("general", 90, seed=2)])
    result = run(trained, folder, recipe, tmp_path / "evaluation.json", base=str(base))
    assert result["validation_set"] == "random"  # what the gate reads stays
    assert list(validation_files(folder)) == ["random", "general", "newest"]
    general = result["general"]
    assert general["model"]["tokens"] == general["base"]["tokens"] == 89
    assert general["model"]["perplexity"] != general["base"]["perplexity"]
    assert general["model"]["by_area"] == general["model"]["by_year"] == {}
    by_year = {who: result["random"][who]["by_year"]["2016"] for who in ("model", "base")}
    assert by_year["model"]["tokens"] == by_year["base"]["tokens"] == 104


# What cannot be evaluated


def test_a_folder_without_validation_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="validation_shard"):
        validation_files(tmp_path)


def test_one_set_can_be_given_by_its_own_folder(corpus: Path) -> None:
    assert list(validation_files(corpus)) == ["random", "newest"]
    assert list(validation_files(corpus / "validation_newest")) == ["newest"]


def test_the_gates_set_has_to_be_there(trained: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, gate={"validation_set": "newest"})
    with pytest.raises(EvaluationError, match=r"gate\.validation_set"):
        run(trained, corpus / "validation", recipe, tmp_path / "evaluation.json")


def test_another_tokenizers_corpus_is_refused(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    small = model_folder(tmp_path / "small", vocab_size=257, pad_token_id=None, eos_token_id=BOS)
    with pytest.raises(EvaluationError, match="another tokenizer"):
        run(small, corpus, recipe, tmp_path / "evaluation.json")
    assert not (tmp_path / "evaluation.json").exists()


def test_a_missing_model_is_named(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        run(tmp_path / "nowhere", corpus, recipe, tmp_path / "evaluation.json")


def test_a_checkpoint_in_parts_is_told_from_a_model(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ModelError, match="for resuming"):
        evaluate(str(tmp_path), corpus, tmp_path / "evaluation.json")


def test_the_command_tells_what_is_wrong_in_one_line(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = INCLUDE / "scripts" / "evaluate_cpt_checkpoint.py"
    words = ["--checkpoint", str(trained), "--validation_data", str(tmp_path / "nothing")]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    assert exit_code(runpy.run_path(str(script))["main"]) == 78
    said = capsys.readouterr().err
    assert "nothing: no validation/validation_shard_*.parquet there" in said
    assert said.count("\n") == 1


def test_without_a_recipe_the_corpus_tells_the_window(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    result = evaluate(str(trained), corpus / "validation_newest", tmp_path / "evaluation.json")
    assert result["window"] == SIZE
    assert result["newest"]["model"]["tokens"] == 39
