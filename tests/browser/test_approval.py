"""The plan that a person approves, in Airflow's own page: axe finds nothing in what this project writes there.

The rest of the page is Airflow's. Below 768 pixels Airflow makes it 1,280 wide; so on a phone's width the plan is asked alone.
"""

import json
import sqlite3
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

import approval
from browser.test_accessibility import DESK, LOOKS, PHONE
from fastcpt.planning.plan import plan
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records

# what Airflow's margins leave of a phone
WIDTH = PHONE["width"] - 32

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]


@pytest.fixture(scope="module")
def shown(airflow, browser, tmp_path_factory):
    """The plan in the page that asks; it does not fit, so it has alternatives too."""
    recipe = load_recipe("cpt_config_fast")
    record = records.open_record(tmp_path_factory.mktemp("asked"), "asked", "fast_cpt", recipe)
    records.add(record, "plan.json", plan(recipe, 2_000_000_000, "4xH100").to_json())
    with airflow.client() as client:
        wanted = {"logical_date": None, "conf": {"recipe": "sample"}}
        answer = client.post("/api/v2/dags/fast_cpt/dagRuns", json=wanted)
        run = answer.raise_for_status().json()["dag_run_id"]
    ask(airflow.database, run, approval.body_of(record / "plan.json"))
    # high enough for the whole plan: axe does not judge colours that are scrolled away
    context = browser.new_context(viewport={**DESK, "height": 3000})
    context.add_cookies([{"name": "_token", "value": airflow.token(), "url": airflow.url}])
    tab = context.new_page()
    tab.goto(f"{airflow.url}/dags/fast_cpt/runs/{run}/tasks/approve_plan/required_actions")
    yield tab.get_by_text("The plan does not fit.").locator("..")
    context.close()


def ask(database: Path, run: str, body: str):
    """Note what the task notes when it asks: no scheduler runs here that would start it."""
    of_run = (run, "approve_plan")
    with sqlite3.connect(database) as tables:
        tables.execute(
            "UPDATE task_instance SET state = 'awaiting_input' WHERE run_id = ? AND task_id = ?",
            of_run,
        )
        tables.execute(
            "INSERT INTO hitl_detail"
            " (ti_id, options, subject, body, multiple, params, params_input, created_at)"
            " SELECT id, ?, 'Approve the plan', ?, 0, '{}', '{}', CURRENT_TIMESTAMP"
            " FROM task_instance WHERE run_id = ? AND task_id = ?",
            (json.dumps(["Approve", "Reject"]), body, *of_run),
        )


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_in_the_plan_and_a_phone_holds_it(shown, look):
    tab, (scheme, viewport) = shown.page, LOOKS[look]
    tab.emulate_media(color_scheme=scheme)
    tab.locator(f"html.{scheme}").wait_for()
    if viewport == PHONE:
        shown.evaluate("(plan, width) => { plan.style.width = width }", f"{WIDTH}px")
    shown.evaluate("plan => { plan.id = 'plan' }")
    found = Axe().run(tab, "#plan").response["violations"]
    told = [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]
    assert told == []
    assert shown.locator("td").count() > 20
    if viewport == PHONE:
        assert shown.evaluate("plan => plan.scrollWidth") <= WIDTH
