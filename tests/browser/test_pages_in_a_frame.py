"""The run pages' script in a frame like that of Airflow's UI; served without Airflow, which is slow."""

import functools
import http.server
import json
import threading

import pytest

import run_pages
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from fastcpt.reporting.pages import TEMPLATES
from run_tasks import TaskNow

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]

# the rights that Airflow 3.3 gives to the page of a plugin
FRAME = (
    '<!doctype html><iframe src="runs/run/page.html" width="360" height="800" '
    'sandbox="allow-scripts allow-same-origin allow-forms allow-downloads"></iframe>'
)


class Served:
    def __init__(self, folder):
        self.folder = folder
        self.record = records.open_record(folder, "a:run", "fast_cpt", load_recipe("sample"))
        (folder / "runs/run").mkdir(parents=True, exist_ok=True)
        (folder / "runs/pages.js").write_bytes((TEMPLATES / "pages.js").read_bytes())
        (folder / "frame.html").write_text(FRAME)

    def trained(self, step):
        """The run's page as it is after a step."""
        row = json.dumps({"step": step, "loss": 2.0, "learning_rate": 1e-5})
        records.add_text(self.record, "train_cpt/metrics.jsonl", row + "\n")
        page = run_pages.run_page(self.record, lambda dag, run: [TaskNow("train_cpt", "running")])
        shown = page.replace('data-refresh="10"', 'data-refresh="0.2"')
        (self.folder / "runs/run/page.html").write_text(shown)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path)


@pytest.fixture
def frame(served, page):
    handler = functools.partial(Quiet, directory=str(served.folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.trained(step=30)
    page.goto(f"http://127.0.0.1:{server.server_port}/frame.html")
    shown = page.frame_locator("iframe")
    shown.get_by_text("step 30 of 120").wait_for()
    yield shown
    server.shutdown()
    server.server_close()


def test_the_page_of_a_run_that_goes_on_refreshes_itself(served, frame):
    served.trained(step=40)
    frame.get_by_text("step 40 of 120").wait_for()


def test_the_page_is_dark_when_airflow_is(frame, page):
    body = frame.locator("body")
    assert body.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("document.documentElement.classList.add('dark')")
    frame.locator("html.dark").wait_for()
    assert body.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(17, 20, 24)"


def test_a_link_to_airflow_leaves_the_frame(frame, page):
    frame.get_by_role("link", name="This run in Airflow").click()
    page.wait_for_url("**/dags/fast_cpt/runs/a%3Arun")


def test_a_phone_shows_the_page_without_scrolling_sideways(frame):
    width = frame.locator("html").evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert width[0] == width[1] <= 360
