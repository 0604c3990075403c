"""Follows a run's state in Airflow, also when a person sets it: updates its record and the GPU queue.

The task `report` closes the record. This module handles what `report` cannot know: that an active run was
marked, or that an ended run was marked otherwise or continues (cleared tasks). A run that ends leaves the
GPU queue. Airflow's scheduler and API server call these functions.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin

import gpu_turns
from fastcpt.files import HOME
from fastcpt.reporting.record import (
    close_record,
    mark_record,
    read,
    record_folder,
    reopen_record,
)


@hookimpl
def on_dag_run_running(dag_run: Any, msg: str) -> None:
    _follow(dag_run, None)


@hookimpl
def on_dag_run_success(dag_run: Any, msg: str) -> None:
    _follow(dag_run, "success")


@hookimpl
def on_dag_run_failed(dag_run: Any, msg: str) -> None:
    _follow(dag_run, "failed")


def _follow(dag_run: Any, state: str | None) -> None:
    if state is not None:
        gpu_turns.give_back(dag_run.dag_id, dag_run.run_id)
    record = record_folder(HOME, dag_run.run_id)
    facts = read(record, "run.json")
    if facts.get("dag") != dag_run.dag_id:
        return
    if state is None:
        reopen_record(record)
    elif dag_run.state != state:
        # marked, but active until `report` has ended
        mark_record(record, state)
    elif facts.get("state") != state:
        close_record(record, state)


class RunState(AirflowPlugin):
    name = "fast_cpt_run_state"
    listeners: ClassVar = [sys.modules[__name__]]
