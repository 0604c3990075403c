"""Training and evaluation on the cluster: the job of each step, and what goes into the record."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import Context

from fastcpt.files import HOME, digest_of, read_json
from fastcpt.recipe import Recipe, RecipeError
from fastcpt.recipe_sections import CONFIGS, Training
from notifications import first_time, tell
from remote_job import RemoteJob, remote_of
from steps.results import Evaluated, Files, Places, Trained, result_of, result_or_none, trained_by
from steps.run import note, planned_recipe, price_of, start_of_run

if TYPE_CHECKING:
    from fastcpt.training.commands import Host


def job_of_run(
    context: Context,
    commands: list[list[str]],
    result: str,
    hands_on: Mapping[str, Any],
    bring: dict[str, Any] | None = None,
    **fetch: str,
) -> RemoteJob:
    """A job of the run; ``hands_on`` is the part of its result for later tasks: paths on the cluster."""
    from fastcpt.cluster.jobs import alone
    from fastcpt.training import commands as training

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    name = _job_of(context)
    fetch["status"] = f"{places['root']}/jobs/{name}/status.json"
    return RemoteJob(
        recipe.cluster.connection,
        places["root"],
        commands,
        environment=training.environment(
            recipe, host_of(places), price_of(recipe, result_of(context, "check_cluster"))
        ),
        result=result,
        fetch=fetch,
        answer=hands_on,
        alone=alone(recipe.cluster),
        slurm=_slurm(recipe),
        waiting_hours=recipe.budget.waiting_hours,
        bring=bring,
        live={
            "record": result_of(context, "plan")["record"],
            "task": context["ti"].task_id,
            "metrics": fetch.get("metrics", ""),
        },
    )


def _job_of(context: Context) -> str:
    from fastcpt.cluster.jobs import job_name

    task = context["ti"]
    return job_name(task.dag_id, task.run_id, task.task_id, task.map_index)


def _slurm(recipe: Recipe) -> dict[str, Any] | None:
    if recipe.cluster.launcher != "slurm":
        return None
    gpus = 0 if recipe.cluster.cpu_only else recipe.cluster.gpus
    return {**recipe.cluster.slurm.model_dump(), "gpus": gpus}


def host_of(places: Places) -> Host:
    from fastcpt.training.commands import Host

    return Host(places["python"], places["code"], f"{places['run']}/recipe.yaml")


def _port(output: str) -> int:
    """A port for the ranks' rendezvous, by job, below the ephemeral ports."""
    return 20_000 + int(digest_of(output), 16) % 10_000


def gated(context: Context) -> Trained:
    """The training with the model that passed the gate, from the record, as a branch has no result."""
    record = Path(result_of(context, "plan")["record"])
    if not (record / "gate.json").is_file():
        raise RecipeError(
            "the gate of this run has decided nothing: clear gate and what follows it"
        )
    gate = read_json(record / "gate.json")
    return trained_by(context, "train_cpt" if gate["passed"] else "train_cpt_stage2")


def training_of(model: str) -> str:
    """The name of a training: that of its output folder, which contains ``final``."""
    return Path(model).parent.name


def _output(context: Context, training: Training, model: str, data: dict[str, str]) -> str:
    """A training's folder on the cluster, named by what it is made from."""
    from fastcpt.training.made_from import training_name

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    name = training_name(recipe, training, model=model, data=data, deepspeed=CONFIGS)
    return f"{places['root']}/models/{name}"


def train_cpt(context: Context) -> RemoteJob:
    """Stage 1, from the base model or from the champion."""
    from fastcpt.training import commands, made_from

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    host = host_of(places)
    base = places.get("base_model") or made_from.base_name(recipe, places["tokenizer_digest"])
    start = start_of_run(Path(result_of(context, "plan")["record"]))
    # relative to the root, so that the root can be moved
    begins = start["training"] if start else base.removeprefix(f"{places['root']}/")
    output = _output(context, recipe.training, begins, {"corpus": places["corpus_digest"]})
    if recipe.model.config is not None:
        base = f"{places['root']}/models/{base}"
    train = commands.train_cpt_command(
        recipe,
        host,
        _port(output),
        corpus=places["corpus"],
        model=places.get("start") or base,
        output=output,
        stage="stage1",
    )
    initialise = commands.initialise(recipe, host, places["corpus"], base)
    return _training(context, [*initialise, train], output, base)


