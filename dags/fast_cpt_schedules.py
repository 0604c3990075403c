"""A DAG for each schedule of ``schedules.yaml`` in FASTCPT_HOME: checks for new documents, then runs ``fast_cpt``.

It is a separate file, so that an error in the schedules does not make ``fast_cpt`` disappear. Changing or
deleting a schedule does not affect a run that it has started.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import CronTriggerTimetable, dag, task

import scheduled
from fastcpt.files import HOME
from fastcpt.schedules import FILE, Schedule, read_schedules
from notifications import tell_failure
from retries import RETRIES


def schedule_dag(name: str, schedule: Schedule) -> None:
    @dag(  # type: ignore[untyped-decorator]
        dag_id=f"fast_cpt_{name}",
        # a new schedule starts with its next time
        schedule=CronTriggerTimetable(
            schedule.time, timezone=schedule.timezone, run_immediately=timedelta(minutes=1)
        ),
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,
        description=f"{schedule.recipe}, if there is something new",
        tags=["training", "schedule"],
    )
    def fast_cpt_schedule() -> None:
        look = task(multiple_outputs=False, **RETRIES, on_failure_callback=tell_failure)
        TriggerDagRunOperator(
            task_id="run",
            trigger_dag_id="fast_cpt",
            trigger_run_id=scheduled.run_id(name),
            conf=look(scheduled.look_for_new)(name),
            # when cleared, the run starts again
            reset_dag_run=True,
            wait_for_completion=True,
            deferrable=True,
            poke_interval=10,
            # the run's own tasks are retried, and send messages
            retries=0,
        )

    fast_cpt_schedule()


for name, schedule in read_schedules(HOME / FILE).items():
    schedule_dag(name, schedule)
