"""What each task of the DAG does: the library's rooms, called with what the tasks before left.

A step gets paths and digests (XComs) and returns the same; what it makes lies in folders named
by digest. Heavy imports stay inside the steps: this module is loaded at every parse of the DAG.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from airflow.sdk import Context, Variable, get_current_context

from fastcpt.files import HOME, digest_of, read_json
from fastcpt.recipe import Recipe, RecipeError, load_recipe
from fastcpt.recipe_form import form_overrides
from fastcpt.recipe_sections import CONFIGS
from notifications import AlreadyTold, tell
from remote_job import RemoteJob, connection_of, remote_of

REPOSITORY = Path(__file__).resolve().parents[1]
# Airflow maps at most 1024 tasks, and fewer, larger groups of files cost less to start: this much
# text takes about as long as a task's start.
MOST_GROUPS, GROUP_BYTES = 64, 4_000_000

P = ParamSpec("P")
Answer = TypeVar("Answer")
Facts = dict[str, Any]
Files = dict[
    str, str | None
]  # what a job left, by its name in ``RemoteJob.fetch``; None: not there


def recipe_of(plan: Facts) -> Recipe:
    """The run's recipe as ``plan`` resolved it."""
    return load_recipe(plan["recipe"])


def _result(context: Context, task: str) -> Any:
    """What a task before this one returned; None where it did not run."""
    return context["ti"].xcom_pull(task_ids=task)


def _brief(facts: Facts) -> Facts:
    """The part of a room's answer that the next task needs: XComs stay small."""
    wanted = ("path", "digest", "reused", "documents", "tokens", "unreadable", "train", "held_out")
    return {key: facts[key] for key in wanted if key in facts}


def _noted(step: Callable[P, Answer]) -> Callable[P, Answer]:
    """The step, which leaves in the run's record when it worked."""

    @functools.wraps(step)
    def noted(*args: P.args, **kwargs: P.kwargs) -> Answer:
        began = time.time()
        answer = step(*args, **kwargs)
        context = get_current_context()
        _note(context, Path(_result(context, "plan")["record"]), began)
        return answer

    return noted


def _note(context: Context, record: Path, began: float) -> None:
    from fastcpt.reporting.record import add_time

    task = context["ti"]
    part = "" if task.map_index in (None, -1) else f"-{task.map_index}"
    add_time(record, f"{task.task_id}{part}", began, time.time())


# Before anything is spent


