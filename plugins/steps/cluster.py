"""The cluster: checks it, prepares its environment, and sends the run's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import Context, Variable

from fastcpt.files import HOME, read_json
from fastcpt.manifests import CorpusManifest
from fastcpt.recurring import Start
from remote_job import RemoteJob, remote_of
from steps.results import Built, Environment, HostFacts, Places, Plan, result_of
from steps.run import noted, planned_recipe, start_of_run

if TYPE_CHECKING:
    from fastcpt.cluster.remote import Remote

REPOSITORY = Path(__file__).resolve().parents[2]


LATER = "The host is rented when the plan is approved: acquire_cluster and prepare_rented do this."


@noted
def check_cluster(plan: Plan) -> HostFacts | None:
    """The host's facts, or one error with everything that is missing."""
    from fastcpt.cluster.check import check_cluster as check

    recipe = planned_recipe(plan)
    if recipe.cluster.rent:
        print(LATER)
        return None
    return cast(HostFacts, check(remote_of(recipe.cluster.connection), recipe.cluster))


def prepare_environment(context: Context) -> RemoteJob | Mapping[str, Any]:
    """``environment_of`` for a host that is not rented."""
    if planned_recipe(result_of(context, "plan")).cluster.rent:
        print(LATER)
        return {}
    return environment_of(context)


def environment_of(context: Context) -> RemoteJob | Environment:
    """Ship the code; compare the host's packages with the pinned ones, or build them there."""
    from fastcpt.cluster import environment

    recipe = planned_recipe(result_of(context, "plan"))
    root = result_of(context, "check_cluster")["root"]
    remote = remote_of(recipe.cluster.connection)
    code = environment.ship_code(remote, root, REPOSITORY)
    if recipe.cluster.python:
        python = environment.check_python(remote, recipe.cluster, REPOSITORY)
        return {"python": python, "code": code["path"], "reused": code["reused"]}
    folder = environment.environment_folder(recipe, root, REPOSITORY)
    return RemoteJob(
        recipe.cluster.connection,
        root,
        environment.build_commands(recipe, root, code["path"], folder),
        result=f"{folder}/complete",
        answer={"python": f"{folder}/bin/python", "code": code["path"], "reused": False},
        alone="no",
    )


@noted
def sync(
    plan: Plan, built: Built, cluster: HostFacts | None, environment: Environment
) -> Places | None:
    """``bring`` for a host that is not rented."""
    if cluster is None:
        print(LATER)
        return None
    return send_inputs(plan, built, cluster, environment)


def send_inputs(plan: Plan, built: Built, cluster: HostFacts, environment: Environment) -> Places:
    """Send corpus, instructions and recipe to the cluster, which verifies their digests."""
    from fastcpt.cluster.transfer import files_of, send, send_base_model
    from fastcpt.reporting.record import add_output
    from fastcpt.training.made_from import tokenizer_digest

    recipe, root, record = planned_recipe(plan), cluster["root"], Path(plan["record"])
    remote = remote_of(recipe.cluster.connection)
    corpus, instructions = built["corpus"], built["instructions"]
    listed: CorpusManifest = read_json(Path(corpus["path"]) / "corpus_manifest.json")
    manifest = files_of(Path(corpus["path"]), ["corpus_manifest.json"])
    sent = send(
        remote,
        Path(corpus["path"]),
        f"{root}/corpora/{corpus['digest']}",
        [*listed["files"], *manifest],
    )
    run = send(remote, record, f"{root}/runs/{record.name}", files_of(record, ["recipe.yaml"]))
    places: Places = {
        "python": environment["python"],
        "code": environment["code"],
        "root": root,
        "run": run["path"],
        "corpus": sent["path"],
        "corpus_digest": corpus["digest"],
        "tokenizer_digest": tokenizer_digest(listed["files"]),
        "base_model": send_base_model(remote, recipe.model.name_or_path, root),
        "start": bring_start(remote, root, start_of_run(record)),
        "instructions": None,
        "reused": sent["reused"],
        "sent_bytes": sent["bytes"],
        "seconds": sent["seconds"],
    }
    if instructions:
        folder = f"{root}/instructions/{instructions['digest']}"
        source = Path(instructions["path"])
        sft = send(remote, source, folder, read_json(source / "manifest.json")["files"])
        places["instructions"] = sft["path"]
        places["instructions_digest"] = instructions["digest"]
        places["reused"] = places["reused"] and sft["reused"]
    add_output(record, "sync", {"path": sent["path"], "digest": corpus["digest"], **sent})
    return places


def bring_start(remote: Remote, root: str, start: Start | None) -> str | None:
    """Where the champion's weights before fine-tuning are on the host: brought from here, or made there.

    ``ClusterError`` where they are in neither place.
    """
    from fastcpt.cluster.remote import ClusterError, ask_through
    from fastcpt.cluster.transfer import files_of, send
    from fastcpt.registry.start import brought

    if start is None:
        return None
    here, made = brought(HOME, start["training"]), f"{root}/models/{start['training']}"
    if here.is_dir():
        os.utime(here)  # used: include/scripts/remove_unused.py
        sent = send(remote, here, f"{root}/before_sft/{here.name}", files_of(here))
        return str(sent["path"])
    paths = {"training": f"{made}/training.json"}
    if ask_through(remote, "read_files", paths=paths)["training"] is None:
        raise ClusterError(
            f"champion {start['model']} as it was before fine-tuning is neither in {made} on "
            f"{remote.host} nor in {here}: set recurring.start to base"
        )
    return f"{made}/final"


def secrets(context: Context) -> dict[str, str]:
    """The hub token (Airflow variable ``hf_token``) for gated base models; only the job gets it."""
    token = Variable.get("hf_token", default=None)
    return {"HF_TOKEN": token} if token else {}
