"""A run that goes on from the champion: its start, corpus and training, and a run with nothing new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException

from corpus.made import act
from fastcpt.files import read_json
from fastcpt.registry.champion import add_model, promote

if TYPE_CHECKING:
    from conftest import Run

GOOD = {"what": "bits", "value": 0.1, "low": 0.1, "high": 0.1, "bound": 0.0, "met": True}


class Weeks:
    """Runs on one folder of documents, one after another."""

    def __init__(self, run: Run, home: Path) -> None:
        self.run, self.home = run, home
        run.params["recipe"] = "sample"
        run.params["overrides"] = {
            "recurring.start": "champion",
            "selection.top_share": None,
            "corpus.newest_share": 0.0,
            "corpus.validation_share": 0.1,
        }

    def plan(self, name: str) -> Path:
        self.run.run_id = self.run.context["run_id"] = name
        return Path(self.run.step("plan")["record"])

    def build(self) -> dict[str, Any]:
        plan = self.run.results["plan"]
        groups = self.run.step("list_documents", plan)
        selection = self.run.step("select", plan, [self.run.step("score", plan, g) for g in groups])
        return dict(self.run.step("build", plan, selection)["corpus"])

    def publish(self, record: Path, corpus: dict[str, Any], name: str) -> None:
        decision = {"recommended": True, "against": None, "conditions": [GOOD]}
        facts = {"run": "r", "record": record.name, "path": f"host:/{name}", "training": "sft"}
        facts |= {"corpus": corpus["digest"], "corpora": [corpus["digest"]], "before_sft": "ab12"}
        add_model(self.home, "sample", name, {**facts, "decision": decision}, {})
        promote(self.home, "sample", name, "ann", "a test")

    def deliver(self, name: str, *records: dict[str, Any]) -> None:
        lines = "".join(json.dumps(one) + "\n" for one in records)
        (self.run.documents / name).write_text(lines)


@pytest.fixture
def weeks(run: Run, tmp_path: Path) -> Weeks:
    return Weeks(run, tmp_path / "home")


def test_a_run_reads_what_is_new_since_the_champion_and_is_skipped_without_it(
    weeks: Weeks, capsys: pytest.CaptureFixture[str]
) -> None:
    first = weeks.plan("one")
    assert "has no champion yet: training begins with the base model" in capsys.readouterr().out
    assert read_json(first / "start.json") == {}
    corpus = weeks.build()
    weeks.publish(first, corpus, "sample-1")
    with pytest.raises(AirflowSkipException, match="no document is new since champion sample-1"):
        weeks.plan("two")

    new = [act(n, year=2021, words=300) for n in range(20)]
    weeks.deliver("new.jsonl", *new)
    third = weeks.plan("three")
    assert read_json(third / "start.json")["training"] == "ab12"
    note = next(n for n in read_json(third / "plan.json")["notes"] if n.startswith("goes on"))
    assert "from the base model" in note
    weeks.build()
    gone_on = read_json(third / "corpus_manifest.json")["gone_on"]
    assert gone_on["model"] == "sample-1"
    # of 20 new works about a tenth is held out by their hash
    assert 14 <= gone_on["new_documents"] <= 20
    assert gone_on["replayed_tokens"] <= gone_on["new_tokens"] / 3


def test_files_that_hold_nothing_new_end_the_run_before_a_gpu_is_used(weeks: Weeks) -> None:
    first = weeks.plan("one")
    weeks.publish(first, weeks.build(), "sample-1")
    known = next(weeks.run.documents.glob("*.jsonl")).read_text()
    (weeks.run.documents / "again.jsonl").write_text(known)
    weeks.plan("two")
    with pytest.raises(AirflowSkipException, match="champion sample-1 was trained on all"):
        weeks.build()


def test_a_champion_of_another_recipe_ends_the_run_in_its_plan(weeks: Weeks) -> None:
    first = weeks.plan("one")
    weeks.publish(first, weeks.build(), "sample-1")
    weeks.deliver("new.jsonl", act(1, year=2021))
    weeks.run.params["overrides"] |= {"corpus.max_seq_length": 64}
    with pytest.raises(ValueError, match=r"corpus\.max_seq_length was \d+ and is 64"):
        weeks.plan("two")
