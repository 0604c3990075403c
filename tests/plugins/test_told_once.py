"""Every incident of a year's runs is told once by mail and by webhook, though each task is tried twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import notifications
from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.registry.champion import champion, promote, retire, untold
from fastcpt.reporting.record import open_record
from plugins.test_champion import evaluation
from registry.conftest import add_corpus
from steps import champion as by_hand
from steps import publish

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from year_told import Run, Told

RECIPE = load_recipe("sample", {"cluster.cpu_only": False, "budget.price_per_gpu_hour": 2.0})


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    # what ``Told`` sets is taken back after the test
    for module in (notifications, publish, by_hand):
        monkeypatch.setattr(module, "HOME", tmp_path)
    for name in ("VAR_FAST_CPT_MAIL_TO", "CONN_SMTP_DEFAULT", "CONN_FAST_CPT_WEBHOOK"):
        monkeypatch.setenv(f"AIRFLOW_{name}", "")
    add_corpus(tmp_path)
    return Told(tmp_path)


def test_each_incident_is_told_exactly_once(told: Told, tmp_path: Path) -> None:
    def begin(name: str, of_base: float, perplexity: float = 9.0) -> Run:
        record = open_record(tmp_path, name, "fast_cpt", RECIPE)
        write_json(record / "outputs" / "build.json", {"digest": "c", "path": "/c"})
        found: dict[str, Any] = evaluation(of_base)
        found["random"]["model"] = {**found["random"]["model"], "perplexity": perplexity}
        write_json(record / "evaluation.json", found)
        return Run(name, record, RECIPE)

    def publish(run: Run, hours: float = 1.0) -> None:
        run.train(run.name, hours, planned=2.0)
        assert run.gates()
        (tmp_path / "models" / f"sample-{run.name}").mkdir(parents=True)
        run.publish(run.name, tmp_path / "models" / f"sample-{run.name}")

    publish(begin("first", 0.9))
    told.expect("promoted", "first")
    publish(begin("worse", 0.92))
    told.expect("kept as a candidate", "worse")
    last = begin("better", 0.85)
    publish(last, hours=2.5)
    told.expect("spent more than planned", "better")
    told.expect("promoted", "better")
    diverged = begin("diverged", 0.9, perplexity=500.0)
    diverged.train("diverged", 1.0, planned=2.0)
    assert not diverged.gates()
    told.expect("gate missed", "diverged", 2)  # of stage 1 and of stage 2
    begin("no-host", 0.9).failed("sync", ConnectionError("the GPU host does not answer"))
    told.expect("failed", "no-host")
    last.roll_back("wrong dates")
    told.expect("rolled back", "better")
    assert champion(tmp_path, "sample") == "sample-first"
    # in a shell, which sends no message
    promote(tmp_path, "sample", "sample-better", "bob", "the dates are right")
    retire(tmp_path, "sample", "bob", "another tokenizer")
    begin("look", 0.9).look_for_untold()
    told.expect("promoted", "look")
    told.expect("retired", "look")
    assert untold(tmp_path) == []
    assert told.due.total() == 10
    told.close()
    assert told.wrong() == []
    # one that is missing is seen
    told.expect("failed", "silent")
    assert len(told.wrong()) == 2
