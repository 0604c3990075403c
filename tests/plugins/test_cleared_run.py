"""A run that is cleared after its documents changed: the steps on this machine, and what they name next.

tests/e2e/test_names.py has the whole of it, on a real Airflow and a real cluster.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.execution_time.context import set_current_context

import steps
from fastcpt.corpus.sample import generate_sample
from fastcpt.files import read_json
from fastcpt.reporting.record import times
from fastcpt.training.made_from import tokenizer_digest


class Run:
    """A run of the DAG as its steps see it."""

    def __init__(self, documents: Path) -> None:
        params = {"recipe": "sample", "documents": str(documents), "num_shards": 2, "max_steps": 8}
        self.results: dict[str, Any] = {}
        self.run_id, self.dag_id, self.task_id, self.map_index = "a:run", "fast_cpt", "", -1
        self.context: Any = {
            "ti": self,
            "run_id": self.run_id,
            "dag": SimpleNamespace(dag_id=self.dag_id),
            "dag_run": SimpleNamespace(start_date=datetime.now(UTC)),
            "params": {**params, "run_even_if_plan_says_no": False},
        }

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def step(self, name: str, *given: Any) -> Any:
        self.task_id = name
        with set_current_context(self.context):
            self.results[name] = getattr(steps, name)(*given)
        return self.results[name]

    def corpus(self) -> dict[str, Any]:
        plan = self.step("plan")
        (parts,) = self.step("list_documents", plan)
        selection = self.step("select", plan, [self.step("score", plan, parts)])
        self.step("tokenize", plan, selection, parts)
        corpus: dict[str, Any] = self.step("build", plan, selection)["corpus"]
        files = read_json(Path(corpus["path"]) / "corpus_manifest.json")["files"]
        self.results["check_cluster"] = {"root": "/r"}
        self.results["sync"] = {
            **{"root": "/r", "python": "/p", "code": "/c", "run": "/r/runs/0", "corpus": "/c"},
            "corpus_digest": corpus["digest"],
            "tokenizer_digest": tokenizer_digest(files),
        }
        return corpus


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    host = {"conn_type": "ssh", "host": "localhost"}
    monkeypatch.setenv("AIRFLOW_CONN_LOCAL_CLUSTER", json.dumps(host))
    monkeypatch.setattr(steps, "HOME", tmp_path / "home")
    generate_sample(tmp_path / "sample", documents=40)
    return tmp_path / "sample" / "parsed"


def test_another_corpus_is_another_training_and_the_same_one_the_same(documents: Path) -> None:
    run = Run(documents)
    first, trained = run.corpus(), steps.train_cpt(run.context).result
    record = Path(run.results["plan"]["record"])
    for left in ("gate_stage2.json", "train_sft/training.json", "outputs/publish.json"):
        (record / left).parent.mkdir(exist_ok=True)
        (record / left).write_text("{}")
    one = sorted(documents.rglob("*.json*"))[0]
    one.rename(documents.parent / one.name)
    second = run.corpus()
    assert second["digest"] != first["digest"]
    assert steps.train_cpt(run.context).result != trained
    # nothing of the pass before is left
    assert {path.name for path in record.rglob("*.json")} == {
        *("run.json", "plan.json", "corpus_manifest.json", "build.json"),
        *("score.json", "select.json", "tokenize.json"),
    }
    (documents.parent / one.name).rename(one)
    assert run.corpus()["digest"] == first["digest"]
    assert steps.train_cpt(run.context).result == trained
    noted = times(record)
    assert noted is not None
    assert noted["worked"] > 0


def test_a_cleared_run_that_is_refused_has_no_model_to_show(documents: Path) -> None:
    run = Run(documents)
    record = Path(run.step("plan")["record"])
    (record / "outputs").mkdir()
    (record / "outputs" / "publish.json").write_text('{"path": "/models/old"}')
    run.context["params"]["documents"] = "/nowhere"
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        run.step("plan")
    assert [path.name for path in record.iterdir()] == ["run.json"]
