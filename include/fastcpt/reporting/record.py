"""A run's record: a folder of small files with the run's inputs and results.

    home/runs/<run>-<digest>/
        run.json                  run, DAG, start and end, state; versions of Fast CPT, its code, its packages
        recipe.yaml               the recipe with every default written out
        plan.json                 the plan's figures
        outputs/<task>.json       path and digest of each task's output
        gguf.json                 the GGUF file of the base model, if it is one
        corpus_manifest.json      the corpus: funnel, tokens, shards
        <training>/metrics.jsonl  the curves of each of TRAININGS
        <training>/training.json  its totals
        evaluation.json, evaluation_stage2.json, gate.json, gate_stage2.json, evaluation_sft.json
        decision.json             whether the model is recommended, by which conditions
        cost.json                 GPU hours and money
        rent.json                 the rented machines, with their times and prices
        plan_and_actual.json      the plan's figures and the run's
        times/<task>.json         when each task worked; times/approval.json: waited for a person
        selection.json            the best and the worst selected documents
        live/<task>.json          the state of a job when the host was last asked
        failures/<task>.json      why a task failed; it may have succeeded since
        report.md, report.html    the report (fastcpt.reporting.report)

Tasks run in parallel, so each writes its own files. Files are written atomically and adding one again
replaces it, so a retried task leaves the same record as a single try. The record of a failed run is
incomplete; its readers accept that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fastcpt import __version__
from fastcpt.files import digest_of, read_json, sha256_of_file, whole_file, write_json
from fastcpt.recipe import Recipe
from fastcpt.yaml_files import read_yaml

# In the order they run; each has a folder with its name in the record.
TRAININGS = ("train_cpt", "train_cpt_stage2", "train_sft")
# The record's file of each step on the GPUs.
ON_GPUS = {
    **{training: f"{training}/training.json" for training in TRAININGS},
    "evaluate_cpt": "evaluation.json",
    "evaluate_stage2": "evaluation_stage2.json",
    "evaluate_sft": "evaluation_sft.json",
}
REPOSITORY = Path(__file__).resolve().parents[3]
# The packages that a run's results depend on; those on the cluster are in training.json.
PACKAGES = ("apache-airflow", "numpy", "pyarrow", "pydantic", "tokenizers", "zstandard")


class RecordError(ValueError):
    """A file of a record is damaged; the message names the file and the damage."""


def record_folder(home: Path, run: str) -> Path:
    """The folder of the record of ``run`` (an Airflow run id), unique to it; not created.

    The name has a readable part and a digest of the id: two ids may have the same readable part, or
    differ only in case. A record that an older version began without the digest is found too.
    """
    if not run:
        raise ValueError("a run without an id has no record")
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", run)
    own = home / "runs" / f"{readable[:120].strip('.-') or 'run'}-{digest_of(run)[:8]}"
    older = home / "runs" / readable
    return older if not own.is_dir() and _is_record_of(older, run) else own


def _is_record_of(folder: Path, run: str) -> bool:
    try:
        return read(folder, "run.json").get("run") == run
    except RecordError:
        return False


def open_record(
    home: Path, run: str, dag: str, recipe: Recipe, started: datetime | None = None
) -> Path:
    """Begin the record of a run. An existing one is emptied, as the run was cleared.

    The first start time is kept, unless ``started`` is given.
    """
    record = record_folder(home, run)
    began = _text(started) if started else read(record, "run.json").get("started") or _now()
    empty_record(record)
    write_json(
        record / "run.json",
        {
            "run": run,
            "dag": dag,
            "started": began,
            "version": __version__,
            "code": code_version(REPOSITORY),
            "packages": package_versions(),
        },
    )
    add_text(record, "recipe.yaml", recipe.to_yaml())
    return record


def empty_record(record: Path) -> None:
    """Remove the tasks' files from before the run was cleared: they belong to another plan."""
    for left in record.iterdir() if record.is_dir() else ():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != "run.json":
            left.unlink()


def add(record: Path, name: str, content: Any) -> Path:
    """Put a file into the record under ``name`` (``"train_cpt/metrics.jsonl"``), atomically.

    ``content`` is a file to copy (``Path``) or a value to write as JSON.
    """
    if isinstance(content, Path):
        with whole_file(record / name) as aside:
            shutil.copyfile(content, aside)
    else:
        write_json(record / name, content)
    return record / name


