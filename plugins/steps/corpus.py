"""The corpus steps, on this machine or on workers that share HOME and the documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from airflow.sdk.exceptions import AirflowSkipException

from fastcpt.files import HOME
from fastcpt.manifests import Tokenized
from steps.results import Built, Made, Plan
from steps.run import noted, planned_recipe, start_of_run


def _brief(facts: Mapping[str, Any]) -> Made:
    """The part of a room's result that later tasks need, to keep XComs small."""
    return cast(Made, {key: facts[key] for key in Made.__annotations__ if key in facts})


def _processes(plan: Plan) -> int:
    """A mapped task's share of the cores; all of them if there is only one group of files."""
    from fastcpt.corpus.processes import cores

    return max(1, cores() // len(plan["parts"]))


@noted
def score(plan: Plan, parts: list[str]) -> list[Made]:
    """Score the documents of a group of files."""
    from fastcpt.corpus.score import score_parts

    return [
        _brief(facts) for facts in score_parts(parts, planned_recipe(plan), HOME, _processes(plan))
    ]


@noted
def select(plan: Plan, scores: list[list[Made]]) -> Made:
    """Select documents from the score tables, and train the tokenizer on them if necessary."""
    from fastcpt.corpus.build import prepare_tokenizer
    from fastcpt.corpus.explain import ends_of_ranking
    from fastcpt.corpus.select import select as select_documents
    from fastcpt.reporting.record import add

    recipe = planned_recipe(plan)
    tables = sorted(table["path"] for group in scores for table in group)
    selection = _brief(select_documents(tables, recipe, HOME))
    prepare_tokenizer(selection["path"], recipe, HOME)
    add(Path(plan["record"]), "selection.json", ends_of_ranking(selection["path"]))
    return selection


@noted
def tokenize(plan: Plan, selection: Made, parts: list[str]) -> Tokenized:
    """Tokenize the selected documents of a group of files."""
    from fastcpt.corpus.build import tokenize as tokenize_documents

    recipe, processes = planned_recipe(plan), _processes(plan)
    return tokenize_documents(selection["path"], parts, recipe, HOME, processes)


@noted
def build(plan: Plan, selection: Made) -> Built:
    """Pack the tokens of the selected documents; split the instructions."""
    from fastcpt.corpus.build import build as build_corpus
    from fastcpt.corpus.going_on import NothingNew
    from fastcpt.corpus.instructions import build_instructions
    from fastcpt.reporting.record import add, add_output

    recipe = planned_recipe(plan)
    instructions = build_instructions(recipe, HOME)
    record = Path(plan["record"])
    try:
        corpus = build_corpus(selection["path"], recipe, HOME, start=start_of_run(record))
    except NothingNew as error:
        raise AirflowSkipException(str(error)) from error
    add(record, "corpus_manifest.json", Path(corpus["path"]) / "corpus_manifest.json")
    add_output(record, "build", _brief(corpus))
    return {
        "corpus": _brief(corpus),
        "instructions": _brief(instructions) if instructions else None,
        "reused": corpus["reused"] and (instructions is None or instructions["reused"]),
    }