def train_cpt_stage2(context: Context) -> RemoteJob:
    """Stage 2, from stage 1's final checkpoint."""
    from fastcpt.training import commands

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    before = trained_by(context, "train_cpt")
    begins = training_of(before["model"])
    output = _output(context, recipe.stage2, begins, {"corpus": places["corpus_digest"]})
    train = commands.train_cpt_command(
        recipe,
        host_of(places),
        _port(output),
        corpus=places["corpus"],
        model=before["model"],
        output=output,
        stage="stage2",
    )
    return _training(context, [train], output, before["base_model"])


def _training(
    context: Context, commands: list[list[str]], output: str, base: str | None = None
) -> RemoteJob:
    hands_on: Trained = {"model": f"{output}/final"}
    if base:
        hands_on["base_model"] = base
    result, metrics = f"{output}/training.json", f"{output}/metrics.jsonl"
    bring = _bring(context, output)
    return job_of_run(context, commands, result, hands_on, bring, metrics=metrics)


def _bring(context: Context, output: str) -> dict[str, Any] | None:
    """How to copy the training's checkpoints here; first sends the newest to a host that lacks it."""
    from fastcpt.cluster import checkpoints, jobs
    from fastcpt.planning.history import line_of

    recipe, root = planned_recipe(result_of(context, "plan")), result_of(context, "sync")["root"]
    minutes = recipe.checkpoints.bring_every_minutes
    if minutes is None:
        return None
    remote, (home, url) = remote_of(recipe.cluster.connection), homes_of(recipe, output)
    if not jobs.runs(remote, root, _job_of(context)):
        step = checkpoints.send_back(remote, output, home, url)
        if step is not None:
            print(f"the host has no checkpoint as new as step_{step} of {home}: it was put there")
    return {
        "line": line_of(recipe.cluster),
        "folder": output,
        "home": str(home),
        "minutes": minutes,
        "url": url,
    }


def homes_of(recipe: Recipe, output: str) -> tuple[Path, str | None]:
    """Where copies of the training's checkpoints are kept: a folder here, and optionally a URL."""
    to, name = recipe.checkpoints.to, Path(output).name
    if to and "://" in to:
        return HOME / "checkpoints" / name, f"{to.rstrip('/')}/{name}"
    return Path(to or HOME / "checkpoints").expanduser() / name, None


def _evaluate(context: Context, trained: Trained, base_evaluation: str | None = None) -> RemoteJob:
    from fastcpt.training import commands, made_from

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    model, base = trained["model"], trained["base_model"]
    of = base.removeprefix(f"{places['root']}/")
    name = made_from.evaluation_name(recipe, base=of, corpus=places["corpus_digest"])
    result = f"{Path(model).parent}/evaluation-{name}.json"
    evaluate = commands.evaluate_command(
        recipe,
        host_of(places),
        _port(result),
        corpus=places["corpus"],
        model=model,
        base=base,
        output=result,
        base_evaluation=base_evaluation,
    )
    return job_of_run(context, [evaluate], result, {"evaluation": result})


def evaluate_cpt(context: Context) -> RemoteJob:
    """Evaluate the perplexity of stage 1's model and of the base model."""
    return _evaluate(context, trained_by(context, "train_cpt"))


def evaluate_stage2(context: Context) -> RemoteJob:
    """Evaluate the perplexity of stage 2's model, reusing the base model's from ``evaluate_cpt``."""
    before = result_of(context, "evaluate_cpt").get("evaluation")
    return _evaluate(context, trained_by(context, "train_cpt_stage2"), before)


