"""Answers and their figures: greedy for any batch, ROUGE-L and citations worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fastcpt.intervals import ratio
from fastcpt.recipe import load_recipe
from fastcpt.training import generation
from fastcpt.training.generation import answer_figures, evaluate_sft, generate
from fastcpt.training.sft import Chat, Instruction
from training.conftest import launch, write_recipe
from training.tiny import END, model_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    rows = [
        {"id": f"{n}", "prompt": "why " * (n + 1), "response": f"Directive 95/4{n}/EC says so"}
        for n in range(5)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        corpus={"max_seq_length": 128},
        sft={"max_new_tokens": 12},
    )


# Answers


def one_by_one(model: LlamaForCausalLM, prompt: list[int], most: int) -> list[int]:
    """Greedy decoding without batch, padding or cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == END:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_are_greedy_whatever_the_batch(batch: int, model: Path) -> None:
    causal = LlamaForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    causal.generation_config.do_sample = True  # as chat models' folders say
    causal.generation_config.temperature = 5.0
    chat = Chat(model)
    prompts = [chat.prompt_ids(text, 100) for text in ("a", "why not", "", "Article 5", "b" * 40)]
    expected = [
        chat.tokenizer.decode(one_by_one(causal, prompt, 12), skip_special_tokens=True).strip()
        for prompt in prompts
    ]
    assert generate(causal, chat, prompts, 12, CPU, batch) == expected
    assert len(set(expected)) > 1


def test_an_answer_ends_where_its_turn_does(model: Path) -> None:
    causal = LlamaForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    chat = Chat(model)
    prompt = chat.prompt_ids("a", 100)
    tokens = one_by_one(causal, prompt, 12)
    # from here on the model's second token ends a turn
    chat.end_id = tokens[1]
    first = tokens[: tokens.index(tokens[1]) + 1]
    expected = chat.tokenizer.decode(first, skip_special_tokens=True).strip()
    assert generate(causal, chat, [prompt], 12, CPU) == [expected]


# Figures


def test_rouge_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # "the cat sat on the mat" and "the dog sat on a mat": the, sat, on, mat are common, in order
    asked = [Instruction("1", "?", "The cat sat on the mat."), Instruction("2", "?", "One two.")]
    figures = answer_figures(asked, ["the dog sat on a mat", "two one three"])
    # 4 of 6 and 4 of 6 words; then 1 of 2 and 1 of 3: F = 2 x 1/2 x 1/3 / (5/6) = 2/5
    assert figures["rouge_l"]["value"] == pytest.approx((4 / 6 + 2 / 5) / 2)
    assert figures["examples"] == 2
    low, high = figures["rouge_l"]["low"], figures["rouge_l"]["high"]
    assert low == pytest.approx(2 / 5)
    assert high == pytest.approx(4 / 6)


def test_citations_are_counted_over_all_answers() -> None:
    asked = [
        Instruction("1", "Summarise Directive 95/46/EC", "Directive 95/46/EC and 32016R0679"),
        Instruction("2", "Which act?", "Regulation (EC) No 45/2001"),
        Instruction("3", "Which act?", "None."),
    ]
    answers = ["Directive 95/46/EC, Directive 97/66/EC", "", "Regulation (EU) 2016/679"]
    accuracy = answer_figures(asked, answers)["citation_accuracy"]
    # cited: 95/46, 97/66, 2016/679; only the first is in its reference
    assert accuracy["value"] == pytest.approx(1 / 3)
    assert accuracy["counted"] == 3
    # the prompt named the one that was right
    assert accuracy["beyond_prompt"]["value"] == 0
    assert accuracy["beyond_prompt"]["counted"] == 2
    # the references cite 95/46, 2016/679 and 45/2001; the answers to them the first alone
    assert accuracy["recall"]["value"] == pytest.approx(1 / 3)
    assert accuracy["recall"]["counted"] == 3


def test_without_citations_there_is_no_accuracy() -> None:
    accuracy = answer_figures([Instruction("1", "?", "Article 5.")], ["Article 6."])[
        "citation_accuracy"
    ]
    assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (None, None, None)
    assert accuracy["counted"] == 0


def test_an_interval_holds_the_value_and_narrows_with_more_answers() -> None:
    drawn = np.random.default_rng(1)
    few, many = drawn.random(20), drawn.random(2000)
    wide, narrow = (ratio(scores, np.ones(len(scores))) for scores in (few, many))
    for found, scores in ((wide, few), (narrow, many)):
        assert found["value"] == pytest.approx(scores.mean())
        # the normal approximation: 1.96 standard errors on either side
        error = 1.96 * scores.std() / len(scores) ** 0.5
        assert found["low"] == pytest.approx(scores.mean() - error, abs=error / 5)
        assert found["high"] == pytest.approx(scores.mean() + error, abs=error / 5)
    assert ratio(few, np.ones(20)) == wide  # the seed is fixed


def test_answers_are_drawn_whole() -> None:
    # 10 right citations in one answer, 10 wrong ones in the other: all, half or none are right
    found = ratio(np.array([10, 0]), np.array([10, 10]))
    assert found == {"value": 0.5, "low": 0.0, "high": 1.0}


# The whole evaluation


def test_an_evaluation_is_written_whole_and_once(
    model: Path,
    instructions: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "evaluation_sft.json"
    settings = load_recipe(recipe)
    result = evaluate_sft(settings, str(model), instructions, output)
    assert json.loads(output.read_text()) == result
    assert result["examples"] == 5
    assert result["citation_accuracy"]["recall"]["counted"] == 5
    assert result["samples"][0]["reference"] == "Directive 95/40/EC says so"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(generation, "model_for_inference", refuse)
    assert evaluate_sft(settings, str(model), instructions, output) == result


def test_the_base_model_answers_the_first_prompts_beside_it(
    model: Path, instructions: Path, recipe: Path, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", seed=1)
    causal = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    output = tmp_path / "evaluation_sft.json"
    settings = load_recipe(recipe)
    alone = evaluate_sft(settings, str(model), instructions, output)
    beside = evaluate_sft(settings, str(model), instructions, output, base=str(base))
    assert beside["made_from"] != alone["made_from"]
    assert beside["rouge_l"] == alone["rouge_l"]
    chat = Chat(base)
    asked = [sample["prompt"] for sample in alone["samples"]]
    prompts = [chat.prompt_ids(text, 116) for text in asked]
    of_base = [sample["base"] for sample in beside["samples"]]
    assert of_base == generate(causal, chat, prompts, 12, CPU)
    assert of_base != [sample["answer"] for sample in beside["samples"]]
    assert [sample["answer"] for sample in beside["samples"]] == [
        sample["answer"] for sample in alone["samples"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
def test_two_ranks_answer_as_one(
    in_parts: bool, model: Path, instructions: Path, recipe: Path, tmp_path: Path
) -> None:
    one = evaluate_sft(load_recipe(recipe), str(model), instructions, tmp_path / "one.json")
    ranks = launch(
        "evaluate_sft.py",
        *("--config", recipe, "--model", model, "--instructions", instructions),
        *("--output", tmp_path / "two.json", "--batch", 2),
        *(["--in_parts"] if in_parts else []),
    )
    said, _ = ranks.communicate(timeout=300)
    assert ranks.returncode == 0, said
    assert json.loads((tmp_path / "two.json").read_text()) == one
