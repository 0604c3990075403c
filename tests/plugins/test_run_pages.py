"""The pages of run records, also if a file is damaged."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import gpu_turns
import run_pages
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from run_tasks import TaskNow


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three runs, of which the second one will be damaged."""
    for run in ("first", "second", "third"):
        records.open_record(tmp_path, run, "fast_cpt", load_recipe("sample"))
    return tmp_path


def rows(page: str) -> dict[str, str]:
    """The text of each row but the header, by the text of its link."""
    found = re.findall(r'<td><a href="run/[^"]*">([^<]*)</a></td>(.*?)</tr>', page)
    return {name: re.sub(r"<[^>]*>", " ", row) for name, row in found}


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("run.json", b'{"run": "sec', "run.json is damaged: Unterminated string"),
        ("run.json", b"", "run.json is damaged: Expecting value"),
        ("run.json", b"[1]", "run.json is damaged: not a mapping of names to values"),
        ("run.json", b"\xff\xfe{}", "run.json is damaged: 'utf-8' codec"),
        ("run.json", b'{"ended": 5, "started": 7}', "something unexpected: TypeError"),
        ("recipe.yaml", b"name: [\n", "recipe.yaml is damaged: recipe.yaml:2: not valid YAML"),
        ("recipe.yaml", b"just words", "recipe.yaml is damaged: not a mapping of names to values"),
        ("recipe.yaml", b"name: \xff", "recipe.yaml is damaged: recipe.yaml: not UTF-8"),
        ("gate.json", b'{"value": 3}', "something unexpected: KeyError: 'passed'"),
    ],
)
def test_a_damaged_record_spoils_its_own_row_alone(
    home: Path, file: str, content: bytes, why: str
) -> None:
    (records.record_folder(home, "second") / file).write_bytes(content)
    seen = rows(run_pages.list_page(home))
    assert len(seen) == 3
    for run in ("first", "third"):
        assert "not ended" in seen[run]
        assert "sample" in seen[run]
    (spoilt,) = (text for name, text in seen.items() if name.startswith("second"))
    assert "damaged" in spoilt
    assert why in html.unescape(spoilt)


def test_the_page_of_a_damaged_record_says_so(home: Path) -> None:
    record = records.record_folder(home, "second")
    (record / "recipe.yaml").write_text("a: 1\na: 2\n")
    assert "This record is damaged: recipe.yaml is damaged" in run_pages.run_page(record)


def test_a_task_of_a_run_with_a_damaged_record_has_no_button(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_pages, "HOME", home)
    key = SimpleNamespace(run_id="second", dag_id="fast_cpt")
    link = run_pages.RunRecordLink()
    assert "second" in link.get_link(None, ti_key=key)
    (records.record_folder(home, "second") / "run.json").write_text("{")
    assert link.get_link(None, ti_key=key) == ""


def test_what_a_user_named_a_run_is_shown_not_run(tmp_path: Path) -> None:
    hostile = "\"><script>alert('run')</script>"
    record = records.open_record(tmp_path, hostile, "fast_cpt", load_recipe("sample"))
    for page in (run_pages.list_page(tmp_path), run_pages.run_page(record)):
        assert re.findall(r"<script[^>]*>", page) == [f'<script src="{home_of(page)}pages.js">']
        assert hostile in html.unescape(page)


def home_of(page: str) -> str:
    """How a page names the folder of all pages: a run's is one below."""
    return "../" if "All runs" in page else "./"


def test_a_run_that_its_plan_refused_is_in_the_list_and_says_why_at_the_top(tmp_path: Path) -> None:
    records.add_failure(
        tmp_path, "refused", "fast_cpt", "plan", "documents.path: /x does not exist"
    )
    record = records.record_folder(tmp_path, "refused")
    records.close_record(record, "failed")
    assert "failed" in rows(run_pages.list_page(tmp_path))["refused"]
    page = run_pages.run_page(record, lambda dag, run: [TaskNow("plan", "failed")])
    top = page[: page.index("<h2>Summary")]
    assert "documents.path: /x does not exist" in top
    assert "Nothing was spent." in top
    assert 'href="/dags/fast_cpt/runs/refused/tasks/plan"' in top
    # cleared, and not failed again so far
    assert "does not exist" not in run_pages.run_page(
        record, lambda dag, run: [TaskNow("plan", "running")]
    )


