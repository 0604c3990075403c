"""The page "New run" in Airflow's UI: a form with the plan for its values, before a run is started.

It only reads and checks. The page's script starts a run through Airflow's own API, with the same login,
permission and checks as Airflow's Trigger button.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

from fastcpt.files import HOME
from fastcpt.recipe import DEFAULT_RECIPE, Recipe, RecipeError, load_recipe, recipe_names
from fastcpt.recipe_form import (
    FORM,
    GROUPS,
    form_overrides,
    form_schema,
    own_values,
    problems_by_field,
    typed_values,
)
from fastcpt.reporting import plan_table
from fastcpt.reporting.pages import TEMPLATES, page
from run_pages import DAG, ROOT, SECURITY

if TYPE_CHECKING:
    from fastapi import FastAPI

PREFIX = "/fast-cpt-new"
FIRST = {
    "documents",
    "base_model",
    "max_steps",
    "connection",
    "gpus",
    "budget_hours",
    "budget_money",
}
SWITCHES = ("require_approval", "run_even_if_plan_says_no")


def form_page() -> str:
    """The form: recipes, and fields in groups, only a few of them visible at first. Its script fetches the plan."""
    recipes = {name: load_recipe(name) for name in recipe_names()}
    groups = [
        {
            "title": title,
            "first": [_field(name) for name in names if name in FIRST],
            "more": [_field(name) for name in names if name not in FIRST],
        }
        for title, names in GROUPS.items()
    ]
    choices = [
        {"name": name, "words": recipe.description, "claim": recipe.claim}
        for name, recipe in recipes.items()
    ]
    return page(
        "new_run.html",
        title="New Fast CPT run",
        home="./",
        root=ROOT,
        dag=DAG,
        recipes=choices,
        default=DEFAULT_RECIPE,
        groups=groups,
    )


def _field(name: str) -> dict[str, Any]:
    schema = form_schema(name)
    return {
        "name": name,
        "label": name.replace("_", " "),
        "words": schema["description"],
        "options": [option for option in schema.get("enum", []) if option],
        "numeric": schema["type"][0] in ("integer", "number"),
    }


def checked(home: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The result of the form's values: errors by field (``wrong``), other ``problems``, the recipe's ``own``
    values, the ``plan`` as HTML, and, if there are no errors, the ``conf`` that starts the run."""
    name = str(typed.get("recipe", DEFAULT_RECIPE))
    if name not in recipe_names():
        return {"wrong": {"recipe": "no such recipe"}, "problems": [], "own": {}, "plan": ""}
    texts = {field: str(typed.get(field) or "") for field in FORM}
    values, wrong = typed_values(texts)
    answer: dict[str, Any] = {"wrong": wrong, "problems": [], "plan": ""}
    answer["own"] = own_values(load_recipe(name))
    try:
        recipe = load_recipe(name, form_overrides(values))
    except RecipeError as error:
        by_field, others = problems_by_field(str(error))
        answer["wrong"] = {**by_field, **wrong}
        answer["problems"] = others
        return answer
    if wrong:
        return answer
    answer["plan"] = _plan(home, name, recipe)
    switches = {switch: bool(typed.get(switch)) for switch in SWITCHES}
    answer["conf"] = {"recipe": name, **values, **switches}
    return answer


def _plan(home: Path, name: str, recipe: Recipe) -> str:
    from fastcpt.planning.history import FILE
    from fastcpt.planning.plan import plan

    tokens, note = _tokens(name, recipe)
    shown: dict[str, Any] = {"problem": "", "note": note, "plan": None, "table": plan_table}
    shown["corpus"] = (
        "the recipe's target" if tokens is None else "guessed from the documents' size"
    )
    try:
        shown["plan"] = plan(recipe, tokens, None, home / FILE).to_json()
    except (ValueError, OSError) as error:
        shown["problem"] = str(error)
    return page("plan.html", **shown)


def _tokens(name: str, recipe: Recipe) -> tuple[int | None, str]:
    """The corpus's tokens, estimated from the documents' size, and a note about them."""
    from fastcpt.corpus.documents import list_parts
    from fastcpt.corpus.new_documents import state_of, text_bytes
    from fastcpt.corpus.sample import OF_SAMPLE
    from fastcpt.planning.plan import estimated_tokens

    if not recipe.documents.path and name in OF_SAMPLE:
        return None, "The generated sample is taken: about 400 short acts."
    if not recipe.documents.path:
        return None, "No documents are named yet: the plan takes the recipe's tokens."
    try:
        size = text_bytes(state_of(list_parts(recipe.documents)))
    except (ValueError, OSError) as error:
        why = f"The documents are not seen from here ({error})"
        return None, f"{why}: the plan takes the recipe's tokens."
    return estimated_tokens(size, recipe), f"The documents are {size / 1e6:,.1f} MB of text."


def new_run_app(home: Path) -> FastAPI:
    """The page and its checks, for users who may start runs of the DAG."""
    # Imported here because workers and the scheduler load this module too, but serve no pages.
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from fastapi import Body, Depends, FastAPI
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

    may_start = requires_access_dag("POST", DagAccessEntity.RUN, param_dag_id=DAG)
    pages = FastAPI(
        dependencies=[Depends(may_start)], openapi_url=None, docs_url=None, redoc_url=None
    )
    body = Body()

    @pages.get("/")
    def form() -> HTMLResponse:
        return HTMLResponse(form_page(), headers=SECURITY)

    @pages.get("/{name}.js")
    def script(name: str) -> FileResponse:
        known = name if name in ("pages", "new_run") else "pages"
        return FileResponse(
            TEMPLATES / f"{known}.js", media_type="text/javascript", headers=SECURITY
        )

    # only JSON, which another site's form cannot send
    @pages.post("/judge")
    def judge(typed: dict[str, Any] = body) -> JSONResponse:
        return JSONResponse(checked(home, typed), headers=SECURITY)

    return pages


class NewRun(AirflowPlugin):
    name = "fast_cpt_new_run"
    external_views: ClassVar = [
        {
            "name": "New CPT run",
            "href": f"{ROOT}{PREFIX}/",
            "url_route": PREFIX.removeprefix("/"),
            "destination": "nav",
            "nav_top_level": True,  # two pages of plugins would share a menu
        }
    ]

    @functools.cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """Only the API server asks for this."""
        return [{"app": new_run_app(HOME), "url_prefix": PREFIX, "name": "New Fast CPT run"}]
