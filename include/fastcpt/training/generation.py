"""Answers the held-out instructions by greedy decoding, and measures the answers.

ROUGE-L and citation accuracy, each with a 95 % bootstrap interval over the instructions
(docs/evaluation.md says what they measure and what not). Prompts are sorted by length and decoded in
left-padded batches, which the ranks share.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from fastcpt.files import digest_of, read_json, sha256_of_file, write_json
from fastcpt.intervals import ratio
from fastcpt.progress import Progress
from fastcpt.recipe import Recipe
from fastcpt.training.citations import check_citations
from fastcpt.training.inference import final_of, model_for_inference, model_identity, ranks
from fastcpt.training.made_from import ANSWERS_FORMAT
from fastcpt.training.ranks import rank, say_once, world_size
from fastcpt.training.sft import Chat, Instruction, InstructionError, read_instructions

BATCH = 32  # prompts decoded together
SAMPLES = 3  # answers shown in the report, the base model's beside them
SHOWN = 2000  # characters of each of their texts


def evaluate_sft(
    recipe: Recipe,
    model: str,
    instructions: Path,
    output: Path,
    batch: int = BATCH,
    in_parts: bool | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Write ``output`` (evaluation_sft.json) and return its content; called by every rank.

    ``rouge_l``: mean F-measure. ``citation_accuracy``: share of the answers' citations that are also in
    the reference answers; ``beyond_prompt``: the same without citations in the prompt; ``recall``: share
    of the references' citations that the answers have. Each has a ``value`` (None if nothing is counted)
    with ``low`` and ``high``. ``samples``: the first few answers; ``base``, a folder or hub name, also
    answers their prompts. An evaluation of the same inputs is not repeated. Raises kinds of
    ``ValueError``.
    """
    model = final_of(model)
    held_out = instructions / "held_out.jsonl"
    asked = read_instructions(held_out)
    made_from = digest_of(
        ANSWERS_FORMAT,
        model_identity(model),
        model_identity(base) if base else None,
        sha256_of_file(held_out),
        recipe.sft.max_new_tokens,
        recipe.corpus.max_seq_length,
        recipe.model.dtype,
    )
    if output.is_file() and (found := read_json(output)).get("made_from") == made_from:
        print(f"{output} is complete", flush=True)
        return dict(found)
    if recipe.corpus.max_seq_length <= recipe.sft.max_new_tokens:
        raise InstructionError(
            f"sft.max_new_tokens ({recipe.sft.max_new_tokens}) leaves no room for a prompt in "
            f"corpus.max_seq_length ({recipe.corpus.max_seq_length})"
        )
    # both tokenizers are looked at before hours of answers
    chat, base_chat = Chat(model), Chat(base) if base else None
    with ranks() as device:
        answers = _answers(recipe, model, chat, asked, device, batch, in_parts)
        of_base = []
        if base and base_chat:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the base model takes the other's place
            first = asked[:SAMPLES]
            of_base = _answers(recipe, base, base_chat, first, device, batch, in_parts)
        result = {**answer_figures(asked, answers, of_base), "made_from": made_from}
        if rank() == 0:
            write_json(output, result)
            accuracy = result["citation_accuracy"]
            print(
                f"evaluated {len(asked):,} answers: ROUGE-L {result['rouge_l']['value']:.4f}, "
                f"citation accuracy {accuracy['value']} of {accuracy['counted']:,}",
                flush=True,
            )
    return result


def _answers(
    recipe: Recipe,
    model: str,
    chat: Chat,
    asked: Sequence[Instruction],
    device: torch.device,
    batch: int,
    in_parts: bool | None,
) -> list[str]:
    """What ``model`` answers to each prompt, cut to the room that the longest answer leaves."""
    causal, is_in_parts = model_for_inference(
        model, recipe.model.attn_implementation, recipe.model.dtype, device, in_parts=in_parts
    )
    most = recipe.sft.max_new_tokens
    room = recipe.corpus.max_seq_length - most
    ids = [chat.prompt_ids(instruction.prompt, room) for instruction in asked]
    return generate(causal, chat, ids, most, device, batch, is_in_parts)


