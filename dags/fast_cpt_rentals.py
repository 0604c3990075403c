"""Gives back rented machines that no run will give back; without a rental it has no schedule."""

from __future__ import annotations

from airflow.sdk import dag, task

import rentals
from fastcpt.files import HOME
from notifications import tell_failure


@dag(
    dag_id="fast_cpt_rentals",
    schedule=f"*/{rentals.MINUTES} * * * *" if (HOME / "rented").is_dir() else None,
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,
    description="Looks after rented machines",
    tags=["training"],
)
def fast_cpt_rentals() -> None:
    # the next round is the next try
    task(retries=0, on_failure_callback=tell_failure)(rentals.look_after)()


fast_cpt_rentals()
