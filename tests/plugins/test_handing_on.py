"""Later tasks of a run use the paths from earlier tasks, whatever they would compute now."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastcpt.files import write_json
from fastcpt.recipe import RecipeError, load_recipe
from fastcpt.reporting.record import open_record
from fastcpt.training import made_from
from steps import training

MODEL, SECOND, BASE = "/r/models/one/final", "/r/models/two/final", "/r/models/base-0"


class Tasks:
    """What the tasks before returned, and the task that asks: as much of Airflow as a step sees."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.dag_id, self.run_id, self.task_id, self.map_index = "fast_cpt", "run", "step", -1

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return open_record(tmp_path, "run", "fast_cpt", load_recipe("sample"))


@pytest.fixture
def context(record: Path) -> Any:
    results = {
        "plan": {"record": str(record), "recipe": str(record / "recipe.yaml")},
        "check_cluster": {"root": "/r"},
        "sync": {
            "root": "/r",
            "python": "/p/bin/python",
            "code": "/r/code/0",
            "run": "/r/runs/run",
            "corpus": "/r/corpora/c",
            "corpus_digest": "c",
            "tokenizer_digest": "t",
            "instructions": "/r/instructions/i",
            "instructions_digest": "i",
        },
        "train_cpt": {"steps": 8, "model": MODEL, "base_model": BASE},
        "evaluate_cpt": {"path": "/record", "evaluation": "/r/models/one/evaluation-0.json"},
        "train_cpt_stage2": {"steps": 8, "model": SECOND, "base_model": BASE},
        "train_sft": {"steps": 8, "model": "/r/models/tuned/final"},
    }
    return {"ti": Tasks(results)}


def words(job: Any) -> dict[str, str]:
    """The options of a job's last command."""
    command = job.commands[-1]
    return {word: value for word, value in pairwise(command) if word[0] == "-"}


def gate(record: Path, passed: bool) -> None:
    write_json(record / "gate.json", {"passed": passed})