def add_text(record: Path, name: str, text: str) -> Path:
    """Put a text file into the record under ``name``, atomically."""
    with whole_file(record / name) as aside:
        aside.write_text(text, encoding="utf-8")
    return record / name


def add_output(record: Path, task: str, facts: Mapping[str, Any]) -> Path:
    """Record a task's output: the ``facts`` it returned, with ``path`` and ``digest``."""
    return add(record, f"outputs/{task}.json", dict(facts))


def add_time(record: Path, what: str, began: float, ended: float) -> Path:
    """Record when a task worked, or (``approval``) waited for a person; seconds since the epoch."""
    return add(record, f"times/{what}.json", {"began": began, "ended": ended})


def add_failure(home: Path, run: str, dag: str, task: str, message: str) -> Path:
    """Record why a task of the run failed. A run that failed before it had a record gets one."""
    record = record_folder(home, run)
    if not read(record, "run.json"):
        facts = {"run": run, "dag": dag, "started": _now(), "version": __version__}
        add(record, "run.json", facts)
    return add(record, f"failures/{task}.json", {"message": message, "when": _now()})


def failures(record: Path) -> dict[str, str]:
    """Why tasks of the run failed, by task, in the order of failure."""
    notes = {
        file.stem: read(record, f"failures/{file.name}")
        for file in (record / "failures").glob("*.json")
    }
    return {
        task: str(note.get("message", ""))
        for task, note in sorted(notes.items(), key=lambda item: str(item[1].get("when")))
    }


def times(record: Path) -> dict[str, float] | None:
    """Seconds that the run's tasks ``worked`` (parallel tasks count once) and that it waited for a
    person's ``approval``; None for a record of an older version."""
    noted = {
        file.stem: read(record, f"times/{file.name}")
        for file in sorted((record / "times").glob("*.json"))
    }
    if not noted:
        return None
    approval = noted.pop("approval", {"began": 0.0, "ended": 0.0})
    # jobs done before the run was cleared do not count
    worked, until = 0.0, datetime.fromisoformat(read(record, "run.json")["started"]).timestamp()
    for began, ended in sorted((one["began"], one["ended"]) for one in noted.values()):
        worked += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return {"worked": worked, "approval": approval["ended"] - approval["began"]}


