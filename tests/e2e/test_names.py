"""A result is found again only for the same inputs: a real run, cleared and changed."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastcpt.files import sha256_of_file
from fastcpt.reporting.summary import summary

if TYPE_CHECKING:
    from conftest import Run, Stack

pytestmark = pytest.mark.faults

RUN_ID = "names:1+its~passes"


@dataclass
class Pass:
    """What a pass of the run came to, taken before the next one."""

    corpus: str
    trained: str
    published: dict[str, Any]
    weights: str

    @classmethod
    def of(cls, run: Run) -> Pass:
        assert run.outcome == "success", run.states()
        published = run.result("publish")
        return cls(
            run.result("build")["corpus"]["digest"],
            run.result("train_cpt")["model"],
            published,
            sha256_of_file(Path(published["path"]) / "model.safetensors"),
        )


def documents(stack: Stack) -> Path:
    """Documents of which a test may take some away."""
    copy = stack.home / "documents of names"
    if not copy.is_dir():
        stack.module.generate_sample(stack.home / "sample-of-names", documents=60)
        shutil.copytree(stack.home / "sample-of-names" / "parsed", copy)
    return copy


def start(stack: Stack) -> Run:
    """A short run: one rank, four steps, no fine-tuning."""
    conf = {
        "recipe": "sample",
        "documents": str(documents(stack)),
        "num_shards": 2,
        "max_steps": 4,
        "gpus": 1,
        "perplexity_threshold": 90_000.0,
    }
    answer = stack.api.client.post(
        "/api/v2/dags/fast_cpt/dagRuns",
        json={"dag_run_id": RUN_ID, "logical_date": None, "conf": conf},
    )
    answer.raise_for_status()
    return stack.wait(RUN_ID)


def clear(stack: Stack, **what: Any) -> Run:
    path = "clearTaskInstances" if "task_ids" in what else f"dagRuns/{RUN_ID}/clear"
    answer = stack.api.client.post(
        f"/api/v2/dags/fast_cpt/{path}", json={"dry_run": False, "only_failed": False, **what}
    )
    answer.raise_for_status()
    return stack.wait(RUN_ID)


@pytest.fixture(scope="module")
def first(stack: Stack) -> Pass:
    return Pass.of(start(stack))


def test_an_upgrade_in_the_middle_of_a_run_loses_no_model(stack: Stack, first: Pass) -> None:
    """Another version computes other names: here the recipe has something that it had not."""
    run = stack.look(RUN_ID)
    recipe = run.record / "recipe.yaml"
    text = recipe.read_text()
    assert "weight_decay: 0.1" in text
    recipe.write_text(text.replace("weight_decay: 0.1", "weight_decay: 0.05"))
    Path(run.result("evaluate_cpt")["evaluation"]).unlink()
    again = clear(stack, dag_run_id=RUN_ID, task_ids=["evaluate_cpt"], include_downstream=False)
    recipe.write_text(text)
    assert again.outcome == "success", (again.error("evaluate_cpt"), again.states())
    assert Path(again.result("evaluate_cpt")["evaluation"]).is_file()
    assert again.result("train_cpt")["model"] == first.trained


@pytest.fixture(scope="module")
def second(stack: Stack, first: Pass) -> Pass:
    """The whole run cleared after every second file of its documents was taken away."""
    files = sorted(file for file in documents(stack).rglob("*") if file.is_file())
    for file in files[::2]:
        file.rename(stack.home / f"taken away {file.name}")
    return Pass.of(clear(stack))


def test_a_cleared_run_publishes_the_model_that_it_trained(first: Pass, second: Pass) -> None:
    assert second.corpus != first.corpus
    assert second.trained != first.trained
    assert not second.published["reused"]
    assert second.weights != first.weights
    card = (Path(second.published["path"]) / "README.md").read_text()
    assert second.corpus in card
    assert first.corpus not in card
    # what the first pass published is still what it was
    assert sha256_of_file(Path(first.published["path"]) / "model.safetensors") == first.weights


def test_the_record_is_the_last_passs(stack: Stack, second: Pass) -> None:
    facts = summary(stack.look(RUN_ID).record)
    assert facts["model"] == second.published["path"]
    assert facts["state"] == "success"
    times = facts["times"]
    assert 0 < times["worked"] < facts["seconds"]
    assert times["approval"] == 0


def test_the_same_run_id_in_an_emptied_database_finds_what_is_the_same(
    stack: Stack, first: Pass
) -> None:
    for taken in stack.home.glob("taken away *"):
        taken.rename(documents(stack) / taken.name.removeprefix("taken away "))
    stack.api.client.delete(f"/api/v2/dags/fast_cpt/dagRuns/{RUN_ID}").raise_for_status()
    began = time.time()
    again = Pass.of(start(stack))
    assert (again.corpus, again.trained) == (first.corpus, first.trained)
    assert again.published["path"] == first.published["path"]
    assert again.weights == first.weights
    assert again.published["reused"]
    trained = Path(again.trained).parent / "training.json"
    assert trained.stat().st_mtime < began  # not trained again