def train_sft(context: Context) -> RemoteJob | Trained:
    """Fine-tune the model that passed the gate on the instructions."""
    from fastcpt.training import commands

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    before = gated(context)["model"]
    if places["instructions"] is None:
        return {"model": before, "skipped": "the recipe has no instructions"}
    data = {"instructions": places["instructions_digest"]}
    output = _output(context, recipe.sft.training, training_of(before), data)
    train = commands.train_sft_command(
        recipe,
        host_of(places),
        _port(output),
        instructions=places["instructions"],
        model=before,
        output=output,
    )
    return _training(context, [train], output)


def evaluate_sft(context: Context) -> RemoteJob | Evaluated:
    """Evaluate answers to the held-out instructions; the base model answers a few of them too."""
    from fastcpt.training import commands, made_from

    recipe, places = planned_recipe(result_of(context, "plan")), result_of(context, "sync")
    if places["instructions"] is None:
        return {"skipped": "the recipe has no instructions"}
    model = trained_by(context, "train_sft")["model"]
    base = trained_by(context, "train_cpt")["base_model"]
    of = base.removeprefix(f"{places['root']}/")
    name = made_from.answers_name(recipe, base=of, instructions=places["instructions_digest"])
    result = f"{Path(model).parent}/evaluation_sft-{name}.json"
    evaluate = commands.evaluate_sft_command(
        recipe,
        host_of(places),
        _port(result),
        instructions=places["instructions"],
        model=model,
        base=base,
        output=result,
    )
    return job_of_run(context, [evaluate], result, {"evaluation": result})


def keep_training(context: Context, files: Files, hands_on: Trained) -> Trained:
    """Write a training's totals and curve into the record; the result is the totals and the model.

    The record also has ``job_seconds``: the job's time in this run, None if it was already done.
    """
    from fastcpt.reporting.record import add, add_text

    record, name = Path(result_of(context, "plan")["record"]), context["ti"].task_id
    totals = json.loads(files["result"] or "{}")
    if metrics := files.get("metrics"):
        add_text(record, f"{name}/metrics.jsonl", metrics)
    add(record, f"{name}/training.json", {**totals, "job_seconds": status_seconds(files)})
    note_job(context, files)
    return cast(Trained, {**totals, **hands_on})


def note_job(context: Context, files: Files, ended: float | None = None) -> None:
    """Record when a job ran, by this machine's clock, assuming that it ended just now."""
    seconds, ended = status_seconds(files) or 0.0, ended or time.time()
    note(context, Path(result_of(context, "plan")["record"]), ended - seconds)
    _tell_of_spending(context)


def _tell_of_spending(context: Context) -> None:
    """Send a message, once per run, when its jobs have cost more than the high end of the plan."""
    from fastcpt.reporting.record import add_cost, read

    plan = result_of(context, "plan")
    recipe, record = planned_recipe(plan), Path(plan["record"])
    price = price_of(recipe, result_or_none(context, "check_cluster"))
    spent = add_cost(record, recipe.cluster.gpus, price)["cost"]
    # stage 2 is planned separately, as it may not run
    parts = ["cost", "stage2_cost"] if read(record, "train_cpt_stage2/training.json") else ["cost"]
    planned = read(record, "plan.json")
    if spent is None or not all(planned.get(part) for part in parts):
        return
    most = sum(planned[part]["high"] for part in parts)
    if spent > most and first_time(record, "spending"):
        reason = f"{spent:,.2f} USD so far; planned were {most:,.2f} at most"
        tell(context, "spent more than planned", reason)


def status_seconds(files: Files) -> float | None:
    seconds: float | None = json.loads(files.get("status") or "{}").get("seconds")
    return seconds


def keep_evaluation(context: Context, files: Files, hands_on: Evaluated) -> Evaluated:
    """Write an evaluation into the record; the result is its path here and on the cluster."""
    from fastcpt.reporting.record import add

    record = Path(result_of(context, "plan")["record"])
    name = {
        "evaluate_cpt": "evaluation.json",
        "evaluate_stage2": "evaluation_stage2.json",
        "evaluate_sft": "evaluation_sft.json",
    }[context["ti"].task_id]
    evaluation = json.loads(files["result"] or "{}")
    evaluation["job_seconds"] = status_seconds(files)
    path = add(record, name, evaluation)
    note_job(context, files)
    return {"path": str(path), **hands_on}
