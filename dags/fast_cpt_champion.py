"""Changes a recipe's champion by hand: promote a model, roll back, or retire the champion.

The change is recorded with who triggered the run and why (docs/models.md), and a message is sent.
"""

from __future__ import annotations

from airflow.sdk import Param, dag, task

import steps.champion
from fastcpt.recipe import DEFAULT_RECIPE, recipe_names
from notifications import tell_failure


@dag(  # type: ignore[untyped-decorator]
    dag_id="fast_cpt_champion",
    schedule=None,
    max_active_runs=1,
    is_paused_upon_creation=False,
    params={
        "recipe": Param(
            DEFAULT_RECIPE,
            type="string",
            examples=recipe_names(),
            description="The recipe whose champion changes.",
        ),
        "action": Param(
            "rollback",
            type="string",
            enum=["promote", "rollback", "retire"],
            description="Rollback restores the previous champion. Retire leaves no champion.",
        ),
        "model": Param(
            None,
            type=["null", "string"],
            description="The model to promote: a folder under models/, as named in the run's report.",
        ),
        "why": Param("", type="string", minLength=1, description="Recorded with your name."),
    },
    doc_md=__doc__,
    tags=["training"],
    default_args={"retries": 0, "on_failure_callback": tell_failure},
)
def fast_cpt_champion() -> None:
    task(steps.champion.change)()


fast_cpt_champion()
