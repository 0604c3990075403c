"""A run of the DAG, as seen by its steps on this machine, on a small sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.execution_time.context import set_current_context

from fastcpt.corpus.sample import generate_sample
from steps import corpus, gate, plan

STEPS: dict[str, Callable[..., Any]] = {
    step.__name__: step
    for step in (
        plan.plan,
        plan.list_documents,
        corpus.score,
        corpus.select,
        corpus.tokenize,
        corpus.build,
        gate.gate,
        gate.gate_stage2,
    )
}


class Run:
    """What a task gets of its run; what each step answered is there for the next."""

    def __init__(self, documents: Path) -> None:
        self.results: dict[str, Any] = {}
        self.documents = documents
        self.params = {"documents": str(documents), "run_even_if_plan_says_no": False}
        self.run_id, self.dag_id, self.task_id, self.map_index = "a:run", "fast_cpt", "", -1
        self.log_url = "http://airflow.example/dags/fast_cpt"
        self.context: Any = {
            "ti": self,
            "run_id": self.run_id,
            "dag": DAG(self.dag_id),
            "dag_run": SimpleNamespace(start_date=datetime.now(UTC)),
            "params": self.params,
        }

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def step(self, name: str, *given: Any) -> Any:
        self.task_id = name
        with set_current_context(self.context):
            self.results[name] = STEPS[name](*given)
        return self.results[name]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    host = json.dumps({"conn_type": "ssh", "host": "localhost"})
    for connection in ("GPU_CLUSTER", "LOCAL_CLUSTER"):
        monkeypatch.setenv(f"AIRFLOW_CONN_{connection}", host)
    for module in (plan, corpus):
        monkeypatch.setattr(module, "HOME", tmp_path / "home")
    generate_sample(tmp_path / "sample", documents=40)
    return Run(tmp_path / "sample" / "parsed")
