"""Change by hand which of a recipe's models is its champion: promote one, roll back, or retire it.

What happened is noted with who triggered the run and why (docs/models.md), and told.
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
            description="Whose champion: the recipe's name.",
        ),
        "action": Param(
            "rollback",
            type="string",
            enum=["promote", "rollback", "retire"],
            description="Rollback goes to the champion before. Retire leaves no champion.",
        ),
        "model": Param(
            None,
            type=["null", "string"],
            description="What to promote: a folder's name under models/, as the run's report has it.",
        ),
        "why": Param("", type="string", minLength=1, description="Noted with your name."),
    },
    doc_md=__doc__,
    tags=["training"],
    default_args={"retries": 0, "on_failure_callback": tell_failure},
)
def fast_cpt_champion() -> None:
    task(steps.champion.change)()


fast_cpt_champion()
