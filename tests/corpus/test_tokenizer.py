"""Which tokenizer a corpus gets, and that the fast path gives the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from corpus.made import text_of
from fastcpt.corpus.tokenizer import (
    RankedEncoder,
    TokenizerError,
    describe,
    faster,
    find_tokenizer,
    write_tokenizer,
)
from fastcpt.recipe import load_recipe


@given(st.text(max_size=80))
def test_tiktoken_yields_the_same_ids(tokenizer_folder: Path, text: str) -> None:
    file = tokenizer_folder / "tokenizer.json"
    ranked = RankedEncoder.of(file)
    assert ranked is not None
    slow = describe(file).load()
    text = text.encode("utf-8", "replace").decode()
    assert ranked.encode(text).tolist() == slow.encode(text, add_special_tokens=False).ids
    assert slow.decode(ranked.encode(text).tolist()) == text


def test_a_tokenizer_that_tiktoken_cannot_run_is_left_alone(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = faster(describe(tmp_path / "tokenizer.json"), [], tmp_path / "home")
    assert not found.ranked
    (ids,) = found.encoder()(["ﬁne"])
    assert tokenizer.decode(ids.tolist()) == "fine"


def test_other_ids_are_noticed(tokenizer_folder: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    # merges in another order than the entries' numbers: tiktoken would merge otherwise
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    texts = [text_of(1, 500)]
    assert not faster(describe(tmp_path / "tokenizer.json"), texts, tmp_path / "home").ranked
    plain = describe(tokenizer_folder / "tokenizer.json")
    assert faster(plain, texts, tmp_path / "home").ranked


@pytest.mark.parametrize("ranked", [False, True])
def test_a_special_token_in_a_document_is_text(tokenizer_folder: Path, ranked: bool) -> None:
    from dataclasses import replace

    facts = replace(describe(tokenizer_folder / "tokenizer.json"), ranked=ranked)
    (ids,) = facts.encoder()(["a<|end_of_text|>b"])
    assert facts.end_id not in ids.tolist()
    assert facts.load().decode(ids.tolist()) == "a<|end_of_text|>b"


def test_a_copy_says_how_documents_begin_and_end(tokenizer_folder: Path, tmp_path: Path) -> None:
    facts = describe(tokenizer_folder / "tokenizer.json")
    write_tokenizer(facts, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>"
    assert config["eos_token"] == "<|end_of_text|>"
    copy = describe(tmp_path / "tokenizer.json")
    assert (copy.bos_id, copy.end_id, copy.pad_id) == (facts.bos_id, facts.end_id, facts.pad_id)


def test_a_tokenizer_beside_the_model_is_found(tokenizer_folder: Path) -> None:
    recipe = load_recipe("cpt_config_fast", {"model.name_or_path": str(tokenizer_folder)})
    found = find_tokenizer(recipe)
    assert found is not None
    assert found.file == tokenizer_folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokenizer.path": "/none"}, r"there is no '/none'; give a folder with tokenizer\.json"),
        (
            {"model.name_or_path": "nobody/no-such-model"},
            "tokenizer of model 'nobody/no-such-model' is not on this machine: give tokenizer.path",
        ),
        (
            {"model.name_or_path": None, "model.config": {"hidden_size": 8}},
            "a model initialised at random has no tokenizer of its own",
        ),
    ],
)
def test_a_missing_tokenizer(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        find_tokenizer(load_recipe("cpt_config_fast", overrides))


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer that can be read"):
        find_tokenizer(load_recipe("cpt_config_fast", {"tokenizer.path": str(tmp_path)}))


def test_a_tokenizer_without_an_end_of_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    content = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|end_of_text|>", "<|stop|>"))
    with pytest.raises(TokenizerError, match="has no end-of-text token"):
        describe(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    assert describe(tmp_path / "tokenizer.json").end_id == 1
