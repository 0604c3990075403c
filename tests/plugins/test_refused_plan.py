"""What the plan does not know ends a run at its step with a ``ValueError``, which the DAG does not retry."""

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
from fastcpt.planning.result import CannotRun


class Run:
    """A run of the DAG as its steps see it."""

    def __init__(self, documents: Path) -> None:
        self.results: dict[str, Any] = {}
        self.params = {"documents": str(documents), "run_even_if_plan_says_no": False}
        self.run_id, self.dag_id, self.task_id, self.map_index = "a", "fast_cpt", "plan", -1
        self.context: Any = {
            "ti": self,
            "run_id": self.run_id,
            "dag": SimpleNamespace(dag_id=self.dag_id),
            "dag_run": SimpleNamespace(start_date=datetime.now(UTC)),
            "params": self.params,
        }

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def plan(self) -> Path:
        """The step ``plan``; the run's record."""
        with set_current_context(self.context):
            self.results["plan"] = steps.plan()
        return Path(self.results["plan"]["record"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    host = {"conn_type": "ssh", "host": "localhost"}
    monkeypatch.setenv("AIRFLOW_CONN_GPU_CLUSTER", json.dumps(host))
    monkeypatch.setattr(steps, "HOME", tmp_path / "home")
    generate_sample(tmp_path / "sample", documents=40)
    return Run(tmp_path / "sample" / "parsed")


def test_a_model_that_is_not_known_ends_the_run_at_its_first_step(run: Run) -> None:
    run.params["recipe"] = "cpt_stage2_deep"
    with pytest.raises(CannotRun, match="'output/cpt_stage1_fast/final' is not known here"):
        run.plan()
    # a person may know better
    run.params["run_even_if_plan_says_no"] = True
    planned = json.loads((run.plan() / "plan.json").read_text())
    assert (planned["fits"], planned["hours"]) == (False, None)


@pytest.mark.parametrize(
    ("name", "memory_gb", "said"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.9, "memory: 306 GB a GPU of 42"),
        (
            "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
            42.9,
            "GPU 'NVIDIA H100 80GB HBM3 MIG 3g.40gb' is not",
        ),
        ("NVIDIA H100", 42.9, "it is another card"),
    ],
)
def test_cards_are_looked_at_again_when_the_cluster_is_seen(
    run: Run, name: str, memory_gb: float, said: str
) -> None:
    run.params |= {"recipe": "cpt_config_fast", "run_even_if_plan_says_no": True}
    run.plan()
    run.params["run_even_if_plan_says_no"] = False
    facts: dict[str, Any] = {"memory_gb": 2000.0, "disk_free_gb": 9000.0}
    run.results["check_cluster"] = {**facts, "gpus": [{"name": name, "memory_gb": memory_gb}] * 4}
    run.results["build"] = {"corpus": {"tokens": 2_000_000_000}}
    with pytest.raises(ValueError, match=said):
        steps.final_plan(run.context)
