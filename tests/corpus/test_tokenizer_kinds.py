"""Every kind of tokenizer: special tokens in a text, and the same ids by the fast path."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from corpus.made import text_of
from fastcpt.corpus.tokenizer import RankedEncoder, describe, faster

# The first splits as the models' own files have them
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLANKS = [" " * n for n in range(24, 1, -1)]
END = "<|endoftext|>"


def byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_at(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def trained(first_split: Any, normalizer: Any, added: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = first_split
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text_of(seed, 400) for seed in range(8)]
    law = (
        "Article 12(3): Übergangsmaßnahmen — the Member States' 1 234,50 € 第一条 в силу.\n\n\t§ 5"
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[law] * 20], trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.add_tokens(added)
    return tokenizer


def plain(content: str, normalized: bool) -> AddedToken:
    return AddedToken(content, special=False, normalized=normalized)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: trained(byte_level(use_regex=True), None, []),
    "gpt_neox": lambda: trained(
        byte_level(use_regex=True),
        normalizers.NFC(),
        [plain(blanks, normalized=True) for blanks in BLANKS],
    ),
    "qwen2": lambda: trained(
        pre_tokenizers.Sequence([split_at(QWEN_2), byte_level(use_regex=False)]),
        normalizers.NFC(),
        [plain("<tool_call>", normalized=False), plain("</tool_call>", normalized=False)],
    ),
}


@cache
def file_of(kind: str, folder: Path) -> Path:
    (folder / kind).mkdir()
    KINDS[kind]().save(str(folder / kind / "tokenizer.json"))
    return folder / kind / "tokenizer.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


# combining signs, blanks, what was added, contractions, scripts, digits
PIECES = st.sampled_from(
    [
        *(
            " ",
            "  ",
            "     ",
            "\n",
            "\r\n",
            "\t",
            "'s",
            "'LL",
            "'ve",
            "é",
            "e\u0301",
            "\u0338",
            "Å",
        ),
        *(
            "<tool_call>",
            "</tool_call>",
            END,
            "<",
            ">",
            "_call>",
            "123456",
            "٣",
            "第一条",
            "ß",
            "—",
        ),
        *("Article", "regulation", "\u1100\u1161", "\uac00", "\u0344", "\u2126", "ﬁ", "\U0001f4dc"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=20).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tiktoken_yields_the_ids_of_the_library(folder: Path, kind: str, text: str) -> None:
    file = file_of(kind, folder)
    slow = Tokenizer.from_file(str(file))
    slow.encode_special_tokens = True
    ranked = _ranked(file)
    assert ranked.encode(text).tolist() == slow.encode(text, add_special_tokens=False).ids


@cache
def _ranked(file: Path) -> RankedEncoder:
    ranked = RankedEncoder.of(file)
    assert ranked is not None
    return ranked


@pytest.mark.parametrize("kind", KINDS)
def test_these_kinds_are_run_by_tiktoken(folder: Path, tmp_path: Path, kind: str) -> None:
    found = faster(describe(file_of(kind, folder)), [text_of(1, 500)], tmp_path)
    assert found.ranked
    text = f"{text_of(2, 50)}  {END} e\u0301 <tool_call>x</tool_call>   "
    slow = Tokenizer.from_file(str(found.file))
    slow.encode_special_tokens = True
    (ids,) = found.encoder()([text])
    assert ids.tolist() == slow.encode(text, add_special_tokens=False).ids
    assert found.end_id not in ids.tolist()


def test_what_splits_in_several_steps_is_left_to_the_library(tmp_path: Path) -> None:
    several = pre_tokenizers.Sequence(
        [
            split_at(r"\p{N}{1,3}"),
            split_at("[一-龥぀-ゟ゠-ヿ]+"),
            split_at(DEEPSEEK_3),
            byte_level(use_regex=False),
        ]
    )
    trained(several, None, []).save(str(tmp_path / "tokenizer.json"))
    found = faster(describe(tmp_path / "tokenizer.json"), [text_of(1, 500)], tmp_path / "home")
    assert not found.ranked


# Special tokens that a text spells


def unigram(tmp_path: Path, metaspace: Any, specials: list[str]) -> Path:
    pieces = [(token, 0.0) for token in specials]
    pieces += [(sign, -4.0) for sign in "▁abcdefghiklmnoprstuvn<>/[]_"]
    pieces += [("▁the", -2.0), ("the", -3.0), ("s>", -3.0), ("pad", -3.0), ("▁<", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=specials.index("<unk>")))
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


T5 = ["<pad>", "</s>", "<unk>"]
XLM_R = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.mark.parametrize("specials", [T5, XLM_R])
@pytest.mark.parametrize(
    "metaspace",
    [
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        None,
    ],
    ids=["metaspace", "whitespace first", "none"],
)
def test_a_unigram_tokenizer_takes_no_text_for_a_special_token(
    tmp_path: Path, specials: list[str], metaspace: Any
) -> None:
    facts = describe(unigram(tmp_path, metaspace, specials))
    special_ids = {facts.load().token_to_id(token) for token in specials}
    separator = "" if metaspace is None else " "
    texts = [f"the{separator}{token}the{token}{token}" for token in specials]
    for text, ids in zip(texts, facts.encoder()(texts), strict=True):
        assert special_ids.isdisjoint(ids.tolist())
        if separator:
            assert facts.load().decode(ids.tolist()) == text
    # what spells none of them is encoded as ever
    library = Tokenizer.from_file(str(facts.file))
    for text in (f"the{separator}pads", "s>the<", f"</s{separator}the>"):
        (ids,) = facts.encoder()([text])
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_of_whole_words_takes_none_either(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, "the": 2, "<": 3, "/s>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (ids,) = describe(tmp_path / "tokenizer.json").encoder()(["the </s> the"])
    assert ids.tolist() == [2, 3, 4, 2]


def test_a_tokenizer_that_was_compared_by_an_older_encoder_is_compared_again(
    folder: Path, tmp_path: Path
) -> None:
    facts = describe(file_of("gpt2", folder))
    old = tmp_path / "tokenizers" / f"{facts.sha256[:16]}.json"
    old.parent.mkdir()
    old.write_text(json.dumps({"ranked": False}))
    assert faster(facts, [], tmp_path).ranked


def test_a_million_blanks_are_encoded_too(tokenizer_folder: Path) -> None:
    facts = replace(describe(tokenizer_folder / "tokenizer.json"), ranked=True)
    text = "x" + " " * 1_000_000 + "y"
    (ids,) = facts.encoder()([text])
    assert facts.load().decode(ids.tolist()) == text
