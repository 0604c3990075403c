"""The rented host: rented once the plan is approved, prepared, and released in any case.

The ledger (``fastcpt.rent``) lists a run's machines. Without ``cluster.rent`` these steps do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import Context, get_current_context

from fastcpt.files import HOME
from fastcpt.recipe import Recipe, RecipeError
from fastcpt.recipe_sections import Cluster
from remote_job import RemoteJob, remote_of
from steps.cluster import environment_of, send_inputs
from steps.results import Environment, Files, HostFacts, Places, Plan, result_of, result_or_none
from steps.run import noted, planned_recipe

if TYPE_CHECKING:
    from fastcpt.rent.ledger import Rental

# How long a machine may not answer after its provider calls it ready.
SILENT_S = 900.0
# At least this long before the money is spent no job runs, to leave time for copying the last checkpoint.
RESERVE_S = 300.0
NOTHING = "cluster.connection names a host that is there: nothing is rented."


@noted
def acquire_cluster(plan: Plan) -> HostFacts | None:
    """Rent or find the run's machine and return its facts. A machine that cannot take the run is released."""
    from fastcpt.rent import machines

    recipe, context = planned_recipe(plan), get_current_context()
    if recipe.cluster.rent is None:
        print(NOTHING)
        return None
    ids = context["dag"].dag_id, context["run_id"]
    needs, money = _needs(recipe, plan), recipe.budget.money
    rental = machines.rent_machine(
        HOME, *ids, recipe.cluster.rent, needs, money, plan.get("login", "")
    )
    machine = rental.machine
    assert machine is not None
    print(f"{rental.key}: {machine.id} at {machine.host}, {machine.price_per_hour:g} USD an hour")
    try:
        facts = _checked(recipe, rental)
        if offered := _not_as_planned(recipe, rental, facts):
            raise NotAsPlanned(offered)
        _watch(recipe, rental, facts["root"], _reserve_seconds(plan))
    except Exception as error:
        offered = error.offered if isinstance(error, NotAsPlanned) else None
        machines.release_machines(HOME, *ids, f"it could not take the run: {error}", offered)
        raise
    finally:
        note_spending(Path(plan["record"]), *ids)
    return facts


class NotAsPlanned(ValueError):
    """The machine differs from the planned one; ``offered`` describes its GPUs."""

    def __init__(self, offered: dict[str, Any]) -> None:
        self.offered = offered
        super().__init__(
            f"the machine has {offered['gpus']} {offered['gpu'] or 'GPUs'}, which is not what was planned: "
            "it was given back. The run begins again within minutes, with a plan for such a machine"
        )


def _not_as_planned(recipe: Recipe, rental: Rental, facts: HostFacts) -> dict[str, Any] | None:
    """The machine's GPUs and their kind if they differ from the plan's."""
    from fastcpt.cluster.remote import ClusterError

    machine, cluster = rental.machine, recipe.cluster
    assert machine is not None
    if cluster.cpu_only:
        return None
    if not machine.gpus:
        raise ClusterError(f"its provider says that it has no GPUs, {cluster.gpus} were asked for")
    planned, found = _kind(cluster, None), _kind(cluster, facts)
    same = planned is None or found is None or planned == found
    if same and machine.gpus == cluster.gpus:
        return None
    return {"gpus": machine.gpus, "gpu": None if same else found}


def _kind(cluster: Cluster, facts: HostFacts | None) -> str | None:
    """The name of the GPUs in the recipe, or on the host; None if the table does not have them."""
    from fastcpt.gpus import HardwareError
    from fastcpt.planning.hardware import hardware_of

    try:
        gpu = hardware_of(cluster, facts).gpu
    except HardwareError:
        return None
    return gpu.name if gpu else None


def as_offered(recipe: Recipe, dag: str, run: str) -> dict[str, Any]:
    """The recipe's values that change for the machine that was last offered instead of the planned one.

    The batch size stays, so that a begun training stays valid. Raises ``RecipeError`` if the GPUs cannot divide it.
    """
    from fastcpt.planning.placement import batch_of
    from fastcpt.rent import ledger

    rentals = ledger.of_run(HOME, dag, run)
    offered = rentals[-1].offered if rentals else None
    if offered is None:
        return {}
    values = {"cluster.gpus": offered["gpus"], "cluster.gpu": offered["gpu"] or recipe.cluster.gpu}
    trainings = {
        "training": recipe.training,
        "stage2": recipe.stage2,
        "sft.training": recipe.sft.training,
    }
    for name, training in trainings.items():
        micro, batch = training.per_device_train_batch_size, batch_of(recipe, training)
        if batch % offered["gpus"]:
            raise RecipeError(
                f"{name}: its batch of {batch} cannot be shared by the {offered['gpus']} GPUs that were "
                "offered: ask for another number (cluster.gpus)"
            )
        share = batch // offered["gpus"]
        micro = max(size for size in range(1, micro + 1) if share % size == 0)
        values[f"{name}.per_device_train_batch_size"] = micro
        values[f"{name}.gradient_accumulation_steps"] = share // micro
    return values


