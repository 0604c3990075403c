"""The pages of run records, also where a file of one is damaged."""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import run_pages
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three runs, of which the second one will be damaged."""
    for run in ("first", "second", "third"):
        records.open_record(tmp_path, run, "fast_cpt", load_recipe("sample"))
    return tmp_path


def rows(page: str) -> dict[str, str]:
    """The text of each row but the header, by the text of its link."""
    found = re.findall(r'<tr><td><a href="[^"]*">([^<]*)</a></td>(.*?)</tr>', page)
    return {name: re.sub(r"<[^>]*>", " ", row) for name, row in found}


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("run.json", b'{"run": "sec', "run.json is damaged: Unterminated string"),
        ("run.json", b"", "run.json is damaged: Expecting value"),
        ("run.json", b"[1]", "run.json is damaged: it holds no named values"),
        ("run.json", b"\xff\xfe{}", "run.json is damaged: 'utf-8' codec"),
        ("run.json", b'{"ended": 5, "started": 7}', "something unexpected: TypeError"),
        ("recipe.yaml", b"name: [\n", "recipe.yaml is damaged: recipe.yaml:2: not valid YAML"),
        ("recipe.yaml", b"just words", "recipe.yaml is damaged: it holds no named values"),
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
        assert "<script" not in page
        assert hostile in html.unescape(page)
