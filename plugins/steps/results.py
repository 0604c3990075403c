"""The results that tasks pass on (XComs), by task. Paths are absolute; records are small, as the database keeps them.

A run may continue after an upgrade, so keys are added to these records (``NotRequired``), never renamed.
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
    """A result of the corpus room: its folder here, and some figures."""

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


class HostGpu(TypedDict):
    name: str
    memory_gb: float
    driver: str


class HostFacts(TypedDict):
    """``check_cluster``: the answer of ``cluster.agent.host.check``; memory and disk in GB."""

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
    gpus: list[HostGpu]


class Environment(TypedDict):
    """``prepare_environment``: interpreter and code on the cluster."""

    python: str
    code: str
    reused: bool


class Places(Environment):
    """``sync``: where the run's files are on the cluster."""

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
    """A training: its model's folder on the cluster. The XCom also has the training's totals."""

    model: str
    base_model: NotRequired[str]
    skipped: NotRequired[str]


class Evaluated(TypedDict):
    """An evaluation: its file on the cluster and, later, in the record."""

    path: NotRequired[str]
    evaluation: NotRequired[str]
    skipped: NotRequired[str]


class Published(TypedDict):
    """``publish``'s job: the model's folder on the cluster."""

    published: str
    digest: str


# A job's files by their name in ``RemoteJob.fetch``; None for a missing one
Files = dict[str, str | None]


# The tasks that do the same for a rented host.
RENTED = {"check_cluster": "acquire_cluster", "sync": "prepare_rented"}


def result_or_none(context: Context, task: str) -> Any:
    """The result of an earlier task; None if it did not run or had nothing to do."""
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
    """The result of an earlier task. Raises ``RecipeError`` if there is none."""
    found = result_or_none(context, task)
    if found is None:
        raise RecipeError(
            f"{task} of this run has left no result: it was marked by hand. "
            f"Clear {task} and what follows it"
        )
    return found


def trained_by(context: Context, task: str) -> Trained:
    """A training's result; ``RecipeError`` if it names no model."""
    found: Trained | None = result_or_none(context, task)
    if not found or "model" not in found:
        raise RecipeError(
            f"{task} of this run has not said where its model is: it was marked by hand, or done by an "
            f"older version. Clear {task} and what follows it"
        )
    return found
