"""A run from a shell: the printed part of a job's log, and the next step it names."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include" / "scripts"))
from train_on_cluster import NOISE, what_is_next

from fastcpt.recipe import load_recipe
from fastcpt.training.commands import Host

HOST = Host("/env/bin/python", "/code", "/run/recipe.yaml")


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-28 01:32:13,347] [WARNING] [runner.py:214:fetch_hostfile] Unable to find hostfile",
        "[rank0]:[W1128 01:32:13.347 ProcessGroupNCCL.cpp:1250] Warning: destroy_process_group() was not called",
        "W1128 01:32:13.347000 11338 torch/distributed/run.py:792] ***",
        "/env/lib/python3.11/site-packages/torch/x.py:83: UserWarning: old",
        "  warnings.warn(",
        "",
    ],
)
def test_what_launchers_and_libraries_say_is_not_printed(line: str) -> None:
    assert NOISE.match(line)


@pytest.mark.parametrize(
    "line",
    [
        "model /m: 136,358,208 parameters, plain layers, attention sdpa, 2 ranks",
        "step 1/24 loss 2.4099 lr 0.000667 grad_norm 0.303 16 tokens/s 0:24:44 left",
        "evaluated model, random: perplexity 2.9534, 0.4247 bits per byte, 6,061 tokens in 245.1 s",
        "environment: 2/3 66 packages",
        "RecipeError: training.max_steps: 0 is below 1",
    ],
)
def test_the_projects_own_lines_are_printed(line: str) -> None:
    assert not NOISE.match(line)


def next_after(perplexity: float) -> tuple[str, list[str]]:
    """All that is said, and the words of the command."""
    recipe = load_recipe("sample")
    figures = {"model": {"perplexity": perplexity}, "base": {"perplexity": 2000.0}}
    said = what_is_next(recipe, HOST, {"random": figures}, "/corpus", "/models/one")
    return said, shlex.split(said.splitlines()[-1])


def test_a_passed_gate_leads_to_fine_tuning_of_the_trained_model() -> None:
    said, command = next_after(12.5)
    assert said.startswith("Gate: pass, perplexity 12.50, base model 2,000.00; below the gate's")
    assert command[0] == "env"
    assert "/code/include/scripts/train_sft.py" in command
    assert command[command.index("--model") + 1] == "/models/one/final"
    assert command[command.index("--output_dir") + 1] == "/models/one-sft"


def test_a_missed_gate_leads_to_stage_2_on_the_same_corpus() -> None:
    said, command = next_after(500.0)
    assert said.startswith(
        "Gate: miss, perplexity 500.00, base model 2,000.00; not below the gate's"
    )
    assert "/code/include/scripts/train_cpt.py" in command
    assert command[command.index("--stage") + 1] == "stage2"
    assert command[command.index("--data_dir") + 1] == "/corpus"
    assert command[command.index("--model") + 1] == "/models/one/final"