def test_a_run_that_trains_shows_its_step_and_what_is_left(home: Path) -> None:
    record = records.record_folder(home, "first")
    plan = {"hours": {"low": 1.0, "high": 4.0}, "cost": {"low": 2.0, "high": 8.0}}  # 2 USD an hour
    records.add(record, "plan.json", plan)
    row = {"step": 30, "loss": 2.5, "tokens_per_s_per_gpu": 100.0, "hours_left": 1.5, "cost": 0.75}
    records.add_text(record, "train_cpt/metrics.jsonl", json.dumps(row) + "\n")
    news = {"state": "running", "why": "", "line": "step 30/120 loss 2.5", "at": time.time()}
    records.add(record, "live/train_cpt.json", news)
    page = run_pages.run_page(record, lambda dag, run: [TaskNow("train_cpt", "deferred")])
    seen = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "train_cpt: step 30 of 120" in seen
    assert "tokens/s 200" in seen  # two ranks
    assert "time left for this training 1 h 30 min" in seen
    assert "cost of this training so far $0.75" in seen
    assert "cost left for this training $3.00" in seen
    assert "Its last line, 0 s ago: step 30/120 loss 2.5" in seen
    assert "data-refresh" in page
    records.close_record(record, "success")
    assert "data-refresh" not in run_pages.run_page(record)


@pytest.mark.parametrize(
    ("state", "news", "words"),
    [
        ("awaiting_input", {}, "waits for a person to approve the plan"),
        ("deferred", {"state": "queued", "why": "Priority"}, "waits on the GPU host: Priority"),
        ("up_for_retry", {}, "is tried again"),
    ],
)
def test_a_run_says_what_it_waits_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, state: str, news: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(gpu_turns, "HOME", home)
    record = records.record_folder(home, "first")
    if news:
        records.add(record, "live/train_cpt.json", {**news, "line": "", "at": time.time()})
    page = run_pages.run_page(record, lambda dag, run: [TaskNow("train_cpt", state)])
    assert words in page


def test_a_run_in_the_queue_says_who_has_the_gpus(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_turns, "HOME", home)
    for run in ("second", "first"):
        gpu_turns.take("gpu1:22", "fast_cpt", run, goes_on=lambda dag, run: True)
    record = records.record_folder(home, "first")
    page = run_pages.run_page(record, lambda dag, run: [TaskNow("train_cpt", "deferred")])
    assert "train_cpt waits for the GPUs: run second of fast_cpt has them since 20" in page


def test_the_list_sorts_and_filters(home: Path) -> None:
    for run, perplexity in (("first", 12.0), ("third", 9.0)):
        gate = {"decision": "pass", "passed": True, "value": perplexity, "threshold": 18.0}
        records.add(records.record_folder(home, run), "gate.json", gate)
    records.close_record(records.record_folder(home, "third"), "success")

    def shown(**chosen: str) -> list[str]:
        return list(rows(run_pages.list_page(home, run_pages.Choice(**chosen))))

    assert shown(sort="perplexity") == ["third", "first", "second"]
    assert shown(sort="-perplexity") == ["first", "third", "second"]  # without one: last
    assert shown(text="FIR") == ["first"]
    assert shown(state="success") == ["third"]
    assert shown(text="nothing") == []


def test_runs_beside_each_other_show_where_their_recipes_differ(home: Path) -> None:
    record = records.open_record(
        home, "longer", "fast_cpt", load_recipe("sample", {"training.max_steps": 240})
    )
    names = [records.record_folder(home, "first").name, record.name]
    page = run_pages.compare_page(home, [*names, "../outside", names[0]])
    assert "2 Fast CPT runs beside each other" in page
    differences = page[page.index("Where the recipes differ") :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", differences)
    assert cells[:4] == ["", "training.max_steps", "120", "240"]
    assert "Choose 2 to 5 runs" in run_pages.compare_page(home, names[:1])
