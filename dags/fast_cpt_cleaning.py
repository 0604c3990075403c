"""Remove what nothing needs any more, on this machine and on a GPU host, by a policy (docs/models.md).

Without `remove` it is a dry run: the log of `clean` lists each folder with its size.
"""

from __future__ import annotations

from airflow.sdk import Param, dag, task

import steps.cleaning
from notifications import tell_failure


@dag(  # type: ignore[untyped-decorator]
    dag_id="fast_cpt_cleaning",
    schedule=None,
    max_active_runs=1,
    is_paused_upon_creation=False,
    params={
        "connection": Param(
            None,
            type=["null", "string"],
            description="The GPU host's connection. Empty: this machine alone.",
        ),
        "days": Param(
            30, type="number", minimum=0, description="What was used in so many days stays."
        ),
        "candidates": Param(
            None,
            type=["null", "integer"],
            minimum=0,
            description="So many candidates of each recipe stay, the newest, beside the champion and the one "
            "before it. Empty: all models, records and trainings stay.",
        ),
        "remove": Param(
            False, type="boolean", description="Off: only list what would go, with sizes."
        ),
    },
    doc_md=__doc__,
    tags=["training"],
    default_args={"retries": 0, "on_failure_callback": tell_failure},
)
def fast_cpt_cleaning() -> None:
    task(multiple_outputs=False)(steps.cleaning.clean)()


fast_cpt_cleaning()