def generate(
    model: Any,
    chat: Chat,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    batch: int = BATCH,
    in_parts: bool = False,
) -> list[str]:
    """The answers to the prompts (token ids), in order; every rank gets all of them."""
    by_length = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    batches = [by_length[begin : begin + batch] for begin in range(0, len(prompts), batch)]
    mine = batches[rank() :: world_size()]
    if in_parts and len(mine) * world_size() < len(batches):
        mine.append(batches[0])  # a partitioned model needs the same number of calls on all ranks
    padding = chat.tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({chat.end_id, chat.tokenizer.eos_token_id}),
        pad_token_id=chat.tokenizer.eos_token_id if padding is None else padding,
    )
    # transformers fills unset fields from the model's own configuration, which may sample
    model.generation_config = config
    progress = Progress("generate", "answers", len(prompts), say_once)
    answers: dict[int, str] = {}
    for numbers in mine:
        longest = len(prompts[numbers[0]])
        ids = torch.full((len(numbers), longest), config.pad_token_id)  # [B, S]
        mask = torch.zeros_like(ids)
        for row, number in enumerate(numbers):
            ids[row, longest - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, longest - len(prompts[number]) :] = 1
        sign_of_life = _SignOfLife(progress, longest)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([sign_of_life]),
            )
        for number, tokens in zip(numbers, out[:, longest:].tolist(), strict=True):
            answers[number] = chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        progress.add(min(len(numbers) * world_size(), len(prompts) - progress.done))
    if dist.is_initialized():
        shares: list[Any] = [None] * world_size()
        dist.all_gather_object(shares, answers)
        answers = {number: text for share in shares for number, text in share.items()}
    say_once(f"generated {len(answers):,} answers in {time.monotonic() - progress.started:.1f} s")
    return [answers[number] for number in range(len(prompts))]


class _SignOfLife(StoppingCriteria):  # type: ignore[misc]
    """Prints the progress of a long batch; never stops it."""

    def __init__(self, progress: Progress, longest: int) -> None:
        self.progress, self.longest = progress, longest

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.progress.due:
            self.progress.tell(
                f"generate: {self.progress.done:,.0f} of {self.progress.total:,} answers, "
                f"{input_ids.shape[1] - self.longest} tokens of the next"
            )
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer_figures(
    asked: Sequence[Instruction], answers: Sequence[str], of_base: Sequence[str] = ()
) -> dict[str, Any]:
    """ROUGE-L, citation accuracy and a few samples of the answers to instructions.

    ``of_base`` are the base model's answers to the samples' prompts; empty where it was not asked.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(asked, answers, strict=True))
    rouge = np.array([scorer.score(one.response, text)["rougeL"].fmeasure for one, text in pairs])
    checked = np.array([check_citations(text, one.response) for one, text in pairs])
    recalled = np.array([check_citations(one.response, text) for one, text in pairs])
    beyond = np.array(
        [check_citations(text, one.response, given=one.prompt) for one, text in pairs]
    )
    return {
        "rouge_l": ratio(rouge, np.ones(len(rouge))),
        "citation_accuracy": {
            **ratio(checked[:, 1], checked[:, 0]),
            "counted": int(checked[:, 0].sum()),
            "beyond_prompt": {
                **ratio(beyond[:, 1], beyond[:, 0]),
                "counted": int(beyond[:, 0].sum()),
            },
            "recall": {
                **ratio(recalled[:, 1], recalled[:, 0]),
                "counted": int(recalled[:, 0].sum()),
            },
        },
        "examples": len(asked),
        "samples": [
            {
                "id": one.id,
                "prompt": one.prompt[:SHOWN],
                **({"base": of_base[number][:SHOWN]} if of_base else {}),
                "answer": text[:SHOWN],
                "reference": one.response[:SHOWN],
            }
            for number, (one, text) in enumerate(pairs[:SAMPLES])
        ],
    }
