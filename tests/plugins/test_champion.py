"""The status of a published model and a person's changes to it: in the record, the link, and notifications."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.execution_time.context import set_current_context

import notifications
from fastcpt.files import read_json, write_json
from fastcpt.recipe import load_recipe
from fastcpt.registry.champion import champion, events, models
from fastcpt.reporting.record import open_record, read
from fastcpt.reporting.report import write_report
from registry.conftest import add_corpus
from steps import champion as by_hand
from steps import publish, training
from steps.results import Published

RECIPE = load_recipe("sample", {"publish.destination": "leave_on_cluster"})


def evaluation(of_base: float) -> dict[str, Any]:
    """The evaluation of a model that needs this share of the base model's nats on each document."""
    base = [100.0 + n for n in range(40)]
    by_document = {
        "id": [f"d{n}" for n in range(40)],
        "bytes": [50] * 40,
        "model": [of_base * nats for nats in base],
        "base": base,
    }
    figures = {"perplexity": 9.0, "bits_per_byte": 1.0, "tokens": 400}
    found = {"model": figures, "base": figures, "by_document": by_document}
    return {"validation_set": "random", "window": 512, "random": found}


class Ended:
    """Runs that came to their last step, one after another."""

    def __init__(self, home: Path, told: list[tuple[str, str]]) -> None:
        self.home, self.told = home, told
        add_corpus(home)

    def publish(self, run: str, of_base: float, trained: str) -> dict[str, Any]:
        record = open_record(self.home, run, "fast_cpt", RECIPE)
        write_json(record / "evaluation.json", evaluation(of_base))
        gate = {"passed": True, "value": 9.0, "base_value": 9.9, "threshold": 18.0}
        write_json(record / "gate.json", {**gate, "validation_set": "random"})
        write_json(record / "outputs" / "build.json", {"digest": "c", "path": "/c"})
        results = {
            "plan": {"record": str(record), "recipe": str(record / "recipe.yaml")},
            "train_cpt": {"model": f"/r/models/cpt-of-{trained}/final"},
            "train_sft": {"model": f"/r/models/{trained}/final"},
        }
        context: Any = {
            "run_id": run,
            "ti": SimpleNamespace(xcom_pull=lambda task_ids: results[task_ids]),
        }
        publish._decide(record, RECIPE, trained)
        made: Published = {"published": f"/r/published/sample-{trained}", "digest": trained}
        publish.keep_published(context, {}, made)
        return read(record, "decision.json")


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ended:
    told: list[tuple[str, str]] = []
    for module in (notifications, publish, by_hand):
        monkeypatch.setattr(module, "HOME", tmp_path)
    monkeypatch.setattr(
        notifications, "tell", lambda _, event, reason: told.append((event, reason))
    )
    monkeypatch.setattr(publish, "note_job", lambda *_: None)
    assert training.training_of("/r/models/one/final") == "one"
    return Ended(tmp_path, told)


def test_only_a_better_model_takes_the_champion_s_place(ended: Ended) -> None:
    assert ended.publish("worse-than-base", 1.02, "zero")["recommended"] is False
    assert ended.publish("first", 0.9, "one")["against"] is None
    assert ended.publish("worse", 0.92, "two")["against"] == "sample-one"
    ended.publish("better", 0.88, "three")
    assert champion(ended.home, "sample") == "sample-three"
    assert [event for event, _ in ended.told] == [
        "kept as a candidate", "promoted", "kept as a candidate", "promoted"
    ]  # fmt: skip
    facts = models(ended.home, "sample")["sample-three"]
    assert (facts["before_sft"], facts["corpora"]) == ("cpt-of-three", ["c"])
    assert read_json(ended.home / "models" / "sample" / "champion.json")["path"] == (
        "gpu_cluster:/r/published/sample-three"
        if RECIPE.cluster.connection == "gpu_cluster"
        else f"{RECIPE.cluster.connection}:/r/published/sample-three"
    )
    # the same model again, in another run or after a clear, is what it was; nobody is told twice
    for run in ("better", "another"):
        assert ended.publish(run, 0.88, "three")["recommended"] is True
    assert len(ended.told) == 4
    assert champion(ended.home, "sample") == "sample-three"
    assert (
        len([event for event in events(ended.home, "sample") if event["model"] == "sample-three"])
        == 1
    )
    # the report has every condition
    (record,) = ended.home.glob("runs/worse-????????")
    report = write_report(record).with_suffix(".md").read_text()
    assert "sample-two kept as a candidate: missed: relative saving in bits" in report
    assert "| relative saving in bits per byte over the champion" in report


def test_a_person_s_rollback_is_noted_with_name_and_reason_and_told(ended: Ended) -> None:
    ended.publish("first", 0.9, "one")
    ended.publish("second", 0.8, "two")
    form = {"recipe": "sample", "action": "rollback", "model": None, "why": "wrong dates"}
    context: Any = {"params": form, "dag_run": SimpleNamespace(triggering_user_name="ann")}
    with set_current_context(context):
        by_hand.change()
    assert champion(ended.home, "sample") == "sample-one"
    assert ended.told[-1] == (
        "rolled back", "sample-one rolled back (instead of sample-two): wrong dates (ann)"
    )  # fmt: skip
    assert events(ended.home, "sample")[-1]["who"] == "ann"
    form |= {"action": "promote", "model": "sample-two"}
    with set_current_context(context):
        by_hand.change()
    assert champion(ended.home, "sample") == "sample-two"
    form |= {"action": "retire", "model": None}
    with set_current_context(context):
        by_hand.change()
    assert champion(ended.home, "sample") is None
