"""What tasks hand each other: the XComs of a run, by task. Paths are absolute; small, as they stay in the database.

A run outlives an upgrade: keys are added to these records (``NotRequired``), not renamed.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict, overload

from airflow.sdk import Context

from fastcpt.recipe import RecipeError


class Plan(TypedDict):
    """``plan``: the resolved recipe's file, the run's record, and the documents' files in groups."""

    recipe: str
    record: str
    parts: list[list[str]]
    # the Airflow connection whose key logs in to a rented host
    login: NotRequired[str]


class Made(TypedDict):
    """A result of the corpus room: its folder here, and figures where it has them."""

    path: str
    digest: str
    reused: bool
    documents: NotRequired[int]
    tokens: NotRequired[int]
    unreadable: NotRequired[int]
    train: NotRequired[int]
    held_out: NotRequired[int]


class Built(TypedDict):
    """``build``."""

    corpus: Made
    instructions: Made | None
    reused: bool


class Gpu(TypedDict):
    name: str
    memory_gb: float
    driver: str


class HostFacts(TypedDict):
    """``check_cluster``: what ``cluster.agent.host.check`` answers; memory and disk in GB."""

    hostname: str
    system: str
    python: str
    root: str
    home: str
    rsync: str | None
    bash: str | None
    slurm: str | None
    unwritable: dict[str, str]
    disk_free_gb: float
    memory_gb: float
    cores: int
    boot_id: str
    gpus: list[Gpu]


class Environment(TypedDict):
    """``prepare_environment``: interpreter and code on the cluster."""

    python: str
    code: str
    reused: bool


class Places(Environment):
    """``sync``: where everything of the run lies on the cluster."""

    root: str
    run: str
    corpus: str
    corpus_digest: str
    tokenizer_digest: str
    base_model: NotRequired[str | None]
    start: NotRequired[str | None]  # the model that training goes on from; None: the base model
    instructions: str | None
    instructions_digest: NotRequired[str]
    sent_bytes: int
    seconds: float


class Trained(TypedDict):
    """A training: its model's folder on the cluster. The XCom has the training's totals as well."""

    model: str
    base_model: NotRequired[str]
    skipped: NotRequired[str]


class Evaluated(TypedDict):
    """An evaluation: its file on the cluster and, once it is kept, in the record."""

    path: NotRequired[str]
    evaluation: NotRequired[str]
    skipped: NotRequired[str]


class Published(TypedDict):
    """``publish``'s job: the model's folder on the cluster."""

    published: str
    digest: str


# What a job left, by its name in ``RemoteJob.fetch``; None: not there
Files = dict[str, str | None]


# On a rented host these tasks do what others do where the host is there from the beginning.
RENTED = {"check_cluster": "acquire_cluster", "sync": "prepare_rented"}


def result_or_none(context: Context, task: str) -> Any:
    """What a task before this one returned; None where it did not run, or had nothing to do."""
    found = context["ti"].xcom_pull(task_ids=task)
    if not found and task in RENTED:
        found = context["ti"].xcom_pull(task_ids=RENTED[task]) or None
    return found


@overload
def result_of(context: Context, task: Literal["plan"]) -> Plan: ...
@overload
def result_of(context: Context, task: Literal["build"]) -> Built: ...
@overload
def result_of(context: Context, task: Literal["check_cluster"]) -> HostFacts: ...
@overload
def result_of(context: Context, task: Literal["sync"]) -> Places: ...
@overload
def result_of(context: Context, task: Literal["evaluate_cpt"]) -> Evaluated: ...
def result_of(context: Context, task: str) -> Any:
    """What a task before this one returned. Raises ``RecipeError`` where it has left nothing."""
    found = result_or_none(context, task)
    if found is None:
        raise RecipeError(
            f"{task} of this run has left no result: it was marked by hand. "
            f"Clear {task} and what follows it"
        )
    return found


def trained_by(context: Context, task: str) -> Trained:
    """What a training handed on; ``RecipeError`` where that names no model."""
    found: Trained | None = result_or_none(context, task)
    if not found or "model" not in found:
        raise RecipeError(
            f"{task} of this run has not said where its model is: it was marked by hand, or done by an "
            f"older version. Clear {task} and what follows it"
        )
    return found
