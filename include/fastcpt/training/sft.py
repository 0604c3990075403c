"""Packs instructions into rows for the trainer, with loss on the answers only.

A conversation is formatted by the tokenizer's chat template; a tokenizer without one gets
``PLAIN_TEMPLATE``, which is saved with the model. Prompt and answer are tokenized separately, so that the
prompt is tokenized exactly as for generation. The answer ends with the end-of-turn token, at which
generation stops. In a row each conversation is a segment.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer

from fastcpt.best_fit import best_fit
from fastcpt.training.data import IGNORE_INDEX, ListRows, Row

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n### Response:\n{% endif %}"
    "{% endfor %}"
)


class InstructionError(ValueError):
    """The instructions or the tokenizer cannot be used; the message says what to change."""


class Instruction(NamedTuple):
    id: str
    prompt: str
    response: str


def read_instructions(file: Path) -> list[Instruction]:
    """The instructions of a JSONL file; ``InstructionError`` names an invalid line."""
    if not file.is_file():
        raise InstructionError(f"{file} is missing; --instructions is a folder that `build` wrote")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            instruction = Instruction(*(record[field] for field in Instruction._fields))
        except (ValueError, TypeError, KeyError) as error:
            raise InstructionError(
                f"{file}:{number}: needs a JSON object with id, prompt and response ({error!r})"
            ) from error
        if not all(isinstance(text, str) and text for text in instruction[1:]):
            raise InstructionError(f"{file}:{number}: prompt and response must be texts")
        found.append(instruction)
    if not found:
        raise InstructionError(f"{file} holds no instructions")
    return found


class Chat:
    """A tokenizer that formats conversations of one prompt and one answer."""

    def __init__(self, folder: str | Path) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        except (ValueError, OSError) as error:
            raise InstructionError(f"{folder}: no tokenizer can be loaded: {error}") from error
        if self.tokenizer.eos_token_id is None:
            raise InstructionError(f"{folder}: the tokenizer has no end-of-text token (eos_token)")
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        self.end_id = self._ids(self._answer_text("a", "b"))[-1]
        if self.end_id not in self.tokenizer.all_special_ids:
            self.end_id = self.tokenizer.eos_token_id

    def prompt_ids(self, prompt: str, room: int) -> list[int]:
        """The prompt's token ids; its end is cut off if it needs more than ``room`` tokens."""
        text = prompt
        ids = self._ids(self._prompt_text(text))
        while len(ids) > room:
            if not text:
                raise InstructionError(
                    f"the chat template alone takes {len(ids)} tokens, there is room for {room}; "
                    "raise corpus.max_seq_length or lower sft.max_new_tokens"
                )
            # cut at least one character, and slightly more than the excess
            text = text[: min(len(text) - 1, int(len(text) * 0.98 * room / len(ids)))]
            ids = self._ids(self._prompt_text(text))
        return ids

    def answer_ids(self, prompt: str, response: str, room: int) -> list[int]:
        """The answer's token ids with the end-of-turn token, cut off at ``room``."""
        ids = self._ids(self._answer_text(prompt, response))
        if self.end_id in ids:
            ids = ids[: len(ids) - ids[::-1].index(self.end_id)]
        else:
            ids.append(self.end_id)
        return ids[:room]

    def _prompt_text(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def _answer_text(self, prompt: str, response: str) -> str:
        before = self._prompt_text(prompt)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        if not whole.startswith(before):
            raise InstructionError(
                "the tokenizer's chat template writes a prompt differently when an answer follows; "
                "give the model a template that does not"
            )
        return whole[len(before) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def example(chat: Chat, instruction: Instruction, size: int) -> Row:
    """One conversation of at most ``size`` tokens, with -100 labels on the prompt.

    If both are too long, the prompt keeps half of ``size`` and the answer gets the rest.
    """
    answer = chat.answer_ids(instruction.prompt, instruction.response, size)
    prompt = chat.prompt_ids(instruction.prompt, max(size // 2, size - len(answer)))
    answer = answer[: size - len(prompt)]
    ids = np.array(prompt + answer, np.int32)
    labels = ids.copy()
    labels[: len(prompt)] = IGNORE_INDEX
    return Row(ids, np.array([len(ids)], np.int32), labels)


def pack_examples(examples: list[Row], size: int) -> list[Row]:
    """Pack conversations into rows of at most ``size`` tokens (``best_fit``)."""
    return [
        Row(
            np.concatenate([examples[n].input_ids for n in row]),
            np.concatenate([examples[n].lengths for n in row]),
            np.concatenate([labels for n in row if (labels := examples[n].labels) is not None]),
        )
        for row in best_fit([len(one.input_ids) for one in examples], size)
    ]


def sft_rows(instructions: Path, chat: Chat, size: int) -> ListRows:
    """The training rows of an instructions folder (``train.jsonl``)."""
    found = read_instructions(instructions / "train.jsonl")
    rows = pack_examples([example(chat, instruction, size) for instruction in found], size)
    asked = sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows if row.labels is not None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{len(found):,} answers of {asked:,} tokens in {len(rows):,} rows", flush=True)
    return ListRows(rows, size)


def save_tokenizer(chat: Chat, folder: Path) -> Path:
    """Write the tokenizer with its chat template, atomically. Called by every rank."""
    if (not dist.is_initialized() or dist.get_rank() == 0) and not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        chat.tokenizer.save_pretrained(str(partial))
        os.rename(partial, folder)
    if dist.is_initialized():
        dist.barrier()
    return folder
