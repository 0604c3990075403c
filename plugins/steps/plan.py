"""The plan: before anything is spent, and again with the actual corpus and cluster."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from airflow.sdk import Context, get_current_context
from airflow.sdk.exceptions import AirflowSkipException

from fastcpt.files import HOME, read_json
from fastcpt.gate import base_passes
from fastcpt.manifests import CorpusManifest
from fastcpt.recipe import Recipe, RecipeError, load_recipe
from fastcpt.recipe_form import form_overrides, given_overrides
from fastcpt.recurring import Start, share_of_all
from remote_job import RENTED, connection_of
from steps.rent import as_offered, note_spending
from steps.results import Plan, result_of
from steps.run import note, planned_recipe, price_of

if TYPE_CHECKING:
    from fastcpt.corpus.new_documents import State
    from fastcpt.planning.result import Plan as Planned

# Airflow maps at most 1024 tasks, and fewer, larger groups of files have less overhead: this much text
# takes about as long as starting a task.
MOST_GROUPS, GROUP_BYTES = 64, 4_000_000


def plan() -> Plan:
    """Resolve recipe, form and connection; list the documents; open the run's record."""
    from fastcpt.corpus.documents import list_parts
    from fastcpt.corpus.new_documents import state_of, text_bytes
    from fastcpt.corpus.sample import sample_overrides
    from fastcpt.gguf import base_folder
    from fastcpt.planning.plan import require_fit
    from fastcpt.registry.start import start_of
    from fastcpt.reporting.record import add, empty_record, open_record, record_folder

    context, began = get_current_context(), time.time()
    # if this plan refuses a cleared run, its record must not show the old model
    empty_record(record_folder(HOME, context["run_id"]))
    values = dict(context["params"])
    overrides = {**given_overrides(values), **form_overrides(values)}
    overrides = sample_overrides(values["recipe"], overrides, HOME)
    recipe = load_recipe(values["recipe"], overrides)
    login = recipe.cluster.connection
    overrides |= _of_the_host(recipe, context)
    if recipe.model.name_or_path:
        overrides["model.name_or_path"] = base_folder(recipe.model.name_or_path, HOME)
    recipe = load_recipe(values["recipe"], overrides)
    parts = list_parts(recipe.documents)
    if recipe.sft.instructions is None:
        print(
            "No instructions (sft.instructions): a model that passes the gate is published as it is."
        )
    started = context["dag_run"].start_date  # changes after a clear
    record = open_record(HOME, context["run_id"], context["dag"].dag_id, recipe, started)
    source = Path(recipe.model.name_or_path or "") / "gguf.json"
    if source.is_file():  # the model card names the base model's GGUF file
        add(record, source.name, read_json(source))
    documents = state_of(parts)
    note_spending(record, context["dag"].dag_id, context["run_id"])
    add(record, "documents.json", documents)  # later runs compare with it to find new documents
    start = start_of(recipe, HOME)
    add(record, "start.json", start or {})
    found = _with_note_on_gate(_first_plan(recipe, documents, start), recipe)
    add(record, "plan.json", found.to_json())
    command = _plan_command(record, found)
    print(found.text(command))
    if not values["run_even_if_plan_says_no"]:
        require_fit(found, command)
    groups = min(MOST_GROUPS, len(parts), 1 + text_bytes(documents) // GROUP_BYTES)
    note(context, record, began)
    return {
        "recipe": str(record / "recipe.yaml"),
        "record": str(record),
        "parts": [parts[group::groups] for group in range(groups)],
        "login": login,
    }


def _first_plan(recipe: Recipe, documents: State, start: Start | None) -> Planned:
    """The plan by the documents' bytes alone, and where training begins in a line."""
    from fastcpt.corpus.new_documents import arrived, text_bytes
    from fastcpt.planning.history import FILE as HISTORY
    from fastcpt.planning.plan import estimated_tokens, plan_going_on
    from fastcpt.planning.plan import plan as make_plan

    tokens = estimated_tokens(text_bytes(documents), recipe)
    if start is None:
        if recipe.recurring.start == "champion":
            print(
                f"Recipe '{recipe.name}' has no champion yet: training begins with the base model."
            )
        return make_plan(recipe, tokens, None, HOME / HISTORY)
    new = arrived(read_json(HOME / "runs" / start["record"] / "documents.json"), documents)
    if not new:
        raise AirflowSkipException(
            f"no document is new since champion {start['model']} was trained"
        )
    read = estimated_tokens(text_bytes(new), recipe) / (1 - recipe.recurring.replay)
    read = max(1, min(tokens, math.ceil(read)))
    print(f"Training goes on from champion {start['model']}, on what is new and a replay.")
    return plan_going_on(recipe, read, read / tokens, None, HOME / HISTORY)


def _of_the_host(recipe: Recipe, context: Context) -> dict[str, Any]:
    """Overrides from the recipe's connection, or the name of the run's rented host."""
    from fastcpt.rent.ledger import name_of_run

    login = recipe.cluster.connection
    extra = connection_of(login, with_host=recipe.cluster.rent is None).extra_dejson
    if login.startswith(RENTED):
        raise RecipeError(
            f"cluster.connection: a name that begins with {RENTED} is a rented host's"
        )
    # paths on the host belong to the connection; the connection form also leaves empty fields
    overrides = {f"cluster.{key}": extra[key] for key in ("python", "root") if extra.get(key)}
    if recipe.cluster.rent:
        ids = context["dag"].dag_id, context["run_id"]
        overrides["cluster.connection"] = f"{RENTED}{name_of_run(*ids)}"
        overrides |= as_offered(recipe, *ids)
    return overrides


class FinalPlan(TypedDict):
    """The plan's file in the record, and the plan as text."""

    path: str
    text: str


def final_plan(context: Context) -> FinalPlan:
    """Plan again with the corpus that was built and the cluster that was found."""
    from fastcpt.planning.history import FILE as HISTORY
    from fastcpt.planning.plan import plan as make_plan
    from fastcpt.planning.plan import plan_going_on, require_fit
    from fastcpt.reporting.record import add, read

    first = result_of(context, "plan")
    recipe = planned_recipe(first)
    cluster = None if recipe.cluster.rent else result_of(context, "check_cluster")
    tokens = result_of(context, "build")["corpus"]["tokens"]
    corpus = cast(CorpusManifest, read(Path(first["record"]), "corpus_manifest.json"))
    if corpus.get("gone_on"):
        share = share_of_all(corpus)
        found = plan_going_on(recipe, tokens, share, cluster, HOME / HISTORY)
    else:
        found = make_plan(recipe, tokens, cluster, HOME / HISTORY)
    found = _with_note_on_gate(found, recipe)
    if recipe.cluster.rent:
        found = _with_note_on_waiting(found, recipe, context["dag_run"].start_date)
    path = add(Path(first["record"]), "plan.json", found.to_json())
    command = _plan_command(Path(first["record"]), found)
    print(found.text(command))
    if not context["params"]["run_even_if_plan_says_no"]:
        require_fit(found, command)
    return {"path": str(path), "text": found.text(command)}


def _with_note_on_gate(found: Planned, recipe: Recipe) -> Planned:
    """The plan, with a note if the base model passed the recipe's gate in an earlier run."""
    from fastcpt.reporting.record import last_gate

    before = last_gate(HOME, recipe.model.name_or_path, recipe.gate.validation_set)
    note = base_passes(before.get("base_value"), recipe.gate.perplexity_threshold)
    return replace(found, notes=(*found.notes, note)) if note else found


def _with_note_on_waiting(found: Planned, recipe: Recipe, began: datetime) -> Planned:
    """The plan, with a note on what renting the machine from the run's start would have cost."""
    hours = (datetime.now(UTC) - began).total_seconds() / 3600
    price = price_of(recipe, None)
    words = (
        f"the machine is rented now: while the corpus was made, {hours:.1f} h, it would have waited"
    )
    if price is not None:
        words += f" for {hours * price * recipe.cluster.gpus:,.2f} USD"
    return replace(found, notes=(*found.notes, words))


def _plan_command(record: Path, found: Planned) -> str:
    """The shell command that plans the run's recipe again, to write one of the alternatives."""
    words = (
        f"{sys.executable} include/scripts/plan_run.py --config {record / 'recipe.yaml'} "
        f"--cluster {found.cluster}"
    )
    return f"{words} --tokens {found.corpus_tokens}" if found.corpus_tokens else words


def list_documents(plan: Plan) -> list[list[str]]:
    """The groups of files that ``score`` and ``tokenize`` are mapped over."""
    return plan["parts"]
