"""Fine-tuning data: the loss mask, and how conversations share rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastcpt.training.data import IGNORE_INDEX, Row
from fastcpt.training.sft import (
    Chat,
    Instruction,
    InstructionError,
    example,
    pack_examples,
    read_instructions,
    save_tokenizer,
    sft_rows,
)
from training.tiny import BOS, END, TURN, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def plain(tmp_path: Path) -> Chat:
    return Chat(byte_tokenizer(tmp_path / "plain"))


@pytest.fixture
def own(tmp_path: Path) -> Chat:
    return Chat(byte_tokenizer(tmp_path / "own", TEMPLATE))


def text(chat: Chat, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids))


# What a conversation looks like


def test_without_a_template_the_plain_one_is_used(plain: Chat) -> None:
    prompt = plain.prompt_ids("Why?", 100)
    assert prompt[0] == BOS
    assert text(plain, prompt[1:]) == "### Instruction:\nWhy?\n\n### Response:\n"
    answer = plain.answer_ids("Why?", "So.", 100)
    assert text(plain, answer[:-1]) == "So."
    assert answer[-1] == END == plain.end_id


def test_a_tokenizers_own_template_comes_first(own: Chat) -> None:
    assert text(own, own.prompt_ids("Why?", 100)) == "<s>[user]Why?<turn>[assistant]"
    answer = own.answer_ids("Why?", "So.", 100)
    assert text(own, answer) == "So.<turn>"
    # generation stops where the template ends a turn
    assert answer[-1] == TURN == own.end_id


def test_what_follows_the_end_of_the_turn_is_not_learned(tmp_path: Path) -> None:
    template = TEMPLATE.replace("<turn>{% endfor %}", "</s>\n{% endfor %}")
    chat = Chat(byte_tokenizer(tmp_path, template))
    assert text(chat, chat.answer_ids("Why?", "So.", 100)) == "So.</s>"


def test_a_template_that_changes_its_prompt_is_refused(tmp_path: Path) -> None:
    template = TEMPLATE.replace("[assistant]{% endif %}", "[answer]{% endif %}")
    with pytest.raises(InstructionError, match="writes a prompt differently"):
        Chat(byte_tokenizer(tmp_path, template))


def test_the_plain_template_is_saved_with_the_tokenizer(plain: Chat, tmp_path: Path) -> None:
    folder = save_tokenizer(plain, tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(str(folder))
    message = [{"role": "user", "content": "Why?"}]
    ids = again.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert ids == plain.prompt_ids("Why?", 100)


# What is learned


@pytest.mark.parametrize("chat", ["plain", "own"])
def test_loss_is_on_the_answer_and_its_end_alone(chat: str, request: pytest.FixtureRequest) -> None:
    words: Chat = request.getfixturevalue(chat)
    row = example(words, Instruction("1", "Why?", "So."), 100)
    prompt = words.prompt_ids("Why?", 100)
    assert row.labels is not None
    assert row.input_ids.tolist()[: len(prompt)] == prompt
    assert row.labels.tolist()[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert row.labels.tolist()[len(prompt) :] == row.input_ids.tolist()[len(prompt) :]
    assert row.labels.tolist()[len(prompt) :] == words.answer_ids("Why?", "So.", 100)


def test_a_long_answer_loses_its_end_and_a_long_prompt_keeps_half(own: Chat) -> None:
    # "<s>[user]?<turn>[assistant]" is 1 + 6 + 1 + 1 + 11 = 20 tokens
    row = example(own, Instruction("1", "?", "a" * 100), 50)
    assert row.labels is not None
    assert len(row.input_ids) == 50
    assert (row.labels == IGNORE_INDEX).sum() == 20
    assert text(own, row.input_ids[20:].tolist()) == "a" * 30
    # both too long: the prompt is cut to at most half, the answer fills the rest
    row = example(own, Instruction("1", "p" * 100, "a" * 100), 50)
    assert row.labels is not None
    prompt = int((row.labels == IGNORE_INDEX).sum())
    assert prompt <= 25
    assert len(row.input_ids) == 50
    assert (
        text(own, row.input_ids[:prompt].tolist())
        == f"<s>[user]{'p' * (prompt - 19)}<turn>[assistant]"
    )
    # a long prompt with a short answer gets what the answer leaves
    row = example(own, Instruction("1", "p" * 100, "a"), 50)
    assert row.labels is not None
    assert 45 <= len(row.input_ids) <= 50
    assert text(own, row.input_ids[-2:].tolist()) == "a<turn>"


def test_a_template_that_fills_the_row_is_refused(own: Chat) -> None:
    with pytest.raises(InstructionError, match=r"raise corpus\.max_seq_length"):
        own.prompt_ids("Why?", 10)


# Rows


def piece(length: int) -> Row:
    ids = np.arange(length, dtype=np.int32)
    labels = ids.copy()
    labels[: length // 2] = IGNORE_INDEX
    return Row(ids, np.array([length], np.int32), labels)


def test_the_longest_go_first_each_into_the_fullest_row_with_room() -> None:
    rows = pack_examples([piece(length) for length in (2, 3, 4, 6, 7)], 10)
    # 7 and 6 open rows; 4 fills 6's, 3 fills 7's, 2 needs a new one
    assert sorted(sorted(row.lengths.tolist()) for row in rows) == [[2], [3, 7], [4, 6]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_keeps_every_conversation_whole(lengths: list[int]) -> None:
    rows = pack_examples([piece(length) for length in lengths], 20)
    assert sorted(int(n) for row in rows for n in row.lengths) == sorted(lengths)
    for row in rows:
        assert len(row.input_ids) == row.lengths.sum() <= 20
        begin = 0
        for length in row.lengths:
            assert row.labels is not None
            one, part = piece(length), slice(begin, begin + length)
            assert row.input_ids[part].tolist() == one.input_ids.tolist()
            assert one.labels is not None
            assert row.labels[part].tolist() == one.labels.tolist()
            begin += length


# Files


def write(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def line(**fields: object) -> str:
    return json.dumps({"id": "1", "prompt": "Why?", "response": "So.", **fields})


def test_a_folder_becomes_rows(own: Chat, tmp_path: Path) -> None:
    folder = write(tmp_path / "instructions", line(), line(prompt="Who\u2028?"), line(response="x"))
    rows = sft_rows(folder, own, 100)
    assert rows.size == 100
    assert sum(len(rows[n].lengths) for n in range(len(rows))) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", r"train\.jsonl:2"),
        ("[1]", r"train\.jsonl:2"),
        ('{"id": "1", "prompt": "Why?"}', r"train\.jsonl:2.*response"),
        (line(response=""), r"train\.jsonl:2.*must be texts"),
        (line(prompt=3), r"train\.jsonl:2.*must be texts"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "instructions", line(), wrong)
    with pytest.raises(InstructionError, match=said):
        read_instructions(folder / "train.jsonl")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InstructionError, match="is missing"):
        read_instructions(tmp_path / "train.jsonl")
    with pytest.raises(InstructionError, match="no instructions"):
        read_instructions(write(tmp_path / "empty", "") / "train.jsonl")
