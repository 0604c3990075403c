"""Sends messages about changes of a champion that were made in a shell; without such a change it has no schedule."""

from __future__ import annotations

from airflow.sdk import dag, task

import steps.champion
from fastcpt.files import HOME
from fastcpt.registry.champion import untold


@dag(
    dag_id="fast_cpt_messages",
    schedule="*/2 * * * *" if untold(HOME) else None,
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,
    description="Sends messages about changes made in a shell",
    tags=["training"],
)
def fast_cpt_messages() -> None:
    # the next round is the next try; with tell_failure each failed one would send a message
    task(retries=0)(steps.champion.tell_untold)()


fast_cpt_messages()
