"""The pages of run records in Airflow's UI, with Airflow's own login, in a real browser."""

import json
import re
from pathlib import Path

import httpx
import pytest

from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from fastcpt.reporting.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]

PAGES = "/fast-cpt-runs"
RUN = "manual__2026-11-23T01:00:00+00:00"
NAME = records.record_folder(Path(), RUN).name


@pytest.fixture(scope="module")
def home(airflow):
    """Two records: one of a run with its report, and one, earlier, of a run still going."""
    record = records.open_record(airflow.home, RUN, "fast_cpt", load_recipe("sample"))
    gate = {"decision": "pass", "passed": True, "value": 9.36, "base_value": 2111.5}
    records.add(record, "gate.json", {**gate, "threshold": 18.0, "validation_set": "random"})
    records.add(record, "evaluation.json", {"validation_set": "random",
                "model": {"perplexity": 9.36}, "base": {"perplexity": 2111.5}})  # fmt: skip
    for step in range(1, 61):
        with (airflow.home / "metrics.jsonl").open("a") as metrics:
            row = {"step": step, "loss": 8 / (1 + step / 20), "learning_rate": 5e-3}
            metrics.write(json.dumps(row) + "\n")
    records.add(record, "train_cpt/metrics.jsonl", airflow.home / "metrics.jsonl")
    records.close_record(record, "success")
    write_report(record)
    going = records.open_record(airflow.home, "going <b>on</b>", "fast_cpt", load_recipe("sample"))
    facts = records.read(going, "run.json")
    write_json(going / "run.json", {**facts, "started": "2020-01-01T00:00:00+00:00"})
    (airflow.home / "secret.txt").write_text("not for the browser")
    (airflow.home / "runs" / "outside").symlink_to("/etc")
    return airflow.home


def test_strangers_are_turned_away(airflow, home):
    forged = {"_token": "eyJhbGciOiJub25lIn0.e30."}
    for path in ("/", f"/run/{NAME}", "/run/nothing-here"):
        assert httpx.get(airflow.url + PAGES + path).status_code == 401
        assert httpx.get(airflow.url + PAGES + path, cookies=forged).status_code == 403


def test_no_request_leads_out_of_the_records(airflow, home):
    names = [
        *("..", "%2e%2e", "../secret.txt", "..%2f..%2fsecret.txt", "%2e%2e/%2e%2e/secret.txt"),
        *("outside", "%2fetc%2fpasswd", f"{NAME}/recipe.yaml", f"{NAME}%2frun.json", "%00", "none"),
    ]
    with airflow.client() as client:
        assert client.get(f"{PAGES}/run/{NAME}").status_code == 200
        for name in names:
            answer = client.get(f"{PAGES}/run/{name}", follow_redirects=True)
            assert answer.status_code == 404 or "<title>Airflow" in answer.text, name
            assert "not for the browser" not in answer.text
            assert "max_steps" not in answer.text


def test_the_pages_allow_their_own_script_alone(airflow, home):
    with airflow.client() as client:
        for path in ("/", f"/run/{NAME}", "/compare"):
            policy = client.get(PAGES + path).headers["content-security-policy"]
            rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
            assert rules["default-src"] == "'none'"
            assert rules["script-src"] == "'self'"


def test_the_nav_leads_to_the_list_and_on_to_a_report(airflow, home, logged_in):
    logged_in.goto(f"{airflow.url}/plugin/fast-cpt-runs")
    frame = logged_in.frame_locator("iframe")
    frame.get_by_role("heading", name="Fast CPT runs").wait_for()
    rows = frame.locator("tr").all_inner_texts()
    assert len(rows) == 3
    assert re.search(r"manual__.*sample\s+success\s+.*9.36\s+2,111.50\s+no fine-tuning", rows[1])
    assert re.search(r"going <b>on</b>.*sample\s+not ended", rows[2])
    frame.get_by_role("link", name=RUN).click()
    frame.get_by_role("heading", name="Perplexity and the gate").wait_for()
    curve = frame.locator("svg").last.bounding_box()
    assert curve["width"] > 300
    assert curve["height"] > 200


def test_the_navigation_names_the_pages(airflow, home, logged_in):
    logged_in.goto(airflow.url)
    logged_in.get_by_role("link", name="CPT runs").click()
    heading = logged_in.frame_locator("iframe").get_by_role("heading", name="Fast CPT runs")
    heading.wait_for()


def test_a_run_without_a_report_shows_its_summary(airflow, home):
    with airflow.client() as client:
        going = records.record_folder(home, "going <b>on</b>").name
        page = client.get(f"{PAGES}/run/{going}").text
    assert "No step is running at the moment." in page
    assert "going &lt;b&gt;on&lt;/b&gt;" in page


def test_a_task_links_to_the_record_of_its_run(airflow, home, logged_in):
    with airflow.client() as client:
        for dag in ("fast_cpt", "another"):
            answer = client.post(
                f"/api/v2/dags/{dag}/dagRuns", json={"dag_run_id": RUN, "logical_date": None}
            )
            assert answer.is_success, answer.text
        links = {}
        for dag, task in (("fast_cpt", "gate"), ("another", "idle")):
            answer = client.get(f"/api/v2/dags/{dag}/dagRuns/{RUN}/taskInstances/{task}/links")
            links[dag] = answer.json()["extra_links"]["Run record"]
    assert links == {"fast_cpt": f"/plugin{PAGES}{PAGES}/run/{NAME}", "another": None}
    logged_in.goto(f"{airflow.url}/dags/fast_cpt/runs/{RUN}/tasks/gate/details")
    logged_in.get_by_role("link", name="Run record").click()
    frame = logged_in.frame_locator("iframe")
    frame.get_by_role("heading", name=f"Fast CPT run {RUN}").wait_for()
