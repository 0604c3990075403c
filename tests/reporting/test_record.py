"""The record of a run: complete files, and a summary with what a user asks first."""

import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastcpt import __version__
from fastcpt.files import read_json, write_json
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from fastcpt.reporting.summary import duration, summary, summary_text

RUN = "manual__2026-11-23T01:00:00+00:00"


def test_a_run_id_becomes_one_folder_below_runs(home):
    folder = records.record_folder(home, RUN)
    assert folder.parent == home / "runs"
    assert re.fullmatch(r"manual__2026-11-23T01-00-00-00-00-[0-9a-f]{8}", folder.name)
    assert records.record_folder(home, RUN) == folder
    with pytest.raises(ValueError, match="has no record"):
        records.record_folder(home, "")


# what Airflow takes in a run id, and what reads the same in a folder's name
run_ids = st.text(st.sampled_from("aAbB19.:+~-_/ é\u0301"), min_size=1, max_size=250)


@given(one=run_ids, other=run_ids)
@example("exp:1", "exp-1")
@example("exp:1", "exp+1")
@example("Exp", "exp")
@example("exp", "exp.")
@example("a" * 249 + "b", "a" * 250)
@example(".", "..")
def test_two_runs_never_share_a_folder(one, other):
    home = Path("home")
    names = [records.record_folder(home, run).name for run in (one, other)]
    # also on a disk that does not tell upper from lower case
    assert (names[0].casefold() == names[1].casefold()) == (one == other)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,128}", name)


def test_two_runs_whose_ids_look_alike_keep_their_own_recipes(home):
    for run, recipe in (("exp:1", "sample"), ("exp-1", "cpt_config_fast")):
        records.open_record(home, run, "fast_cpt", load_recipe(recipe))
    first, second = (records.record_folder(home, run) for run in ("exp:1", "exp-1"))
    assert load_recipe(first / "recipe.yaml") == load_recipe("sample")
    assert summary(second)["recipe"] == "cpt_config_fast"
    assert read_json(first / "run.json")["run"] == "exp:1"


def test_a_record_of_an_older_version_is_found_by_its_own_run_alone(home):
    older = home / "runs" / "exp-1"
    write_json(older / "run.json", {"run": "exp:1"})
    assert records.record_folder(home, "exp:1") == older
    for other in ("exp-1", "exp+1"):
        assert records.record_folder(home, other) != older


def test_a_record_opens_with_recipe_code_and_versions(home):
    recipe = load_recipe("sample")
    record = records.open_record(home, RUN, "fast_cpt", recipe)
    run = read_json(record / "run.json")
    assert (run["run"], run["dag"]) == (RUN, "fast_cpt")
    assert run["code"]
    assert run["version"] == __version__
    assert re.match(r"\d+\.", run["packages"]["pyarrow"])
    assert load_recipe(record / "recipe.yaml") == recipe


