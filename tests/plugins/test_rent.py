"""The steps that rent, with the tests' provider, which has real SSH servers as machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.execution_time.context import set_current_context

import provider
import remote_job
from cluster.test_checkpoints import save
from fastcpt.cluster import checkpoints
from fastcpt.cluster.remote import ClusterError, ConnectionLost, ask
from fastcpt.files import read_json, write_json
from fastcpt.recipe import RecipeError, load_recipe
from fastcpt.rent import ledger, machines
from fastcpt.reporting.record import add_cost, open_record, read
from steps import rent, training
from steps.results import result_of

pytestmark = pytest.mark.linux("a machine's processes are found by their environment")

DAG_ID, RUN = "fast_cpt", "manual__2026-11-28"


class Renting:
    """A run of a recipe that rents, as its steps see it."""

    def __init__(self, folder: Path) -> None:
        self.home, self.provider = folder / "home", provider.create(folder / "provider")
        self.states: dict[str, str] = {"publish": "success"}
        self.results: dict[str, Any] = {}
        self.task_id, self.map_index, self.run_id, self.dag_id = "acquire_cluster", -1, RUN, DAG_ID
        self.folder = folder

    def plan(self, **more: Any) -> dict[str, Any]:
        name = f"{remote_job.RENTED}{ledger.name_of_run(DAG_ID, RUN)}"
        own = {"cluster.connection": name, "cluster.root": str(self.folder / "root")}
        rents = {"cluster.rent": {**provider.commands(self.provider), **more.pop("rent", {})}}
        recipe = load_recipe("sample", {**own, **rents, **more})
        record = open_record(self.home, RUN, DAG_ID, recipe)
        plan = {"recipe": str(record / "recipe.yaml"), "record": str(record), "login": "mine"}
        self.results["plan"] = plan
        return plan

    def xcom_pull(self, task_ids: str) -> Any:
        return self.results.get(task_ids)

    def get_task_states(self, dag: str, run_ids: list[str]) -> dict[str, dict[str, str]]:
        return {RUN: self.states}

    @property
    def context(self) -> Any:
        started = SimpleNamespace(start_date=None)
        return {"ti": self, "run_id": RUN, "dag": DAG(DAG_ID), "dag_run": started}

    def call(self, step: Callable[..., Any], *given: Any) -> Any:
        with set_current_context(self.context):
            self.results[step.__name__] = step(*given)
        return self.results[step.__name__]

    def running(self) -> list[str]:
        return [one["id"] for one in provider.machines(self.provider, running=True)]


@pytest.fixture
def renting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renting]:
    one = Renting(tmp_path)
    for module in (rent, remote_job, training):
        monkeypatch.setattr(module, "HOME", one.home)
    extra = {"key_file": str(one.provider / "client_key")}
    # the login's key is the connection's; where the host is, the provider says
    monkeypatch.setenv("AIRFLOW_CONN_MINE", json.dumps({"conn_type": "gpuhost", "extra": extra}))
    yield one
    for machine in provider.machines(one.provider):
        provider.end(one.provider, machine["id"])


def test_a_machine_is_rented_checked_watched_and_given_back(
    renting: Renting, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = renting.plan(**{"budget.money": 100.0})
    write_json(Path(plan["record"]) / "plan.json", {"reserve_hours": 0.5})
    facts = renting.call(rent.acquire_cluster, plan)
    assert facts["cores"] > 0
    # later steps find it where the check of a host that is there would be
    assert result_of(renting.context, "check_cluster") == facts
    (rented,) = provider.machines(renting.provider)
    kept = list(Path(rented["place"]).glob("home/.fast_cpt/rent-*/rent.json"))
    assert len(kept) == 1
    watched = read_json(kept[0])
    # 100 USD at 36 an hour, from the moment that the provider was asked; the watch begins a bit later
    (rental,) = ledger.of_run(renting.home, DAG_ID, RUN)
    assert watched["deadline_unix"] == pytest.approx(rental.asked + 100 / 36 * 3600, abs=60)
    assert (watched["orphan_s"], watched["reserve_s"]) == (6 * 3600, 0.5 * 3600)
    remote = remote_job.remote_of(load_recipe(plan["recipe"]).cluster.connection)
    assert ask(remote, "check", root=facts["root"])["root"] == facts["root"]
    renting.call(rent.release_cluster)
    assert renting.running() == []
    assert provider.processes(rented) == []
    record = Path(plan["record"])
    assert [one["state"] for one in read(record, "rent.json")["machines"]] == ["released"]
    # what it cost is what was rented, whatever its jobs took
    bill = provider.bill(renting.provider, time.time())
    assert add_cost(record, 2, 3.0)["cost"] == pytest.approx(bill, rel=0.5)
    assert "1 rented, " in capsys.readouterr().out
    with pytest.raises(ClusterError, match=r"no rented machine \(the run has ended\): clear this"):
        remote_job.remote_of(load_recipe(plan["recipe"]).cluster.connection)


def test_a_machine_that_is_not_what_was_planned_goes_back(renting: Renting) -> None:
    plan = renting.plan(**{"cluster.min_free_gb": 10.0**9})
    with pytest.raises(ClusterError, match="GB free under"):
        renting.call(rent.acquire_cluster, plan)
    (rental,) = ledger.of_run(renting.home, DAG_ID, RUN)
    assert (rental.state, renting.running()) == ("released", [])
    assert "it could not take the run" in rental.why


GPUS = {
    "cluster.cpu_only": False,
    "cluster.gpus": 4,
    "cluster.gpu": "H100",
    "training.deepspeed": "ds_config_zero3.json",
}


@pytest.mark.parametrize(
    ("fault", "offered"),
    [
        ("half the GPUs", {"gpus": 2, "gpu": None}),
        ("other GPUs", {"gpus": 4, "gpu": "H200"}),
    ],
)
def test_another_machine_than_planned_goes_back_and_is_planned_for(
    renting: Renting, fault: str, offered: dict[str, Any]
) -> None:
    provider.fail(renting.provider, acquire=[fault])
    plan = renting.plan(**GPUS)
    with pytest.raises(rent.NotAsPlanned, match=r"it was given back\. The run begins again"):
        renting.call(rent.acquire_cluster, plan)
    (first,) = ledger.of_run(renting.home, DAG_ID, RUN)
    assert (first.state, first.offered, renting.running()) == ("released", offered, [])
    # the run has ended with it, and needs another: it is planned for what was offered
    assert machines.to_begin_again(renting.home, lambda *_: True) == []
    assert machines.to_begin_again(renting.home, lambda *_: False) == [first]
    values = rent.as_offered(load_recipe(plan["recipe"]), DAG_ID, RUN)
    # two rows a GPU and four GPUs are a batch of 8 rows: two GPUs take theirs in two parts
    batch = values["training.per_device_train_batch_size"], offered["gpus"]
    parts = values["training.gradient_accumulation_steps"]
    assert (*batch, parts) == ((2, 2, 2) if fault == "half the GPUs" else (2, 4, 1))
    planned = renting.plan(**{**GPUS, **values})
    provider.fail(renting.provider, acquire=[""] if fault == "half the GPUs" else [fault])
    assert len(renting.call(rent.acquire_cluster, planned)["gpus"]) == offered["gpus"]
    assert machines.to_begin_again(renting.home, lambda *_: False) == []


def test_gpus_that_cannot_share_the_batch_are_refused(renting: Renting) -> None:
    plan = renting.plan(**GPUS)
    recipe = load_recipe(plan["recipe"])
    rental = machines.rent_machine(renting.home, DAG_ID, RUN, recipe.cluster.rent, {"gpus": 4})
    ledger.write(renting.home, rental, offered={"gpus": 3, "gpu": None})
    with pytest.raises(RecipeError, match="its batch of 8 cannot be shared by the 3 GPUs"):
        rent.as_offered(recipe, DAG_ID, RUN)


def test_a_machine_that_was_taken_away_is_waited_for_and_needs_no_second_approval(
    renting: Renting,
) -> None:
    plan = renting.plan()
    renting.call(rent.acquire_cluster, plan)
    provider.end(renting.provider, "m1")
    assert not rent.replaces_a_machine(renting.context)
    (news,) = machines.look_after(renting.home, lambda *_: True)
    assert news.what == machines.TAKEN_AWAY
    # who watches the training asks again, until the run begins again
    with pytest.raises(ConnectionLost, match="the run begins again with another"):
        remote_job.remote_of(load_recipe(plan["recipe"]).cluster.connection)
    (lost,) = machines.to_begin_again(renting.home, lambda *_: True)
    machines.begun_again(renting.home, lost)
    assert machines.to_begin_again(renting.home, lambda *_: True) == []
    assert rent.replaces_a_machine(renting.context)
    renting.plan(**{"cluster.min_free_gb": 2.0})
    assert not rent.replaces_a_machine(renting.context)


def test_a_replacement_with_other_gpus_is_approved_again_and_resumes_from_what_is_here(
    renting: Renting, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {**GPUS, "checkpoints.bring_every_minutes": 30.0, "cluster.root": "root"}
    first = _training_of(renting, renting.plan(**recipe))
    assert first.bring is not None
    folder, home = first.bring["folder"], Path(first.bring["home"])
    save(Path(folder), 10)
    name = load_recipe(renting.results["plan"]["recipe"]).cluster.connection
    checkpoints.bring(remote_job.remote_of(name), folder, home)
    provider.end(renting.provider, "m1")
    assert len(list(machines.look_after(renting.home, lambda *_: True))) == 1
    # as it was planned, so it is rented without asking; but the provider has one with half the GPUs
    assert rent.replaces_a_machine(renting.context)
    provider.fail(renting.provider, acquire=["half the GPUs"])
    with pytest.raises(rent.NotAsPlanned):
        renting.call(rent.acquire_cluster, renting.results["plan"])
    assert len(machines.to_begin_again(renting.home, lambda *_: False)) == 1
    offered = rent.as_offered(load_recipe(renting.results["plan"]["recipe"]), DAG_ID, RUN)
    plan = renting.plan(**{**recipe, **offered})
    assert not rent.replaces_a_machine(renting.context)
    second = _training_of(renting, plan)
    # the same training, on two GPUs in place of four
    words = [job.commands[-1] for job in (first, second)]
    assert [command[command.index("--num_gpus") + 1] for command in words] == ["4", "2"]
    assert second.bring is not None
    assert Path(second.bring["folder"]).name == Path(folder).name
    assert "no checkpoint as new as step_10" in capsys.readouterr().out
    there = Path(second.bring["folder"]) / "checkpoints" / "step_10" / "state.json"
    assert there.read_text() == '{"step": 10}'
    assert renting.running() == ["m3"]


def _training_of(renting: Renting, plan: dict[str, Any]) -> remote_job.RemoteJob:
    """The job of train_cpt on the machine that the run takes now."""
    root = renting.call(rent.acquire_cluster, plan)["root"]
    renting.results["sync"] = {
        **{"root": root, "python": "python3", "code": "/code", "run": f"{root}/runs/r"},
        **{"corpus": "/corpus", "corpus_digest": "c", "tokenizer_digest": "t"},
    }
    return training.train_cpt(renting.context)


def test_a_clear_finds_the_machine_or_takes_another_which_is_given_back_too(
    renting: Renting,
) -> None:
    plan = renting.plan()
    for _ in range(2):  # cleared while the machine is there
        renting.call(rent.acquire_cluster, plan)
        assert renting.running() == ["m1"]
    renting.call(rent.release_cluster)
    renting.call(rent.acquire_cluster, plan)  # cleared after the run's end
    assert renting.running() == ["m2"]
    renting.call(rent.release_cluster)
    states = [one.state for one in ledger.of_run(renting.home, DAG_ID, RUN)]
    assert (states, renting.running()) == (["released", "released"], [])


def test_a_machine_that_never_answers_goes_back_and_the_retry_has_another(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rent, "SILENT_S", 0.0)
    provider.fail(renting.provider, acquire=["half started"])
    plan = renting.plan()
    with pytest.raises(ConnectionLost, match="nothing listens at"):
        renting.call(rent.acquire_cluster, plan)
    assert renting.running() == []
    assert renting.call(rent.acquire_cluster, plan)["cores"] > 0
    assert renting.running() == ["m2"]


def test_a_failed_runs_machine_is_kept_where_the_recipe_says_so(renting: Renting) -> None:
    plan = renting.plan(rent={"keep_minutes": 5.0})
    renting.call(rent.acquire_cluster, plan)
    renting.states = {"publish": "upstream_failed"}
    renting.call(rent.release_cluster)
    (rental,) = ledger.of_run(renting.home, DAG_ID, RUN)
    assert rental.keep_until == pytest.approx(time.time() + 300, abs=60)
    assert renting.running() == ["m1"]
    renting.states = {"publish": "success"}
    renting.call(rent.release_cluster)
    assert renting.running() == []


def test_a_recipe_that_rents_nothing_has_one_line(
    renting: Renting, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = renting.plan(**{"cluster.rent": None})
    assert renting.call(rent.acquire_cluster, plan) is None
    assert rent.prepare_rented(renting.context) == {}
    renting.call(rent.release_cluster)
    assert capsys.readouterr().out.splitlines() == [rent.NOTHING] * 3
    assert not (renting.home / "rented").exists()
