"""The page "New run" in Airflow's UI: the choices, their plan, and the run that they start."""

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]

PAGE = "/fast-cpt-new/"


@pytest.fixture
def form(airflow, logged_in):
    logged_in.goto(f"{airflow.url}/plugin{PAGE}")
    frame = logged_in.frame_locator("iframe")
    frame.get_by_role("heading", name="New Fast CPT run").wait_for()
    frame.locator("#plan table").first.wait_for()
    return frame


def test_strangers_neither_see_nor_judge(airflow):
    assert httpx.get(airflow.url + PAGE).status_code == 401
    assert httpx.post(f"{airflow.url}{PAGE}judge", json={"recipe": "sample"}).status_code == 401
    with airflow.client() as client:
        # what a form of another site can send
        assert client.post(f"{PAGE}judge", data={"recipe": "sample"}).status_code == 422


def test_a_choice_shows_its_plan_and_a_wrong_one_its_limits(form):
    form.locator("#recipe").select_option("sample")
    form.get_by_text("The generated sample is taken").wait_for()
    assert form.locator("#max_steps").get_attribute("placeholder") == "120"
    form.locator("#gpus").fill("0")
    form.get_by_text("greater than or equal to 1").wait_for()
    assert form.locator("#start").is_disabled()


def test_the_sample_starts_without_another_word(airflow, form, logged_in):
    form.locator("#recipe").select_option("sample")
    form.locator("#start:enabled").click()
    logged_in.wait_for_url("**/dags/fast_cpt/runs/manual__*")
    with airflow.client() as client:
        runs = client.get("/api/v2/dags/fast_cpt/dagRuns?order_by=-id&limit=1").json()["dag_runs"]
    conf = runs[0]["conf"]
    assert conf["recipe"] == "sample"
    assert conf["require_approval"] is False
    assert "documents" not in conf
