"""An input error is reported once, by the step that finds it, and is not retried."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ({"documents": "/nowhere/law"}, "plan", "documents.path: '/nowhere/law' does not exist"),
        ({"documents": "EMPTY"}, "plan", "documents.path: no JSON, JSONL"),
        ({"connection": "nobody"}, "plan", "no Airflow connection 'nobody': add it"),
        ({"num_shards": 2, "gpus": 64}, "check_cluster", "the recipe wants 64 ranks"),
        ({"quality_threshold": 999.0}, "select", "the selection is empty"),
        ({"tokenizer": "/nowhere/tokenizer"}, "ANY", "/nowhere/tokenizer"),
        ({"instructions": "/nowhere/i.jsonl"}, "ANY", "sft.instructions"),
        ({"recipe": "cpt_config_fast"}, "plan", "does not fit"),
        ({"recipe": "cpt_stage2_deep"}, "plan", "'output/cpt_stage1_fast/final' is not known here"),
        ({"recipe": "cpt_config_fast"}, "plan", "more tokens are needed, not more steps"),
        ({"recipe": "cpt_config_fast"}, "plan", "recipe.yaml --cluster 4xB200 --tokens"),
    ],
    ids=lambda value: str(next(iter(value), "")) if isinstance(value, dict) else None,
)
def test_a_wrong_value_ends_the_run_with_one_clear_message(
    stack: Stack, tmp_path: Path, values: dict[str, Any], task: str, message: str
) -> None:
    if values.get("documents") == "EMPTY":
        values = {**values, "documents": str(tmp_path)}
    if str(values.get("recipe")).startswith("cpt_"):
        values = {**values, "connection": "local_cluster"}
    run = stack.run(**values)
    assert run.outcome == "failed"
    failed = [entry for entry in run.tasks() if entry["state"] == "failed"]
    failed = [entry for entry in failed if entry["task_id"] != "report"]
    assert len(failed) == 1, [entry["task_id"] for entry in failed]
    assert run.error("report") == f"the run did not succeed: {failed[0]['task_id']} failed"
    assert task in ("ANY", failed[0]["task_id"])
    assert failed[0]["try_number"] == 1
    assert message in run.error(failed[0]["task_id"])
    assert "train_cpt" not in {t for t, state in run.states().items() if state == "success"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 0}, "0 is less than the minimum of 1"),
        ({"perplexity_threshold": 1}, "1 is less than or equal to the minimum of 1"),
        ({"recipe": "cpt_config_fats"}, "is not one of"),
        ({"max_seq_length": "long"}, "is not of type 'integer', 'null'"),
        ({"connection": "a; rm -rf /"}, "does not match"),
    ],
)
def test_the_form_refuses_what_is_out_of_its_limits(
    stack: Stack, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="refused") as refused:
        stack.api.trigger(values)
    assert message in str(refused.value)
