"""axe-core finds nothing in any page of the project's own: light, dark, on a phone. Without Airflow, which is slow.

With ``--pictures FOLDER`` each page is kept as ``<page>_<look>.png``: the docs' pictures are made so (``make pictures``).
"""

import json
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

import new_run
import run_pages
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from fastcpt.reporting.pages import TEMPLATES
from reporting.conftest import finished_record, write_metrics
from run_tasks import TaskNow

pytestmark = [pytest.mark.slow, pytest.mark.linux("Debian's Chromium")]

HOST = "http://pages.test/"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOOKS = {"light": ("light", DESK), "dark": ("dark", DESK), "phone": ("light", PHONE)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each page by its name: what Airflow's server would answer."""
    folder = tmp_path_factory.mktemp("pages")
    home = folder / "home"
    finished = finished_record(home, folder)
    going = records.open_record(home, "going", "fast_cpt", load_recipe("sample"))
    write_metrics(folder / "metrics.jsonl", first_loss=8.0, steps=40)
    records.add(going, "train_cpt/metrics.jsonl", folder / "metrics.jsonl")
    failed = records.open_record(home, "failed", "fast_cpt", load_recipe("sample"))
    records.add_failure(home, "failed", "fast_cpt", "plan", "documents.path: no such folder")
    records.close_record(failed, "failed")
    waits = [TaskNow("train_cpt", "running"), TaskNow("approve_plan", "awaiting_input")]
    return {
        "list": run_pages.list_page(home),
        "finished": run_pages.run_page(finished),
        "going": run_pages.run_page(going, lambda dag, run: waits),
        "failed": run_pages.run_page(failed),
        "compare": run_pages.compare_page(home, [finished.name, going.name]),
        "new": new_run.form_page(),
    }


@pytest.fixture(params=LOOKS)
def opened(request, browser, pages, tmp_path):
    """Opens a page by its name in one of the looks, with all that it folds away unfolded."""
    scheme, viewport = LOOKS[request.param]
    context = browser.new_context(color_scheme=scheme, viewport=viewport)
    tab = context.new_page()

    def answer(route):
        name = route.request.url.removeprefix(HOST)
        if name.endswith(".js"):
            script = (TEMPLATES / name.rpartition("/")[2]).read_text()
            route.fulfill(body=script, content_type="text/javascript")
        elif name.endswith("judge"):
            told = new_run.checked(tmp_path, json.loads(route.request.post_data))
            route.fulfill(json=told)
        else:
            route.fulfill(body=pages[name.partition("/")[0]], content_type="text/html")

    tab.route(f"{HOST}**", answer)

    def open_page(name):
        tab.goto(f"{HOST}{name}/page")
        if name == "new":
            tab.locator("#plan table").first.wait_for()
        is_dark = tab.evaluate("document.documentElement.classList.contains('dark')")
        assert is_dark == (scheme == "dark")
        if folder := request.config.getoption("--pictures"):
            tab.screenshot(path=Path(folder) / f"{name}_{request.param}.png")
        tab.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        return tab

    yield open_page
    context.close()


@pytest.mark.parametrize("name", ["list", "finished", "going", "failed", "compare", "new"])
def test_axe_finds_nothing_and_no_page_scrolls_sideways(opened, name):
    tab = opened(name)
    found = Axe().run(tab).response["violations"]
    told = [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]
    assert told == []
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= tab.viewport_size["width"]
