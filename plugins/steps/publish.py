"""The model that is published: merged on the cluster, brought back where the recipe says so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from airflow.sdk import Context

from fastcpt.files import HOME
from remote_job import RemoteJob, remote_of
from steps.results import Files, Published, result_of, result_or_none, trained_by
from steps.run import recipe_of
from steps.training import home_of, host_of, job_of_run, name_of, note_job


def publish(context: Context) -> RemoteJob:
    """A folder that transformers loads, with a model card of the run's own figures."""
    from fastcpt.cluster.transfer import files_of, send
    from fastcpt.training import commands
    from fastcpt.training.card import FACTS, read_facts
    from fastcpt.training.made_from import publication_name

    plan, places = result_of(context, "plan"), result_of(context, "sync")
    recipe, record = recipe_of(plan), Path(plan["record"])
    model = trained_by(context, "train_sft")["model"]
    name = publication_name(recipe, read_facts(record), name_of(model))
    # a folder of their own: of an earlier pass of the run others may lie in the run's
    facts = [f"{fact}.json" for fact in FACTS if (record / f"{fact}.json").is_file()]
    sent = send(
        remote_of(recipe.cluster.connection),
        record,
        f"{places['run']}/{name}",
        files_of(record, ["recipe.yaml", *facts]),
    )
    output = f"{places['root']}/published/{recipe.name}-{name}"
    merge = commands.publish(host_of(places), model=model, record=sent["path"], output=output)
    return job_of_run(
        context, [merge], f"{output}/README.md", {"published": output, "digest": name}
    )


def keep_published(context: Context, files: Files, hands_on: Published) -> dict[str, Any]:
    """The published model is brought back, or left on the cluster, as the recipe says."""
    from fastcpt.cluster.checkpoints import forget
    from fastcpt.cluster.transfer import fetch
    from fastcpt.reporting.record import add_output

    plan, began = result_of(context, "plan"), time.time()
    recipe, folder = recipe_of(plan), hands_on["published"]
    if recipe.publish.destination == "bring_back":
        remote = remote_of(recipe.cluster.connection)
        answer = fetch(remote, folder, HOME / "models" / Path(folder).name)
        for task in ("train_cpt", "train_cpt_stage2", "train_sft"):
            if (trained := result_or_none(context, task)) and "model" in trained:
                forget(home_of(recipe, str(Path(trained["model"]).parent)))
    else:
        answer = {"path": f"{recipe.cluster.connection}:{folder}"}
    answer["digest"] = hands_on["digest"]
    add_output(Path(plan["record"]), "publish", answer)
    note_job(context, files, began)
    return answer