def replaces_a_machine(context: Context) -> bool:
    """Whether the run has had a machine like the planned one, which was taken away."""
    from fastcpt.rent import ledger, machines

    rentals = ledger.of_run(HOME, context["dag"].dag_id, context["run_id"])
    if not rentals or rentals[-1].why != machines.TAKEN_AWAY:
        return False
    asked = _asked(planned_recipe(result_of(context, "plan")))
    like_it = all(rentals[-1].needs.get(name) == value for name, value in asked.items())
    if like_it:
        print("Approved before: a machine like it was taken away.")
    return like_it


def note_spending(record: Path, dag: str, run: str) -> None:
    """Write the run's rented machines into its record."""
    from fastcpt.rent import ledger
    from fastcpt.reporting.record import add

    rentals = ledger.of_run(HOME, dag, run)
    kept = {"key", "state", "why", "asked", "released"}
    machines = [
        {**rental.model_dump(include=kept), "price_per_hour": rental.machine.price_per_hour}
        for rental in rentals
        if rental.machine
    ]
    if machines:
        add(record, "rent.json", {"machines": machines, "money": rentals[-1].money})


def _needs(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The request to the provider; hours are the plan's, None if unknown."""
    from fastcpt.reporting.record import read

    hours = read(Path(plan["record"]), "plan.json").get("hours") or {}
    return {**_asked(recipe), "hours": hours.get("high")}


def _asked(recipe: Recipe) -> dict[str, Any]:
    cluster = recipe.cluster
    return {
        "gpus": 0 if cluster.cpu_only else cluster.gpus,
        "gpu": None if cluster.cpu_only else cluster.gpu,
        "disk_gb": cluster.min_free_gb,
    }


def _checked(recipe: Recipe, rental: Rental) -> HostFacts:
    """The machine's facts as soon as it answers. Raises ``ClusterError`` if the provider's description is wrong."""
    from fastcpt.cluster.check import check_cluster
    from fastcpt.cluster.remote import ConnectionLost

    assert rental.machine is not None
    gpus = recipe.cluster.gpus if recipe.cluster.cpu_only else max(1, rental.machine.gpus)
    said = recipe.cluster.model_copy(update={"gpus": gpus})
    until = time.monotonic() + SILENT_S
    while True:
        try:
            return cast(HostFacts, check_cluster(remote_of(recipe.cluster.connection), said))
        except ConnectionLost as error:
            if time.monotonic() > until:
                raise
            print(f"{error}; asking again")
            time.sleep(5)


def _reserve_seconds(plan: Plan) -> float:
    """The plan's reserve for saving the last checkpoint and copying it here."""
    from fastcpt.reporting.record import read

    hours: float | None = read(Path(plan["record"]), "plan.json").get("reserve_hours")
    return RESERVE_S if hours is None else max(RESERVE_S, 3600 * hours)


def _watch(recipe: Recipe, rental: Rental, root: str, reserve_seconds: float) -> None:
    """Make the machine release itself if nobody else does (``cluster.jobs.watch``)."""
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
    """Install packages and code on the rented machine; corpus and recipe follow (``bring_to_rented``)."""
    if planned_recipe(result_of(context, "plan")).cluster.rent is None:
        print(NOTHING)
        return {}
    wanted = environment_of(context)
    if isinstance(wanted, RemoteJob):
        return wanted
    return bring_to_rented(context, {}, wanted)


def bring_to_rented(context: Context, files: Files, environment: Environment) -> Places:
    plan, built = result_of(context, "plan"), result_of(context, "build")
    return send_inputs(plan, built, result_of(context, "check_cluster"), environment)


def release_cluster() -> None:
    """Release the run's machine, or keep it for a while if the run failed and the recipe says so."""
    from fastcpt.rent import ledger, machines

    context = get_current_context()
    run, dag = context["run_id"], context["dag"].dag_id
    if not ledger.of_run(HOME, dag, run):
        print(NOTHING)
        return
    plan: Plan | None = result_or_none(context, "plan")
    rent = planned_recipe(plan).cluster.rent if plan else None
    states = context["ti"].get_task_states(dag, run_ids=[run])[run]
    if rent and rent.keep_minutes and states["publish"] != "success":
        machines.keep(HOME, dag, run, rent.keep_minutes)
        print(f"The machine is kept for {rent.keep_minutes:g} minutes: clear the step that failed.")
    else:
        machines.release_machines(HOME, dag, run, "the run has ended")
    rentals = ledger.of_run(HOME, dag, run)
    spent = ledger.spent(rentals, time.time())
    if plan:
        note_spending(Path(plan["record"]), dag, run)
    print(f"{len(rentals)} rented, {spent:,.2f} USD from the first request to the last release")
