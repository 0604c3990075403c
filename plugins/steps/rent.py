"""The rented host: taken when the plan is approved, made ready, and given back whatever happens.

The ledger knows what a run has (``fastcpt.rent``). A recipe without ``cluster.rent`` has nothing to do here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import Context, get_current_context

from fastcpt.files import HOME
from fastcpt.recipe import Recipe
from remote_job import RemoteJob, remote_of
from steps.cluster import bring, environment_of
from steps.results import Environment, Files, HostFacts, Places, Plan, result_of, result_or_none
from steps.run import noted, recipe_of

if TYPE_CHECKING:
    from fastcpt.rent.ledger import Rental

# So long a machine that its provider calls ready may be silent.
SILENT_S = 900.0
# At least so long before the money is spent no job runs: the time is for the last checkpoint's way here.
RESERVE_S = 300.0
NOTHING = "cluster.connection names a host that is there: nothing is rented."


@noted
def acquire_cluster(plan: Plan) -> HostFacts | None:
    """Rent the run's machine, or find it; what it is and has. One that cannot take the run goes back."""
    from fastcpt.cluster.remote import ClusterError
    from fastcpt.rent import machines

    recipe, context = recipe_of(plan), get_current_context()
    if recipe.cluster.rent is None:
        print(NOTHING)
        return None
    ids = context["dag"].dag_id, context["run_id"]
    needs, money = _needs(recipe, plan), recipe.budget.money
    rental = machines.take(HOME, *ids, recipe.cluster.rent, needs, money, plan.get("login", ""))
    machine = rental.machine
    assert machine is not None
    print(f"{rental.key}: {machine.id} at {machine.host}, {machine.price_per_hour:g} USD an hour")
    try:
        if machine.gpus < recipe.cluster.gpus and not recipe.cluster.cpu_only:
            raise ClusterError(
                f"{machine.gpus} GPUs were rented, {recipe.cluster.gpus} were asked for"
            )
        facts = _checked(recipe)
        _watch(recipe, rental, facts["root"], _reserve_seconds(plan))
    except Exception as error:
        machines.give_back(HOME, *ids, f"it could not take the run: {error}")
        raise
    return facts


def _needs(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What the provider is asked for; hours are the plan's, None where it knows none."""
    from fastcpt.reporting.record import read

    cluster = recipe.cluster
    hours = read(Path(plan["record"]), "plan.json").get("hours") or {}
    return {
        "gpus": 0 if cluster.cpu_only else cluster.gpus,
        "gpu": None if cluster.cpu_only else cluster.gpu,
        "disk_gb": cluster.min_free_gb,
        "hours": hours.get("high"),
    }


def _checked(recipe: Recipe) -> HostFacts:
    """The machine's facts as soon as it answers."""
    from fastcpt.cluster.check import check_cluster
    from fastcpt.cluster.remote import ConnectionLost

    until = time.monotonic() + SILENT_S
    while True:
        try:
            return cast(
                HostFacts, check_cluster(remote_of(recipe.cluster.connection), recipe.cluster)
            )
        except ConnectionLost as error:
            if time.monotonic() > until:
                raise
            print(f"{error}; asking again")
            time.sleep(5)


def _reserve_seconds(plan: Plan) -> float:
    """What the plan keeps for saving the last checkpoint and bringing it here."""
    from fastcpt.reporting.record import read

    hours: float | None = read(Path(plan["record"]), "plan.json").get("reserve_hours")
    return RESERVE_S if hours is None else max(RESERVE_S, 3600 * hours)


def _watch(recipe: Recipe, rental: Rental, root: str, reserve_seconds: float) -> None:
    """Have the machine end itself where nobody else does (``cluster.jobs.watch``)."""
    from fastcpt.cluster import jobs
    from fastcpt.rent import ledger

    assert recipe.cluster.rent is not None
    assert rental.machine is not None
    rent = {
        "deadline_unix": ledger.deadline(ledger.of_run(HOME, rental.dag, rental.run), rental),
        "orphan_hours": recipe.cluster.rent.orphan_hours,
        "reserve_seconds": reserve_seconds,
        "release_command": rental.machine.release_command,
    }
    jobs.watch(remote_of(recipe.cluster.connection), root, rent)


def prepare_rented(context: Context) -> RemoteJob | Mapping[str, Any]:
    """Packages and code on the rented machine; corpus and recipe follow (``bring_to_rented``)."""
    if recipe_of(result_of(context, "plan")).cluster.rent is None:
        print(NOTHING)
        return {}
    wanted = environment_of(context)
    if isinstance(wanted, RemoteJob):
        return wanted
    return bring_to_rented(context, {}, wanted)


def bring_to_rented(context: Context, files: Files, environment: Environment) -> Places:
    plan, built = result_of(context, "plan"), result_of(context, "build")
    return bring(plan, built, result_of(context, "check_cluster"), environment)


def release_cluster() -> None:
    """Give the run's machine back, or keep it for a while where the run failed and the recipe says so."""
    from fastcpt.rent import ledger, machines
    from fastcpt.reporting.record import add

    context = get_current_context()
    run, dag = context["run_id"], context["dag"].dag_id
    if not ledger.of_run(HOME, dag, run):
        print(NOTHING)
        return
    plan: Plan | None = result_or_none(context, "plan")
    rent = recipe_of(plan).cluster.rent if plan else None
    states = context["ti"].get_task_states(dag, run_ids=[run])[run]
    if rent and rent.keep_minutes and states["publish"] != "success":
        machines.keep(HOME, dag, run, rent.keep_minutes)
        print(f"The machine is kept for {rent.keep_minutes:g} minutes: clear the step that failed.")
    else:
        machines.give_back(HOME, dag, run, "the run has ended")
    rentals = ledger.of_run(HOME, dag, run)
    spent = ledger.spent(rentals, time.time())
    if plan:
        told = [
            rental.model_dump(include={"key", "state", "why", "asked", "released"})
            for rental in rentals
        ]
        add(Path(plan["record"]), "rent.json", {"machines": told, "spent": spent})
    print(f"{len(rentals)} rented, {spent:,.2f} USD from the first request to the last release")
