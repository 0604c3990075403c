"""The DAG's trigger form in Airflow's UI: recipes, fields with their descriptions, limits."""

import re

import pytest

from fastcpt.recipe import DEFAULT_RECIPE, recipe_names
from fastcpt.recipe_form import FORM, form_schema

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]


@pytest.fixture
def form(airflow, logged_in):
    logged_in.goto(f"{airflow.url}/dags/fast_cpt")
    logged_in.get_by_role("button", name="Trigger").first.click()
    form = logged_in.get_by_role("dialog")
    form.locator("#element_recipe").wait_for()
    return form


def test_every_field_is_there_with_its_words(form):
    words = form.inner_text()
    for name in FORM:
        assert re.search(rf"\b{name}\b", words), name
        assert form_schema(name)["description"] in words
    assert DEFAULT_RECIPE in form.locator("#element_recipe").inner_text()


def test_every_recipe_can_be_chosen(form):
    form.locator("#element_recipe").click()
    assert form.get_by_role("option").all_inner_texts() == recipe_names()


def test_what_is_filled_in_reaches_the_run(airflow, form):
    form.locator("#element_recipe").click()
    form.get_by_role("option", name="sample", exact=True).click()
    form.locator("[name=element_documents]").fill("/data/my documents; $(id)")
    form.locator("[name=element_max_steps]").fill("7")
    form.locator("[name=element_max_steps]").press("Tab")
    form.get_by_role("button", name="Trigger").last.click()
    form.wait_for(state="hidden")
    with airflow.client() as client:
        runs = client.get("/api/v2/dags/fast_cpt/dagRuns?order_by=-id&limit=1").json()["dag_runs"]
    conf = runs[0]["conf"]
    assert conf["recipe"] == "sample"
    assert conf["documents"] == "/data/my documents; $(id)"
    assert conf["max_steps"] == 7
    assert conf["gpus"] is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", "cpt_config_fats"),
        ("gpus", 0),
        ("perplexity_threshold", 1.0),
        ("max_seq_length", 10**9),
        ("num_shards", "many"),
        ("connection", "cluster; rm -rf /"),
    ],
)
def test_a_value_out_of_its_limits_starts_no_run(airflow, field, value):
    with airflow.client() as client:
        before = client.get("/api/v2/dags/fast_cpt/dagRuns").json()["total_entries"]
        answer = client.post(
            "/api/v2/dags/fast_cpt/dagRuns", json={"logical_date": None, "conf": {field: value}}
        )
        assert answer.status_code == 400
        assert field in answer.text
        assert client.get("/api/v2/dags/fast_cpt/dagRuns").json()["total_entries"] == before