def test_opening_again_keeps_the_start_and_takes_back_the_end(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    write_json(record / "run.json", {**read_json(record / "run.json"), "started": "2026-01-01"})
    records.close_record(record, "failed")
    records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    run = read_json(record / "run.json")
    assert run["started"] == "2026-01-01"
    assert "state" not in run


def test_a_run_that_is_marked_later_keeps_the_time_of_its_end(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    records.close_record(record, "failed")
    ended = {**read_json(record / "run.json"), "ended": "2026-01-02"}
    write_json(record / "run.json", ended)
    records.close_record(record, "success")
    assert read_json(record / "run.json") == {**ended, "state": "success"}


def test_a_run_that_goes_on_has_no_end(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    before = read_json(record / "run.json")
    records.mark_record(record, "failed")
    assert read_json(record / "run.json") == {**before, "marked": "failed"}
    records.close_record(record, "failed")
    records.reopen_record(record)
    assert read_json(record / "run.json") == before


def test_adding_a_file_again_replaces_it(home, tmp_path):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    source = tmp_path / "metrics.jsonl"
    for content in ('{"step": 1}\n', '{"step": 2}\n'):
        source.write_text(content)
        records.add(record, "train_cpt/metrics.jsonl", source)
    assert (record / "train_cpt/metrics.jsonl").read_text() == '{"step": 2}\n'
    assert [path.name for path in (record / "train_cpt").iterdir()] == ["metrics.jsonl"]


def test_the_summary_of_a_finished_run(finished):
    facts = summary(finished)
    assert facts["state"] == "success"
    assert (facts["documents_seen"], facts["documents_kept"]) == (400, 320)
    assert (facts["tokens_seen"], facts["tokens_kept"]) == (402_000, 376_000)
    assert facts["steps"] == {"train_cpt": 60, "train_cpt_stage2": 60, "train_sft": 60}
    assert (facts["perplexity"], facts["base_perplexity"]) == (11.25, 2081.0)
    assert facts["branch"] == "fine-tuning after stage 2"
    # 5400 + 1800 + 450 seconds on four GPUs are 8.5 GPU hours, at $4 an hour $34.
    assert facts["gpu_hours"] == pytest.approx(8.5)
    assert facts["cost"] == pytest.approx(34.0)
    assert facts["planned"] == {
        "hours": [75.5, 140.0],
        "training": [75.0, 139.5],
        "cost": [1208.0, 2240.0],
    }
    assert facts["model"] == "/data/models/fast"


def test_the_summary_as_it_is_printed(finished):
    run = read_json(finished / "run.json")
    times = {"started": "2026-11-23T01:00:00+00:00", "ended": "2026-11-23T03:20:05+00:00"}
    write_json(finished / "run.json", {**run, "code": "v1.0", **times})
    assert summary_text(finished).splitlines() == [
        "Fast CPT run manual__2026-11-23T01:00:00+00:00: success",
        "  recipe     cpt_config_fast, code v1.0",
        "  corpus     376,000 of 402,000 tokens kept, 320 of 400 documents",
        "  steps      train_cpt 60, train_cpt_stage2 60, train_sft 60",
        "  perplexity 11.25, base model 2,081.00; below the gate's 18 (random validation set)",
        "  bits/byte  random 2.400 to 0.710, better",
        "  branch     fine-tuning after stage 2",
        "  ROUGE-L    0.612 (0.587 to 0.640)",
        "  citations  41.0 % (30.0 % to 52.0 %) right",
        "  time       2 h 20 min; train_cpt 1 h 30 min, planned 75.00 to 139.50 h",
        "  GPUs       8.50 GPU hours, $34.00; planned without stage 2 $1,208.00 to $2,240.00",
        "  model      /data/models/fast",
        f"  record     {finished}",
    ]


def test_answers_without_a_citation_are_no_share(finished):
    evaluation = read_json(finished / "evaluation_sft.json")
    evaluation["citation_accuracy"] |= {"value": None, "low": None, "high": None, "counted": 0}
    write_json(finished / "evaluation_sft.json", evaluation)
    assert "  citations  none in the answers" in summary_text(finished).splitlines()


INSTRUCTED = load_recipe("sample", {"sft.instructions": "/i.jsonl"})


@pytest.mark.parametrize(
    ("first", "second", "trained", "branch"),
    [
        (None, None, [], None),
        (True, None, ["train_sft"], "fine-tuning after stage 1"),
        (True, None, [], "gate passed after stage 1"),
        (False, None, [], "gate missed after stage 1"),
        (False, None, ["train_cpt_stage2"], "stage 2"),
        (False, True, ["train_cpt_stage2"], "gate passed after stage 2"),
        (False, True, ["train_cpt_stage2", "train_sft"], "fine-tuning after stage 2"),
        (False, False, ["train_cpt_stage2"], "ended at the gate after stage 2"),
    ],
)
def test_the_branch_in_words(home, first, second, trained, branch):
    record = records.open_record(home, RUN, "fast_cpt", INSTRUCTED)
    for name, passed in (("gate.json", first), ("gate_stage2.json", second)):
        if passed is not None:
            records.add(record, name, {"passed": passed})
    for training in trained:
        records.add(record, f"{training}/training.json", {"steps": 1})
    assert summary(record)["branch"] == branch


def test_a_run_without_instructions_does_not_claim_fine_tuning(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    records.add(record, "gate.json", {"passed": True})
    assert summary(record)["branch"] == "no fine-tuning after stage 1: no instructions"


def test_the_time_tells_work_from_waiting(home):
    start = datetime(2026, 11, 23, 1, 0, tzinfo=UTC)
    record = records.open_record(home, RUN, "fast_cpt", INSTRUCTED, start)
    began = start.timestamp()
    # 10 s, then 40 s and 30 s of which 20 are side by side, then ten minutes
    for what, since, until in (
        ("plan", 0, 10),
        ("score-0", 20, 60),
        ("score-1", 40, 70),
        ("approval", 100, 400),
        ("train_cpt", 420, 1020),
    ):
        records.add_time(record, what, began + since, began + until)
    assert records.times(record) == {"worked": 10 + 50 + 600, "approval": 300}
    run = read_json(record / "run.json")
    write_json(record / "run.json", {**run, "ended": "2026-11-23T01:20:00+00:00"})
    assert (
        "  time       20 min 00 s: 11 min 00 s of work, 5 min 00 s for approval, 4 min 00 s waiting"
        in (summary_text(record).splitlines())
    )


def test_what_an_earlier_pass_of_a_run_did_is_no_work_of_this_one(home):
    start = datetime(2026, 11, 23, 1, 0, tzinfo=UTC)
    record = records.open_record(home, RUN, "fast_cpt", INSTRUCTED, start)
    records.add_time(record, "train_cpt", start.timestamp() - 7200, start.timestamp() + 10)
    assert records.times(record) == {"worked": 10, "approval": 0}


def test_clearing_a_run_heals_its_damaged_record(home):
    start = datetime(2026, 11, 23, 1, 0, tzinfo=UTC)
    record = records.open_record(home, RUN, "fast_cpt", INSTRUCTED, start)
    for name in ("run.json", "recipe.yaml", "gate.json"):
        (record / name).write_text("{")
    records.open_record(home, RUN, "fast_cpt", INSTRUCTED, start)
    assert summary(record)["run"] == RUN


def test_a_run_that_is_cleared_begins_its_record_anew(home):
    record = records.open_record(home, RUN, "fast_cpt", INSTRUCTED)
    records.add(record, "gate_stage2.json", {"passed": True})
    records.add(record, "train_sft/training.json", {"steps": 60})
    records.add_output(record, "publish", {"path": "/models/old"})
    records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    assert sorted(path.name for path in record.iterdir()) == ["recipe.yaml", "run.json"]
    assert summary(record)["model"] is None


def test_a_run_that_failed_early_has_a_summary_too(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    records.close_record(record, "failed")
    text = summary_text(record)
    assert "failed" in text
    assert str(record) in text
    assert "None" not in text
    assert "perplexity" not in text


def test_the_cost_of_a_run_without_a_price_is_unknown_not_free(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("cpt_config_fast"))
    records.add(record, "train_cpt/training.json", {"steps": 1, "seconds": 3600.0})
    cost = records.add_cost(record, gpus=2, price_per_gpu_hour=None)
    assert cost["gpu_hours"] == 2.0
    assert cost["cost"] is None
    assert "$" not in summary_text(record)


def test_a_run_on_cpus_costs_no_gpu_hours(home):
    record = records.open_record(home, RUN, "fast_cpt", load_recipe("sample"))
    records.add(record, "train_cpt/training.json", {"steps": 1, "seconds": 3600.0})
    assert records.add_cost(record, gpus=2, price_per_gpu_hour=4.0)["cost"] == 0.0
    assert "GPU hours" not in summary_text(record)


def test_code_without_a_git_history_is_named_by_its_content(tmp_path):
    (tmp_path / "include").mkdir()
    source = tmp_path / "include" / "one.py"
    source.write_text("x = 1\n")
    before = records.code_version(tmp_path)
    source.write_text("x = 2\n")
    after = records.code_version(tmp_path)
    assert before.startswith("files-")
    assert before != after


def test_code_with_a_git_history_is_named_by_its_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "one.py").write_text("x = 1\n")
    git("add", "one.py")
    git("commit", "-qm", "first")
    assert records.code_version(tmp_path) == git("rev-parse", "--short", "HEAD")
    (tmp_path / "one.py").write_text("x = 2\n")
    assert records.code_version(tmp_path).endswith("-dirty")


@pytest.mark.parametrize(
    ("seconds", "text"), [(11.6, "12 s"), (249, "4 min 09 s"), (11_130, "3 h 05 min")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def write_jobs(record, **seconds):
    """Each step's job, with its steps' own seconds where it is a training."""
    for step, taken in seconds.items():
        own = {} if step.startswith("evaluate") else {"seconds": 3000.0}
        records.add(record, records.ON_GPUS[step], {**own, "job_seconds": taken})


def test_cost_counts_every_job_on_the_gpus_and_none_that_was_found_done(home):
    record = records.open_record(home, "cost", "fast_cpt", load_recipe("cpt_config_fast"))
    write_jobs(record, train_cpt=3600.0, evaluate_cpt=600.0, train_sft=1200.0, evaluate_sft=None)
    cost = records.add_cost(record, gpus=4, price_per_gpu_hour=3.0)
    # 1.5 h of four GPUs at $3
    assert cost["gpu_hours"] == pytest.approx(6.0)
    assert cost["cost"] == pytest.approx(18.0)
    again = records.open_record(home, "again", "fast_cpt", load_recipe("cpt_config_fast"))
    write_jobs(again, train_cpt=None, evaluate_cpt=600.0)
    assert records.add_cost(again, gpus=4, price_per_gpu_hour=3.0)["gpu_hours"] == pytest.approx(
        2 / 3
    )


def test_what_a_run_took_is_told_by_its_jobs(home):
    record = records.open_record(home, "took", "fast_cpt", load_recipe("cpt_config_fast"))
    write_jobs(record, train_cpt=3600.0, evaluate_cpt=720.0, train_cpt_stage2=7200.0)
    totals = records.read(record, "train_cpt/training.json")
    figures = {"tokens_per_s_per_gpu": 1000.0, "peak_memory_gb": 70.5}
    records.add(record, "train_cpt/training.json", {**totals, **figures})
    records.add_cost(record, gpus=4, price_per_gpu_hour=3.0)
    found = records.took(record, gpus=4)
    # 3600 s of which 3000 were steps, and 720 s of evaluation; stage 2 is not of the plan
    assert found == {
        "training_hours": pytest.approx(3000 / 3600),
        "start-up": pytest.approx(600 / 3600),
        "evaluation": pytest.approx(0.2),
        "fine-tuning": None,
        "its evaluation": None,
        "hours": pytest.approx(1.2),
        "tokens_per_s": 4000.0,
        "memory_gb": 70.5,
        "cost": pytest.approx(1.2 * 4 * 3.0),
    }


def test_a_run_that_was_not_evaluated_took_nobody_knows_how_long(home):
    record = records.open_record(home, "early", "fast_cpt", load_recipe("cpt_config_fast"))
    write_jobs(record, train_cpt=3600.0)
    records.add_cost(record, gpus=4, price_per_gpu_hour=3.0)
    found = records.took(record, gpus=4)
    assert (found["hours"], found["cost"]) == (None, None)
    assert found["training_hours"] is not None


def test_the_last_gate_is_that_of_the_same_base_model_and_set(home):
    recipe = load_recipe("sample", {"model.name_or_path": "llama", "model.config": None})
    gate = {"base_value": 9.6, "validation_set": "random"}
    for number, (model, facts) in enumerate(
        (
            ("llama", gate),
            ("llama", {**gate, "base_value": 9.5}),
            ("qwen", {**gate, "base_value": 7}),
        )
    ):
        of = load_recipe("sample", {"model.name_or_path": model, "model.config": None})
        record = records.open_record(home, f"run-{number}", "fast_cpt", of)
        file = records.add(record, "gate.json", facts)
        os.utime(file, (number, number))
    damaged = home / "runs" / "damaged"
    damaged.mkdir()
    (damaged / "gate.json").write_text("{")
    name = recipe.model.name_or_path
    assert records.last_gate(home, name, "random")["base_value"] == 9.5
    assert records.last_gate(home, name, "newest") == {}
    assert records.last_gate(home, None, "random") == {}
