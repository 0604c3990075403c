"""A run that cannot be planned ends at its step with a ``ValueError``, which the DAG does not retry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import steps.plan
from fastcpt.planning.result import CannotRun

if TYPE_CHECKING:
    from conftest import Run


def test_a_model_that_is_not_known_ends_the_run_at_its_first_step(run: Run) -> None:
    run.params["recipe"] = "cpt_stage2_deep"
    with pytest.raises(CannotRun, match="'output/cpt_stage1_fast/final' is not known here"):
        run.step("plan")
    # a person may know better
    run.params["run_even_if_plan_says_no"] = True
    planned = json.loads((Path(run.step("plan")["record"]) / "plan.json").read_text())
    assert (planned["fits"], planned["hours"]) == (False, None)


@pytest.mark.parametrize(
    ("name", "memory_gb", "said"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.9, "memory: 130 GB per GPU of 42"),
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
    run.step("plan")
    run.params["run_even_if_plan_says_no"] = False
    facts: dict[str, Any] = {"memory_gb": 2000.0, "disk_free_gb": 9000.0}
    run.results["check_cluster"] = {**facts, "gpus": [{"name": name, "memory_gb": memory_gb}] * 4}
    run.results["build"] = {"corpus": {"tokens": 2_000_000_000}}
    with pytest.raises(ValueError, match=said):
        steps.plan.final_plan(run.context)