def add_cost(record: Path, gpus: int, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Write ``cost.json``: GPU hours of trainings and evaluations so far and, at a known price, USD.

    GPU hours come from the seconds of this run's own jobs, not from results it found; a recipe for
    CPUs uses no GPUs, whatever its ``gpus``. The money is the rent if the run rents its machines
    (``rented``), otherwise the price of the hours.
    """
    if recipe_of(record).get("cluster", {}).get("cpu_only"):
        gpus = 0
    seconds = {step: job_seconds(record, step) or 0.0 for step in ON_GPUS}
    gpu_hours = sum(seconds.values()) * gpus / 3600
    of_hours = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    paid = rented(record, time.time())
    cost = {
        "gpus": gpus,
        "seconds": seconds,
        "gpu_hours": gpu_hours,
        "price_per_gpu_hour": price_per_gpu_hour,
        "rented": paid,
        "cost": of_hours if paid is None else paid,
    }
    add(record, "cost.json", cost)
    return cost


def rented(record: Path, now: float) -> float | None:
    """USD for the run's rented machines, each from the request to its release or ``now``; None without any."""
    machines = read(record, "rent.json").get("machines")
    if not machines:
        return None
    spent: float = sum(
        ((one["released"] or now) - one["asked"]) / 3600 * one["price_per_hour"] for one in machines
    )
    return spent


def job_seconds(record: Path, step: str) -> float | None:
    """Seconds that a step's job took on the GPUs; None if this run did not reach it or found its
    result. A record of an older version has only a training's own seconds."""
    facts = read(record, ON_GPUS[step])
    seconds: float | None = facts.get("job_seconds", facts.get("seconds"))
    return seconds


def took(record: Path, gpus: int) -> dict[str, float | None]:
    """The run's actual figures, under the names of a plan's; hours and USD without stage 2.

    Hours and money are None until the run has been evaluated: a partial sum would mislead.
    """
    totals, cost = read(record, "train_cpt/training.json"), read(record, "cost.json")
    seconds = {step: job_seconds(record, step) for step in ON_GPUS}
    parts = {
        "training_hours": totals.get("seconds") if seconds["train_cpt"] else None,
        "start-up": _less(seconds["train_cpt"], totals.get("seconds")),
        "evaluation": seconds["evaluate_cpt"],
        "fine-tuning": seconds["train_sft"],
        "its evaluation": seconds["evaluate_sft"],
    }
    hours = {name: value / 3600 if value else None for name, value in parts.items()}
    stages = [step for step in ON_GPUS if "stage2" not in step]
    whole = sum(seconds[step] or 0.0 for step in stages) / 3600
    complete = seconds["train_cpt"] and seconds["evaluate_cpt"]
    rate = totals.get("tokens_per_s_per_gpu")
    return {
        **hours,
        "hours": whole if complete else None,
        "tokens_per_s": rate * gpus if rate else None,
        "memory_gb": totals.get("peak_memory_gb"),
        "cost": _took_money(cost, whole) if complete else None,
    }


def _took_money(cost: Mapping[str, Any], hours: float) -> float | None:
    """The whole rent, including stage 2; on a permanent host, the price of these hours."""
    if cost.get("rented") is not None:
        return float(cost["rented"])
    price = cost.get("price_per_gpu_hour")
    return None if price is None else float(hours * cost["gpus"] * price)


def _less(whole: float | None, part: float | None) -> float | None:
    return whole - part if whole and part is not None and whole > part else None


def close_record(record: Path, state: str) -> None:
    """Record the run's final ``state`` in Airflow's terms (``success``, ``failed``).

    A run that is already closed gets the new state and keeps its end time.
    """
    facts = read(record, "run.json")
    ended = facts.get("ended") or _now()
    write_json(record / "run.json", {**facts, "ended": ended, "state": state})


def mark_record(record: Path, state: str) -> None:
    """Record the state in which a person marked a running run; it is closed with it later."""
    write_json(record / "run.json", {**read(record, "run.json"), "marked": state})


def reopen_record(record: Path) -> None:
    """Remove the end of a run that is running again."""
    facts = read(record, "run.json")
    for name in ("marked", "ended", "state"):
        facts.pop(name, None)
    write_json(record / "run.json", facts)


def read(record: Path, name: str) -> dict[str, Any]:
    """A JSON object of the record; empty if the run has not written it yet. Raises ``RecordError``."""
    return _mapping(record / name, read_json)


def read_last(record: Path, name: str) -> dict[str, Any]:
    """``evaluation`` or ``gate`` of the last stage that has one."""
    return read(record, f"{name}_stage2.json") or read(record, f"{name}.json")


def last_gate(home: Path, base: str | None, validation_set: str) -> dict[str, Any]:
    """The newest gate decision on this set in a run with this base model; empty without one."""
    if base is None:
        return {}
    decisions = (home / "runs").glob("*/gate.json")
    for file in sorted(decisions, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            gate, model = read(file.parent, file.name), recipe_of(file.parent).get("model") or {}
        except RecordError:  # another run's damaged record does not matter here
            continue
        if (model.get("name_or_path"), gate.get("validation_set")) == (base, validation_set):
            return gate
    return {}


def recipe_of(record: Path) -> dict[str, Any]:
    """The recipe as plain sections. Not validated: old records outlive changes of the format.

    Raises ``RecordError`` if the file is damaged.
    """
    return _mapping(record / "recipe.yaml", read_yaml)


def _mapping(file: Path, reader: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        content = reader(file)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise RecordError(f"{file.name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"{file.name} is damaged: not a mapping of names to values")
    return content


def code_version(repository: Path) -> str:
    """``git describe`` of the code, or a digest of its files if there is no git history."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--tags"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
        return described.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        files = sorted(
            path
            for folder in ("dags", "plugins", "include")
            for path in (repository / folder).rglob("*")
            if path.suffix in {".py", ".sh", ".yaml", ".json", ".html"}
        )
        contents = [[str(path.relative_to(repository)), sha256_of_file(path)] for path in files]
        return f"files-{digest_of(contents)}"


def package_versions() -> dict[str, str]:
    """The installed versions of PACKAGES."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