@pytest.fixture(params=["as it was", "after an upgrade"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a task, and after an upgrade in the middle of the run that names everything anew."""
    if request.param == "after an upgrade":
        for result in ("TRAINING", "EVALUATION", "ANSWERS", "PUBLICATION"):
            monkeypatch.setattr(made_from, f"{result}_FORMAT", 99)


@pytest.mark.usefixtures("version")
def test_evaluations_take_the_models_that_were_trained(context: Any) -> None:
    first, second = training.evaluate_cpt(context), training.evaluate_stage2(context)
    for job, model in ((first, MODEL), (second, SECOND)):
        assert words(job)["--checkpoint"] == model
        assert words(job)["--base_model"] == BASE
        assert job.result == words(job)["--output"] == job.answer["evaluation"]
        assert Path(job.result).parent == Path(model).parent
    assert "--base_evaluation" not in words(first)
    # the base model has been evaluated after stage 1
    assert words(second)["--base_evaluation"] == "/r/models/one/evaluation-0.json"


@pytest.mark.usefixtures("version")
def test_what_follows_the_gate_takes_the_model_it_let_through(context: Any, record: Path) -> None:
    assert words(training.train_cpt_stage2(context))["--model"] == MODEL
    for passed, model in ((True, MODEL), (False, SECOND)):
        gate(record, passed)
        assert words(training.train_sft(context))["--model"] == model
    answers = words(training.evaluate_sft(context))
    assert answers["--model"] == "/r/models/tuned/final"
    assert answers["--base_model"] == BASE


def test_without_instructions_the_gates_model_is_handed_on_as_it_is(
    context: Any, record: Path
) -> None:
    context["ti"].results["sync"]["instructions"] = None
    gate(record, True)
    handed = training.train_sft(context)
    assert handed == {"model": MODEL, "skipped": "the recipe has no instructions"}


def test_a_training_hands_on_where_its_model_will_be(context: Any, record: Path) -> None:
    gate(record, True)
    stage1, stage2 = training.train_cpt(context), training.train_cpt_stage2(context)
    tuned = training.train_sft(context)
    for job in (stage1, stage2, tuned):
        output = words(job)["--output_dir"]
        assert job.result == f"{output}/training.json"
        assert job.answer["model"] == f"{output}/final"
    assert len({job.result for job in (stage1, stage2, tuned)}) == 3
    assert stage1.answer["base_model"] == words(stage1)["--model"]
    assert stage1.answer["base_model"].startswith("/r/models/base-")
    assert stage2.answer["base_model"] == BASE


@pytest.mark.parametrize("base", [{}, {"base_model": "/r/bases/0"}])
def test_a_root_that_was_moved_has_the_same_names_in_it(context: Any, base: dict[str, str]) -> None:
    results = context["ti"].results
    results["sync"] |= base

    def names() -> list[str]:
        jobs = [training.train_cpt(context), training.evaluate_cpt(context)]
        return [job.result.removeprefix(f"{job.root}/") for job in jobs]

    before = names()
    for task in ("sync", "train_cpt"):
        for key, value in results[task].items():
            if isinstance(value, str) and f"{value}/".startswith("/r/"):
                results[task][key] = f"/moved{value}"
    assert training.train_cpt(context).root == "/moved/r"
    assert names() == before


def test_another_limit_of_the_answers_is_another_evaluation(context: Any, record: Path) -> None:
    before = training.evaluate_sft(context).result
    text = (record / "recipe.yaml").read_text()
    assert "max_new_tokens: 64" in text
    (record / "recipe.yaml").write_text(text.replace("max_new_tokens: 64", "max_new_tokens: 32"))
    assert training.evaluate_sft(context).result != before


def test_a_run_that_an_older_version_began_is_told_what_to_clear(context: Any) -> None:
    del context["ti"].results["train_cpt"]["model"]
    with pytest.raises(RecipeError, match=r"older version.*Clear train_cpt and what follows it"):
        training.evaluate_cpt(context)


def test_a_training_or_a_gate_marked_by_hand_is_told_what_to_clear(
    context: Any, record: Path
) -> None:
    context["ti"].results["train_cpt"] = None
    with pytest.raises(RecipeError, match=r"marked by hand.*Clear train_cpt and what follows it"):
        training.evaluate_cpt(context)
    (record / "gate.json").unlink(missing_ok=True)
    with pytest.raises(RecipeError, match="clear gate and what follows it"):
        training.train_sft(context)


def test_a_step_without_result_is_named_by_the_one_that_needs_it(context: Any) -> None:
    context["ti"].results["sync"] = None
    with pytest.raises(RecipeError, match=r"sync .*marked by hand. Clear sync and what follows it"):
        training.train_cpt(context)


def test_what_a_training_left_is_kept_with_its_place(context: Any, record: Path) -> None:
    context["ti"].task_id = "train_cpt"
    files = {"result": '{"steps": 3, "seconds": 5.0}', "metrics": '{"step": 1}\n', "status": None}
    hands_on = {"model": MODEL, "base_model": BASE}
    answer = training.keep_training(context, files, hands_on)
    assert answer == {"steps": 3, "seconds": 5.0, **hands_on}
    assert (record / "train_cpt" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (record / "times" / "train_cpt.json").is_file()


def test_a_run_that_goes_on_trains_the_champion_and_is_named_by_it(
    context: Any, record: Path
) -> None:
    base = training.train_cpt(context)
    names = {Path(words(base)["--output_dir"]).name}
    context["ti"].results["sync"]["start"] = "/r/models/ab12/final"
    for champion in ("ab12", "cd34"):
        start = {"model": "law-1", "training": champion, "record": "r", "corpora": ["c"]}
        write_json(record / "start.json", start)
        job = training.train_cpt(context)
        assert words(job)["--model"] == "/r/models/ab12/final"
        names.add(Path(words(job)["--output_dir"]).name)
        # what it is compared with is the base model all the same
        assert job.answer["base_model"] == base.answer["base_model"]
    assert len(names) == 3
