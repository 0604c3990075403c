"""Sends a run's record to MLflow as a run: creates the run if it is missing, and adds what it lacks.

What is sent is the difference between the record and what the server has. So a server that was down
catches up the next time, and sending twice changes nothing.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fastcpt.mlflow_server import LONGEST_PARAM, LONGEST_TAG, RECORD, Mlflow, as_list, as_mapping
from fastcpt.reporting.pictures import read_metrics
from fastcpt.reporting.record import TRAININGS, failures, read, read_last, recipe_of
from fastcpt.reporting.summary import summary

STARTED = "fast_cpt.started"
# MLflow's status by the record's state; a record without a state belongs to a running run.
STATES = {"success": "FINISHED", "failed": "FAILED", None: "RUNNING"}


def send_run(server: Mlflow, record: Path, link: str) -> None:
    """Bring the MLflow run of a record up to date; ``link`` leads to the run in Airflow.

    MLflow's parameters cannot be changed. So a run that was cleared from ``plan`` on gets a second MLflow
    run, and the first is ended. Raises ``MlflowError``, ``RecordError``.
    """
    facts, recipe = read(record, "run.json"), recipe_of(record)
    if not recipe:
        return  # the run failed before its recipe was written
    passes = server.runs(server.experiment(recipe["name"]), record.name)
    tags = _tags(record, facts, link)
    mine = [one for one in passes if _tags_of(one).get(STARTED) == facts["started"]]
    run = mine[0] if mine else _create(server, recipe["name"], facts, tags)
    for one in passes:
        if one not in mine and one["info"]["status"] == "RUNNING":
            _end(server, one, "KILLED", facts["started"])
    known = run["data"]
    latest = {metric["key"]: metric for metric in known.get("metrics", [])}
    params, has = _params(recipe), as_mapping(known.get("params"))
    server.log(
        run["info"]["run_id"],
        [*_curves(record, latest), *_figures(record, latest)],
        {key: value for key, value in params.items() if key not in has},
        {key: value for key, value in tags.items() if _tags_of(run).get(key) != value},
    )
    state = STATES.get(facts.get("state"), "FAILED")
    if run["info"]["status"] != state:
        _end(server, run, state, facts.get("ended"))


def _tags_of(run: Mapping[str, Any]) -> dict[str, Any]:
    return as_mapping(run["data"].get("tags"))


def _create(
    server: Mlflow, recipe: str, facts: Mapping[str, Any], tags: Mapping[str, str]
) -> dict[str, Any]:
    made = server.ask(
        "POST",
        "runs/create",
        experiment_id=server.experiment(recipe),
        run_name=facts["run"],
        start_time=_milliseconds(facts["started"]),
        tags=as_list(tags),
    )
    return dict(made["run"])


def _end(server: Mlflow, run: Mapping[str, Any], state: str, ended: str | None) -> None:
    """Set a run's status, or set it back to RUNNING if the run continues."""
    when = {"end_time": _milliseconds(ended)} if ended else {}
    server.ask("POST", "runs/update", run_id=run["info"]["run_id"], status=state, **when)


def _milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


def _params(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's values by their dotted keys; characters that MLflow refuses in names become ``_``."""
    return {
        re.sub(r"[^\w./ -]", "_", key, flags=re.ASCII): text[:LONGEST_PARAM]
        for key, text in _flat("", recipe)
    }


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", text


def _tags(record: Path, facts: Mapping[str, Any], link: str) -> dict[str, str]:
    """Identity, versions, digests of what the run used and made, failures, and the link to Airflow."""
    corpus, published = read(record, "corpus_manifest.json"), read(record, "outputs/publish.json")
    why = [f"{task}: {message}" for task, message in failures(record).items()]
    found = {
        RECORD: record.name,
        STARTED: facts["started"],
        "fast_cpt.run": facts["run"],
        "fast_cpt.version": facts.get("version"),
        "fast_cpt.code": facts.get("code"),
        "fast_cpt.selection": corpus.get("selection"),
        "fast_cpt.corpus": read(record, "outputs/build.json").get("digest"),
        "fast_cpt.model": Path(published["path"]).name if published else None,
        "fast_cpt.standing": published.get("standing"),
        "fast_cpt.failures": "\n".join(why),
        "fast_cpt.link": link,
        "mlflow.source.type": "JOB",
        "mlflow.source.name": link,
        "mlflow.note.content": f"[The run in Airflow]({link})",
    }
    return {key: str(value)[:LONGEST_TAG] for key, value in found.items() if value}


def _metric(key: str, value: float, step: int = 0) -> dict[str, Any]:
    return {"key": key, "value": value, "timestamp": int(time.time() * 1000), "step": step}


def _curves(record: Path, latest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of each training's curve after the last step that the server has."""
    for training in TRAININGS:
        file = record / training / "metrics.jsonl"
        for row in read_metrics(file) if file.is_file() else ():
            for name, value in row.items():
                key, step = f"{training}/{name}", int(row["step"])
                sent = int(latest[key].get("step", 0)) if key in latest else -1
                if name != "step" and step > sent and _is_number(value):
                    yield _metric(key, value, step)


def _figures(record: Path, latest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The run's results so far that the server lacks or has with another value."""
    facts, evaluation = summary(record), read_last(record, "evaluation")
    held_out = evaluation.get(evaluation.get("validation_set", ""), {})
    found = {
        "hours": facts["seconds"] / 3600 if facts["seconds"] is not None else None,
        "bits_per_byte": held_out.get("model", {}).get("bits_per_byte"),
        "base_bits_per_byte": held_out.get("base", {}).get("bits_per_byte"),
        **{name: facts[name] for name in ("perplexity", "base_perplexity", "gpu_hours", "cost")},
        **{name: facts[name] for name in ("documents_kept", "tokens_kept")},
    }
    for name in ("rouge_l", "citation_accuracy"):
        figure = facts[name] or {}
        found[name] = figure.get("value")
        found |= {f"{name}_{end}": figure.get(end) for end in ("low", "high")}
    for key, value in found.items():
        if _is_number(value) and latest.get(key, {}).get("value") != value:
            yield _metric(key, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
