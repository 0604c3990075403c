"""A run cleared after its documents changed: the steps on this machine, and the digests of later ones.

tests/e2e/test_names.py has the whole of it, on a real Airflow and a real cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastcpt.files import read_json
from fastcpt.reporting.record import times
from fastcpt.training.made_from import tokenizer_digest
from steps import training

if TYPE_CHECKING:
    from conftest import Run


@pytest.fixture(autouse=True)
def short(run: Run) -> None:
    run.params |= {"recipe": "sample", "num_shards": 2, "max_steps": 8}


def corpus_of(run: Run) -> dict[str, Any]:
    """What the steps up to ``build`` make; ``sync`` is taken for done."""
    plan = run.step("plan")
    (parts,) = run.step("list_documents", plan)
    selection = run.step("select", plan, [run.step("score", plan, parts)])
    run.step("tokenize", plan, selection, parts)
    corpus: dict[str, Any] = run.step("build", plan, selection)["corpus"]
    files = read_json(Path(corpus["path"]) / "corpus_manifest.json")["files"]
    run.results["check_cluster"] = {"root": "/r"}
    run.results["sync"] = {
        **{"root": "/r", "python": "/p", "code": "/c", "run": "/r/runs/0", "corpus": "/c"},
        "corpus_digest": corpus["digest"],
        "tokenizer_digest": tokenizer_digest(files),
    }
    return corpus


def test_another_corpus_is_another_training_and_the_same_one_the_same(run: Run) -> None:
    first, trained = corpus_of(run), training.train_cpt(run.context).result
    record = Path(run.results["plan"]["record"])
    for left in ("gate_stage2.json", "train_sft/training.json", "outputs/publish.json"):
        (record / left).parent.mkdir(exist_ok=True)
        (record / left).write_text("{}")
    one = sorted(run.documents.rglob("*.json*"))[0]
    one.rename(run.documents.parent / one.name)
    second = corpus_of(run)
    assert second["digest"] != first["digest"]
    assert training.train_cpt(run.context).result != trained
    # nothing of the pass before is left
    assert {path.name for path in record.rglob("*.json")} == {
        *(
            "run.json",
            "documents.json",
            "plan.json",
            "selection.json",
            "corpus_manifest.json",
            "build.json",
        ),
        *("start.json", "score.json", "select.json", "tokenize.json"),
    }
    (run.documents.parent / one.name).rename(one)
    assert corpus_of(run)["digest"] == first["digest"]
    assert training.train_cpt(run.context).result == trained
    noted = times(record)
    assert noted is not None
    assert noted["worked"] > 0


def test_a_cleared_run_that_is_refused_has_no_model_to_show(run: Run) -> None:
    record = Path(run.step("plan")["record"])
    (record / "outputs").mkdir()
    (record / "outputs" / "publish.json").write_text('{"path": "/models/old"}')
    run.params["documents"] = "/nowhere"
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        run.step("plan")
    assert [path.name for path in record.iterdir()] == ["run.json"]