def plan() -> Facts:
    """Resolve recipe, form and connection; look at the documents; begin the run's record."""
    from fastcpt.corpus.documents import list_parts
    from fastcpt.gguf import base_folder
    from fastcpt.planning.history import FILE as HISTORY
    from fastcpt.planning.plan import estimated_tokens, require_fit
    from fastcpt.planning.plan import plan as make_plan
    from fastcpt.reporting.record import add, empty_record, open_record, record_folder

    context, began = get_current_context(), time.time()
    # a cleared run that this plan refuses has no model to show
    empty_record(record_folder(HOME, context["run_id"]))
    values = dict(context["params"])
    overrides = form_overrides(values)
    recipe = load_recipe(values["recipe"], overrides)
    extra = connection_of(recipe.cluster.connection).extra_dejson
    # where things are on a host is the host's business: its connection may say so
    for key in ("python", "root"):
        if extra.get(key):  # a field of the form that was left empty is there, too
            overrides[f"cluster.{key}"] = extra[key]
    if recipe.model.name_or_path:
        overrides["model.name_or_path"] = base_folder(recipe.model.name_or_path, HOME)
    recipe = load_recipe(values["recipe"], overrides)
    parts = list_parts(recipe.documents)
    if recipe.sft.instructions is None:
        print(
            "No instructions (sft.instructions): a model that passes the gate is published as it is."
        )
    started = context["dag_run"].start_date  # another one after a clear
    record = open_record(HOME, context["run_id"], context["dag"].dag_id, recipe, started)
    text_bytes = _text_bytes(parts)
    found = make_plan(recipe, estimated_tokens(text_bytes, recipe), None, HOME / HISTORY)
    add(record, "plan.json", found.to_json())
    command = _plan_command(record, found)
    print(found.text(command))
    if not values["run_even_if_plan_says_no"]:
        require_fit(found, command)
    groups = min(MOST_GROUPS, len(parts), 1 + text_bytes // GROUP_BYTES)
    _note(context, record, began)
    return {
        "recipe": str(record / "recipe.yaml"),
        "record": str(record),
        "parts": [parts[group::groups] for group in range(groups)],
    }


# Bytes of text in a byte of file, about: for a plan before any document is read.
PACKED = {".gz": 4, ".zst": 6, ".parquet": 4}


def _text_bytes(parts: list[str]) -> int:
    import fsspec

    total = 0
    for part in parts:
        system, name = fsspec.url_to_fs(part)
        total += system.size(name) * PACKED.get(Path(name).suffix, 1)
    return total


def final_plan(context: Context) -> Facts:
    """The plan again, now with the corpus that was built and the cluster that was found."""
    from fastcpt.planning.history import FILE as HISTORY
    from fastcpt.planning.plan import plan as make_plan
    from fastcpt.planning.plan import require_fit
    from fastcpt.reporting.record import add

    first, cluster = _result(context, "plan"), _result(context, "check_cluster")
    tokens = _result(context, "build")["corpus"]["tokens"]
    found = make_plan(recipe_of(first), tokens, cluster, HOME / HISTORY)
    path = add(Path(first["record"]), "plan.json", found.to_json())
    command = _plan_command(Path(first["record"]), found)
    print(found.text(command))
    if not context["params"]["run_even_if_plan_says_no"]:
        require_fit(found, command)
    return {"path": str(path), "text": found.text(command)}


def _plan_command(record: Path, found: Any) -> str:
    """What plans the run's recipe again from a shell, to write one of the alternatives."""
    words = (
        f"include/scripts/plan_run.py --config {record / 'recipe.yaml'} --cluster {found.cluster}"
    )
    return f"{words} --tokens {found.corpus_tokens}" if found.corpus_tokens else words


def list_documents(plan: Facts) -> list[list[str]]:
    """The groups of files that ``score`` and ``tokenize`` are mapped over."""
    parts: list[list[str]] = plan["parts"]
    return parts


# The corpus, on this machine or on workers that share HOME and the documents


def _processes(plan: Facts) -> int:
    """A mapped task's share of the cores: all of them where there is one group of files."""
    from fastcpt.corpus.processes import cores

    return max(1, cores() // len(plan["parts"]))


@_noted
def score(plan: Facts, parts: list[str]) -> list[Facts]:
    """Score the documents of a group of files."""
    from fastcpt.corpus.score import score_parts

    return [_brief(facts) for facts in score_parts(parts, recipe_of(plan), HOME, _processes(plan))]


@_noted
def select(plan: Facts, scores: list[list[Facts]]) -> Facts:
    """Decide which documents are taken, from the score tables alone; train the tokenizer on them."""
    from fastcpt.corpus.build import prepare_tokenizer
    from fastcpt.corpus.select import select as select_documents

    recipe = recipe_of(plan)
    tables = sorted(table["path"] for group in scores for table in group)
    selection = _brief(select_documents(tables, recipe, HOME))
    prepare_tokenizer(selection["path"], recipe, HOME)
    return selection


@_noted
def tokenize(plan: Facts, selection: Facts, parts: list[str]) -> Facts:
    """Tokenize the documents taken of a group of files."""
    from fastcpt.corpus.build import tokenize as tokenize_documents

    recipe, processes = recipe_of(plan), _processes(plan)
    return tokenize_documents(selection["path"], parts, recipe, HOME, processes)


@_noted
def build(plan: Facts, selection: Facts) -> Facts:
    """Pack the tokens of the documents taken; split the instructions."""
    from fastcpt.corpus.build import build as build_corpus
    from fastcpt.corpus.instructions import build_instructions
    from fastcpt.reporting.record import add, add_output

    recipe = recipe_of(plan)
    instructions = build_instructions(recipe, HOME)
    corpus = build_corpus(selection["path"], recipe, HOME)
    record = Path(plan["record"])
    add(record, "corpus_manifest.json", Path(corpus["path"]) / "corpus_manifest.json")
    add_output(record, "build", _brief(corpus))
    return {
        "corpus": _brief(corpus),
        "instructions": _brief(instructions) if instructions else None,
        "reused": corpus["reused"] and (instructions is None or instructions["reused"]),
    }


# The cluster


@_noted
def check_cluster(plan: Facts) -> Facts:
    """What the host is and has; everything that is missing in one message."""
    from fastcpt.cluster.check import check_cluster as check

    recipe = recipe_of(plan)
    return check(remote_of(recipe.cluster.connection), recipe.cluster)


def prepare_environment(context: Context) -> RemoteJob | Facts:
    """Ship the code; compare the host's packages with the pinned ones, or build them there."""
    from fastcpt.cluster import environment

    recipe = recipe_of(_result(context, "plan"))
    root = _result(context, "check_cluster")["root"]
    remote = remote_of(recipe.cluster.connection)
    code = environment.ship_code(remote, root, REPOSITORY)
    if recipe.cluster.python:
        python = environment.check_python(remote, recipe.cluster, REPOSITORY)
        return {"python": python, "code": code["path"], "reused": code["reused"]}
    folder = environment.environment_folder(recipe.cluster, root, REPOSITORY)
    return RemoteJob(
        recipe.cluster.connection,
        root,
        environment.build_commands(recipe.cluster, code["path"], folder),
        result=f"{folder}/complete",
        answer={"python": f"{folder}/bin/python", "code": code["path"], "reused": False},
        alone="no",
    )


@_noted
def sync(plan: Facts, built: Facts, cluster: Facts, environment: Facts) -> Facts:
    """Bring corpus, instructions and recipe to the cluster; digests are verified there."""
    from fastcpt.cluster.transfer import files_of, send, send_base_model
    from fastcpt.reporting.record import add_output
    from fastcpt.training.made_from import tokenizer_digest

    recipe, root = recipe_of(plan), cluster["root"]
    remote = remote_of(recipe.cluster.connection)
    corpus, instructions = built["corpus"], built["instructions"]
    listed = read_json(Path(corpus["path"]) / "corpus_manifest.json")["files"]
    manifest = files_of(Path(corpus["path"]), ["corpus_manifest.json"])
    sent = send(
        remote,
        Path(corpus["path"]),
        f"{root}/corpora/{corpus['digest']}",
        [*listed, *manifest],
    )
    places = {
        **environment,
        "root": root,
        "corpus": sent["path"],
        "corpus_digest": corpus["digest"],
        "tokenizer_digest": tokenizer_digest(listed),
        "base_model": send_base_model(remote, recipe.model.name_or_path, root),
        "instructions": None,
        "reused": sent["reused"],
        "sent_bytes": sent["bytes"],
        "seconds": sent["seconds"],
    }
    if instructions:
        folder = f"{root}/instructions/{instructions['digest']}"
        source = Path(instructions["path"])
        sft = send(remote, source, folder, read_json(source / "manifest.json")["files"])
        places |= {"instructions": sft["path"], "instructions_digest": instructions["digest"]}
        places["reused"] = places["reused"] and sft["reused"]
    record = Path(plan["record"])
    run = send(remote, record, f"{root}/runs/{record.name}", files_of(record, ["recipe.yaml"]))
    places["run"] = run["path"]
    add_output(record, "sync", {"path": sent["path"], "digest": corpus["digest"], **sent})
    return places


# Training and evaluation, on the cluster


def _job(
    context: Context, commands: list[list[str]], result: str, hands_on: Facts, **fetch: str
) -> RemoteJob:
    """A job of the run; ``hands_on`` is what its answer has for later tasks: paths on the cluster."""
    from fastcpt.cluster.jobs import alone, job_name
    from fastcpt.training import commands as training

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    task = context["ti"]
    name = job_name(task.dag_id, task.run_id, task.task_id, task.map_index)
    fetch["status"] = f"{places['root']}/jobs/{name}/status.json"
    return RemoteJob(
        recipe.cluster.connection,
        places["root"],
        commands,
        environment=training.environment(
            recipe, _host(places), _price(recipe, _result(context, "check_cluster"))
        ),
        result=result,
        fetch=fetch,
        answer=hands_on,
        alone=alone(recipe.cluster),
        slurm=_slurm(recipe),
    )


def _slurm(recipe: Recipe) -> Facts | None:
    if recipe.cluster.launcher != "slurm":
        return None
    gpus = 0 if recipe.cluster.cpu_only else recipe.cluster.gpus
    return {**recipe.cluster.slurm.model_dump(), "gpus": gpus}


def _host(places: Facts) -> Any:
    from fastcpt.training.commands import Host

    return Host(places["python"], places["code"], f"{places['run']}/recipe.yaml")


def _port(output: str) -> int:
    """A port for the ranks' rendezvous, another for each job: below the ephemeral ones."""
    return 20_000 + int(digest_of(output), 16) % 10_000


def _trained(context: Context, task: str) -> Facts:
    """What a training handed on: ``model``, its final folder on the cluster, among its totals."""
    found: Facts = _result(context, task)
    if not found or "model" not in found:
        raise RecipeError(
            f"{task} of this run has not said where its model is: it was marked by hand, or done by an "
            f"older version. Clear {task} and what follows it"
        )
    return found


def _gated(context: Context) -> Facts:
    """The training whose model the gate let through, as the record tells: a branch hands on nothing."""
    record = Path(_result(context, "plan")["record"])
    if not (record / "gate.json").is_file():
        raise RecipeError(
            "the gate of this run has decided nothing: clear gate and what follows it"
        )
    gate = read_json(record / "gate.json")
    return _trained(context, "train_cpt" if gate["passed"] else "train_cpt_stage2")


def _name_of(model: str) -> str:
    """The name of a training: its output folder's, which holds ``final``."""
    return Path(model).parent.name


def train_cpt(context: Context) -> RemoteJob:
    """Stage 1, from the base model."""
    from fastcpt.training import commands, made_from

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    host, folder = _host(places), f"{places['root']}/models"
    base = places.get("base_model") or made_from.base_name(recipe, places["tokenizer_digest"])
    name = made_from.training_name(
        recipe,
        recipe.training,
        model=base.removeprefix(f"{places['root']}/"),  # which may be moved as a whole
        data={"corpus": places["corpus_digest"]},
        deepspeed=CONFIGS,
    )
    if recipe.model.config is not None:
        base = f"{folder}/{base}"
    output = f"{folder}/{name}"
    train = commands.train_cpt(
        recipe,
        host,
        _port(output),
        corpus=places["corpus"],
        model=base,
        output=output,
        stage="stage1",
    )
    initialise = commands.initialise(recipe, host, places["corpus"], base)
    return _training(context, [*initialise, train], output, base)


def train_cpt_stage2(context: Context) -> RemoteJob:
    """Stage 2, from stage 1's final checkpoint."""
    from fastcpt.training import commands, made_from

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    before = _trained(context, "train_cpt")
    name = made_from.training_name(
        recipe,
        recipe.stage2,
        model=_name_of(before["model"]),
        data={"corpus": places["corpus_digest"]},
        deepspeed=CONFIGS,
    )
    output = f"{places['root']}/models/{name}"
    train = commands.train_cpt(
        recipe,
        _host(places),
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
    hands_on = {"model": f"{output}/final", **({"base_model": base} if base else {})}
    result, metrics = f"{output}/training.json", f"{output}/metrics.jsonl"
    return _job(context, commands, result, hands_on, metrics=metrics)


def _evaluate(context: Context, trained: Facts, base_evaluation: str | None = None) -> RemoteJob:
    from fastcpt.training import commands, made_from

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    model, base = trained["model"], trained["base_model"]
    of = base.removeprefix(f"{places['root']}/")
    name = made_from.evaluation_name(recipe, base=of, corpus=places["corpus_digest"])
    result = f"{Path(model).parent}/evaluation-{name}.json"
    evaluate = commands.evaluate(
        recipe,
        _host(places),
        _port(result),
        corpus=places["corpus"],
        model=model,
        base=base,
        output=result,
        base_evaluation=base_evaluation,
    )
    return _job(context, [evaluate], result, {"evaluation": result})


def evaluate_cpt(context: Context) -> RemoteJob:
    """Perplexity of stage 1's model and of the base model."""
    return _evaluate(context, _trained(context, "train_cpt"))


def evaluate_stage2(context: Context) -> RemoteJob:
    """Perplexity of stage 2's model, beside the base model's as ``evaluate_cpt`` found it."""
    before = _result(context, "evaluate_cpt").get("evaluation")
    return _evaluate(context, _trained(context, "train_cpt_stage2"), before)


def train_sft(context: Context) -> RemoteJob | Facts:
    """Fine-tune the model that passed the gate on the instructions."""
    from fastcpt.training import commands, made_from

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    before = _gated(context)["model"]
    if places["instructions"] is None:
        return {"model": before, "skipped": "the recipe has no instructions"}
    name = made_from.training_name(
        recipe,
        recipe.sft.training,
        model=_name_of(before),
        data={"instructions": places["instructions_digest"]},
        deepspeed=CONFIGS,
    )
    output = f"{places['root']}/models/{name}"
    train = commands.train_sft(
        recipe,
        _host(places),
        _port(output),
        instructions=places["instructions"],
        model=before,
        output=output,
    )
    return _training(context, [train], output)


def evaluate_sft(context: Context) -> RemoteJob | Facts:
    """ROUGE-L and citation accuracy on the held-out instructions."""
    from fastcpt.training import commands, made_from

    recipe, places = recipe_of(_result(context, "plan")), _result(context, "sync")
    if places["instructions"] is None:
        return {"skipped": "the recipe has no instructions"}
    model = _trained(context, "train_sft")["model"]
    name = made_from.answers_name(recipe, instructions=places["instructions_digest"])
    result = f"{Path(model).parent}/evaluation_sft-{name}.json"
    evaluate = commands.evaluate_sft(
        recipe,
        _host(places),
        _port(result),
        instructions=places["instructions"],
        model=model,
        output=result,
    )
    return _job(context, [evaluate], result, {"evaluation": result})


def publish(context: Context) -> RemoteJob:
    """A folder that transformers loads, with a model card of the run's own figures."""
    from fastcpt.cluster.transfer import files_of, send
    from fastcpt.training import commands
    from fastcpt.training.card import FACTS, read_facts
    from fastcpt.training.made_from import publication_name

    plan, places = _result(context, "plan"), _result(context, "sync")
    recipe, record = recipe_of(plan), Path(plan["record"])
    model = _trained(context, "train_sft")["model"]
    name = publication_name(recipe, read_facts(record), _name_of(model))
    # a folder of their own: of an earlier pass of the run others may lie in the run's
    facts = [f"{fact}.json" for fact in FACTS if (record / f"{fact}.json").is_file()]
    sent = send(
        remote_of(recipe.cluster.connection),
        record,
        f"{places['run']}/{name}",
        files_of(record, ["recipe.yaml", *facts]),
    )
    output = f"{places['root']}/published/{recipe.name}-{name}"
    merge = commands.publish(_host(places), model=model, record=sent["path"], output=output)
    return _job(context, [merge], f"{output}/README.md", {"published": output, "digest": name})


def secrets(context: Context) -> dict[str, str]:
    """The hub token (Airflow variable ``hf_token``), for gated base models; reaches the job alone."""
    token = Variable.get("hf_token", default=None)
    return {"HF_TOKEN": token} if token else {}


# What a remote task answers, and what it leaves in the record


def keep_training(context: Context, files: Files, hands_on: Facts) -> Facts:
    """A training's totals and curve go into the record; the totals are the answer, with the model.

    The record has ``job_seconds`` too: what the job took in this run, None where it was found done.
    """
    from fastcpt.reporting.record import add, add_text

    record, name = Path(_result(context, "plan")["record"]), context["ti"].task_id
    totals: Facts = json.loads(files["result"] or "{}")
    if files.get("metrics"):
        add_text(record, f"{name}/metrics.jsonl", files["metrics"])
    add(record, f"{name}/training.json", {**totals, "job_seconds": _job_seconds(files)})
    _note_job(context, files)
    return {**totals, **hands_on}


def _note_job(context: Context, files: Files, ended: float | None = None) -> None:
    """When a job worked: by this machine's clock, which it ended about now."""
    seconds, ended = _job_seconds(files) or 0.0, ended or time.time()
    _note(context, Path(_result(context, "plan")["record"]), ended - seconds)


def _job_seconds(files: dict[str, str | None]) -> float | None:
    status: Facts = json.loads(files.get("status") or "{}")
    seconds: float | None = status.get("seconds")
    return seconds


def keep_evaluation(context: Context, files: Files, hands_on: Facts) -> Facts:
    """An evaluation goes into the record whole; the answer is where it is, here and there."""
    from fastcpt.reporting.record import add

    record = Path(_result(context, "plan")["record"])
    name = {
        "evaluate_cpt": "evaluation.json",
        "evaluate_stage2": "evaluation_stage2.json",
        "evaluate_sft": "evaluation_sft.json",
    }[context["ti"].task_id]
    evaluation: Facts = json.loads(files["result"] or "{}")
    evaluation["job_seconds"] = _job_seconds(files)
    _note_job(context, files)
    return {"path": str(add(record, name, evaluation)), **hands_on}


def keep_published(context: Context, files: Files, hands_on: Facts) -> Facts:
    """The published model is brought back, or left on the cluster, as the recipe says."""
    from fastcpt.cluster.transfer import fetch
    from fastcpt.reporting.record import add_output

    plan, began = _result(context, "plan"), time.time()
    recipe, folder = recipe_of(plan), hands_on["published"]
    if recipe.publish.destination == "bring_back":
        remote = remote_of(recipe.cluster.connection)
        answer = fetch(remote, folder, HOME / "models" / Path(folder).name)
    else:
        answer = {"path": f"{recipe.cluster.connection}:{folder}"}
    answer["digest"] = hands_on["digest"]
    add_output(Path(plan["record"]), "publish", answer)
    _note_job(context, files, began)
    return answer


# The gate


def _decide(context: Context, evaluation: str, gate: str, missed: str) -> Facts:
    """The gate's decision, kept in the record; ``missed`` is what follows from a miss."""
    from fastcpt.reporting.gate import decide
    from fastcpt.reporting.record import add

    plan = _result(context, "plan")
    settings, record = recipe_of(plan).gate, Path(plan["record"])
    decision = decide(
        read_json(record / evaluation), settings.perplexity_threshold, settings.validation_set
    )
    add(record, gate, decision)
    relation = "below" if decision["passed"] else "not below"
    found = (
        f"validation perplexity {decision['value']:.3f} ({decision['validation_set']}), base model "
        f"{decision['base_value'] or float('nan'):.3f}: {relation} the gate's {decision['threshold']:g}"
    )
    print(found)
    if not decision["passed"]:
        tell(context, "gate missed", f"{found}. {missed}")
    return decision


class GateMissed(RecipeError, AlreadyTold):
    """The gate was missed and there is no further stage."""


def gate() -> str:
    """Perplexity below the recipe's threshold goes on to fine-tuning, else to stage 2."""
    context = get_current_context()
    decision = _decide(context, "evaluation.json", "gate.json", "Stage 2 begins.")
    return "train_sft" if decision["passed"] else "train_cpt_stage2"


def gate_stage2() -> Facts:
    """The same rule after stage 2; a model that still misses it goes no further."""
    context = get_current_context()
    decision = _decide(
        context,
        "evaluation_stage2.json",
        "gate_stage2.json",
        "That was stage 2: the run ends here.",
    )
    if not decision["passed"]:
        raise GateMissed(
            f"validation perplexity is {decision['value']:.2f} after stage 2, not below "
            f"{decision['threshold']:g} (gate.perplexity_threshold). Try more steps "
            "(stage2.max_steps) or a higher stage2.learning_rate, more documents "
            "(selection.target_tokens, a lower quality_threshold), a stronger base model, or another "
            f"threshold. The model is kept: {_trained(context, 'train_cpt_stage2')['model']} on the "
            "cluster"
        )
    return decision


# The end


class RunFailed(ValueError, AlreadyTold):
    """What the run came to: the last task fails with it, and so the run. Who failed has said so."""


def report() -> Facts:
    """Close the run's record, whatever became of the run, and write its report.

    ``RunFailed`` where the run did not succeed: this task's end is the run's.
    """
    from fastcpt.planning.history import compare, record_run
    from fastcpt.reporting.record import add, add_cost, close_record, read, took
    from fastcpt.reporting.report import write_report

    context = get_current_context()
    run, dag = context["run_id"], context["dag"].dag_id
    states = context["ti"].get_task_states(dag, run_ids=[run])[run]
    plan = _result(context, "plan")
    if plan is None:
        print("The run ended before it had a record: the log of `plan` says why.")
        # `success` without a result: the run was marked as successful while `plan` ran
        _require_success(states, states["plan"])
        return {}
    record, recipe = Path(plan["record"]), recipe_of(plan)
    cluster = _result(context, "check_cluster")
    evaluations = {"train_cpt": "evaluation.json", "train_cpt_stage2": "evaluation_stage2.json"}
    for training, evaluation in evaluations.items():
        totals = read(record, f"{training}/training.json")
        if totals.get("job_seconds"):  # not one that an earlier run had done
            seconds = read(record, evaluation).get("job_seconds")
            record_run(HOME, f"{run}/{training}", recipe, cluster, totals, seconds)
    add_cost(record, recipe.cluster.gpus, _price(recipe, cluster))
    compared = compare(read(record, "plan.json"), took(record, recipe.cluster.gpus))
    add(record, "plan_and_actual.json", {"rows": compared})
    outcome = read(record, "run.json").get("marked") or _outcome(states)
    close_record(record, outcome)
    written = str(write_report(record))
    _require_success(states, outcome)
    return {"report": written, "state": outcome}


def _outcome(states: dict[str, str]) -> str:
    """``success`` where a model was published and nothing failed; ``failed`` otherwise."""
    failed = any(state in ("failed", "upstream_failed") for state in states.values())
    return "failed" if failed or states["publish"] != "success" else "success"


def _require_success(states: dict[str, str], outcome: str) -> None:
    if outcome != "success":
        failed = sorted(task for task, state in states.items() if state == "failed")
        why = f"{', '.join(failed)} failed" if failed else "it was marked as failed"
        raise RunFailed(f"the run did not succeed: {why}")


def _price(recipe: Recipe, cluster: Facts | None) -> float | None:
    """USD for a GPU hour: the recipe's, or the table's for the GPUs that were found."""
    from fastcpt.planning.hardware import hardware_of

    if recipe.cluster.cpu_only or recipe.budget.price_per_gpu_hour is not None:
        return recipe.budget.price_per_gpu_hour
    gpu = hardware_of(recipe.cluster, cluster).gpu
    return gpu.usd_hour if gpu else None
