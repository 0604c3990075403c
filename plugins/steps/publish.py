"""Publishes the model: merges it on the cluster and, if the recipe says so, fetches it.

Before that it decides whether the model is recommended; after that the model is champion or candidate.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import Context

from fastcpt.files import HOME
from fastcpt.recipe import Recipe
from notifications import tell_changes
from remote_job import RemoteJob, remote_of
from steps.results import Files, Published, result_of, result_or_none, trained_by
from steps.run import planned_recipe, start_of_run
from steps.training import gated, homes_of, host_of, job_of_run, note_job, training_of

if TYPE_CHECKING:
    from fastcpt.cluster.remote import Remote


def publish(context: Context) -> RemoteJob:
    """The job that writes a folder for transformers, with a model card of the run's figures."""
    from fastcpt.cluster.transfer import files_of, send
    from fastcpt.training import commands
    from fastcpt.training.card import FACTS, read_facts
    from fastcpt.training.made_from import publication_name

    plan, places = result_of(context, "plan"), result_of(context, "sync")
    recipe, record = planned_recipe(plan), Path(plan["record"])
    model = trained_by(context, "train_sft")["model"]
    _decide(record, recipe, training_of(model))
    name = publication_name(recipe, read_facts(record), training_of(model))
    # in a separate folder, as the run's folder may have files of an earlier attempt
    facts = [f"{fact}.json" for fact in FACTS if (record / f"{fact}.json").is_file()]
    sent = send(
        remote_of(recipe.cluster.connection),
        record,
        f"{places['run']}/{name}",
        files_of(record, ["recipe.yaml", *facts]),
    )
    output = f"{places['root']}/published/{recipe.name}-{name}"
    merge = commands.publish_command(
        host_of(places), model=model, record=sent["path"], output=output
    )
    return job_of_run(
        context, [merge], f"{output}/README.md", {"published": output, "digest": name}
    )


def _decide(record: Path, recipe: Recipe, training: str) -> None:
    """Write ``decision.json`` into the record; a known model keeps its decision."""
    from fastcpt.held_out import HeldOutError, trained_and_held_out
    from fastcpt.registry.champion import champion, evaluation_of, models
    from fastcpt.registry.conditions import recommend
    from fastcpt.reporting.record import add, read_last

    known, best = models(HOME, recipe.name), champion(HOME, recipe.name)
    same = [facts["decision"] for facts in known.values() if facts["training"] == training]
    if same:
        add(record, "decision.json", same[-1])
        return
    trained_on: int | None = 0
    compared = None
    if best is not None:
        before = known[best].get("corpora", [known[best]["corpus"]])
        corpora = [*_corpora(record), *before]
        try:
            trained_on = trained_and_held_out(HOME, recipe.name, corpora)
        except HeldOutError as error:
            print(error)
            trained_on = None
        compared = {"model": best, "evaluation": evaluation_of(HOME, recipe.name, best)}
    gate, evaluation = read_last(record, "gate"), read_last(record, "evaluation")
    add(record, "decision.json", recommend(recipe.publish, gate, evaluation, compared, trained_on))


def _corpora(record: Path) -> list[str]:
    """All corpora that the run's model was trained on, the oldest first."""
    from fastcpt.reporting.record import read

    start = start_of_run(record)
    return [*(start["corpora"] if start else ()), read(record, "outputs/build.json")["digest"]]


def _take_in(context: Context, recipe: Recipe, record: Path, path: str, folder: str) -> str:
    """Make the published model champion or candidate, and send a message once; the result in words."""
    from fastcpt.registry.champion import add_model
    from fastcpt.reporting.record import read, read_last

    decision, name, start = read(record, "decision.json"), Path(folder).name, start_of_run(record)
    facts = {
        "run": context["run_id"],
        "record": record.name,
        "path": path,
        "training": training_of(trained_by(context, "train_sft")["model"]),
        "before_sft": training_of(gated(context)["model"]),
        "corpus": read(record, "outputs/build.json")["digest"],
        "corpora": _corpora(record),
        "gone_on_from": start["model"] if start else None,
        "decision": decision,
    }
    standing = add_model(HOME, recipe.name, name, facts, read_last(record, "evaluation"))
    print(standing)
    tell_changes(context, recipe.name)
    return standing


def _bring_before_sft(remote: Remote, model: str) -> None:
    """Bring the model as it was before fine-tuning here, as its host goes: a later run begins with it."""
    from fastcpt.cluster.transfer import fetch
    from fastcpt.registry.start import brought

    here = brought(HOME, training_of(model))
    if not here.is_dir():
        partial = here.with_name(f".{here.name}.partial")
        fetch(remote, model, partial)
        partial.rename(here)


def keep_published(context: Context, files: Files, hands_on: Published) -> dict[str, Any]:
    """Fetch the published model, or leave it on the cluster, as the recipe says."""
    from fastcpt.cluster.checkpoints import forget
    from fastcpt.cluster.transfer import fetch
    from fastcpt.reporting.record import add_output

    plan, began = result_of(context, "plan"), time.time()
    recipe, record, folder = planned_recipe(plan), Path(plan["record"]), hands_on["published"]
    if recipe.cluster.rent and recipe.recurring.start == "champion":
        _bring_before_sft(remote_of(recipe.cluster.connection), gated(context)["model"])
    if recipe.publish.destination == "bring_back":
        remote = remote_of(recipe.cluster.connection)
        answer = fetch(remote, folder, HOME / "models" / Path(folder).name)
        for task in ("train_cpt", "train_cpt_stage2", "train_sft"):
            if (trained := result_or_none(context, task)) and "model" in trained:
                forget(*homes_of(recipe, str(Path(trained["model"]).parent)))
    else:
        answer = {"path": f"{recipe.cluster.connection}:{folder}"}
    answer["digest"] = hands_on["digest"]
    answer["standing"] = _take_in(context, recipe, record, answer["path"], folder)
    add_output(record, "publish", answer)
    note_job(context, files, began)
    return answer
