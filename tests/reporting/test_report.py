"""The report: complete, self-contained, and safe whatever the record contains."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from fastcpt import __version__
from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.reporting import record as records
from fastcpt.reporting.report import write_report
from fastcpt.reporting.summary import summary_text


@pytest.fixture
def page(finished):
    return write_report(finished).read_text()


def test_the_page_has_every_section(page):
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Summary",
        "Perplexity and the gate",
        "Training",
        "Fine-tuning",
        "Corpus",
        "Plan and actual figures",
        "Published claim and this run",
        "Outputs",
        "Versions",
        "Recipe",
    ]


def test_the_page_needs_nothing_else(page):
    links = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            links.extend(value for name, value in attrs if name in ("src", "href", "xlink:href"))
            assert tag not in ("script", "link", "iframe", "img")

    Tags().feed(page)
    # Inside a picture, marks refer to shapes of the same picture.
    assert all(link.startswith("#") for link in links)
    assert "url(http" not in page
    assert page.count("<svg") == 3


def test_the_version_is_in_page_and_markdown(finished, page):
    assert f"| Fast CPT | {__version__} |" in (finished / "report.md").read_text()
    # a commit's name of digits alone makes the column one of numbers
    assert re.search(rf"<td[^>]*>{re.escape(__version__)}</td>", page)


def test_figures_are_in_page_and_markdown(finished, page):
    markdown = (finished / "report.md").read_text()
    for figure in ("2,081.00", "11.25", "21.50", "402,000", "1.04", "0.612 (0.587 to 0.640)"):
        assert figure in page
        assert figure in markdown
    assert (
        "After stage 2: 11.25, base model 2,081.00; below the gate&#39;s 18 (random validation set)."
        in page
    )
    # Claim, plan and the run's own side by side: 5400 + 1800 + 450 s are 2.125 h.
    assert "| time | 4-6 h | 75.50 to 140.00 h | 2.12 h |" in markdown
    assert "| cost | $180 | $1,208.00 to $2,240.00 | $34.00 |" in markdown


def test_questions_stand_beside_the_base_models_with_their_intervals(finished):
    def row(value, gain=None):
        figures = {"asked": 200, "value": value, "low": value - 0.05, "high": value + 0.05}
        return figures if gain is None else {**figures, "gain": gain}

    gain = {"value": 0.125, "low": 0.03125, "high": 0.25}
    asked = {
        "model": {"table": {"date": row(0.5, gain), "all": row(0.5, gain)}},
        "base": {"table": {"date": row(0.375), "all": row(0.375)}},
    }
    evaluation = json.loads((finished / "evaluation_stage2.json").read_text())
    write_json(finished / "evaluation_stage2.json", {**evaluation, "questions": asked})
    write_report(finished)
    assert (
        "| date | 200 | 37.5 % (32.5 % to 42.5 %) | 50.0 % (45.0 % to 55.0 %) | 12.5 % (3.1 % to 25.0 %) |"
    ) in (finished / "report.md").read_text()
    assert (
        "questions  50.0 % (45.0 % to 55.0 %) right of 200, "
        "gain over the base 12.5 % (3.1 % to 25.0 %); a guess 25 %"
    ) in summary_text(finished)


def test_areas_years_and_forgetting_stand_beside_the_base_model(finished):
    evaluation = json.loads((finished / "evaluation_stage2.json").read_text())
    for file, value in (("evaluation.json", 30.0), ("evaluation_stage2.json", 12.5)):
        by = {"perplexity": value, "tokens": 4_096}
        base = {"perplexity": 99.0, "tokens": 4_096}
        adapter = {"adapter": {"perplexity": 8.25, "tokens": 512}, "base": base}
        figures = {
            "model": {**by, "by_area": {"privacy": by}, "by_year": {"2016": by}},
            "base": {**base, "by_area": {"privacy": base}, "by_year": {"2016": base}},
            "adapters": {"market": adapter},
        }
        (finished / file).write_text(json.dumps({**evaluation, "general": figures}))
    write_report(finished)
    page = (finished / "report.md").read_text()
    assert "| general | area privacy | 99.00 | 12.50 | 4,096 |" in page
    assert "| general | year 2016 | 99.00 | 12.50 | 4,096 |" in page
    assert "| general | adapter market, on its area | 99.00 | 8.25 | 512 |" in page
    assert "| general | base model | 99.00 |" in page


def test_the_plan_stands_beside_what_the_run_took(finished, page):
    lines = (finished / "report.md").read_text().splitlines()
    begin = lines.index("## Plan and actual figures")
    assert lines[begin + 2] == "The plan's rate: this project's measurements on H100."
    assert lines[begin + 4] == "|  | plan | this run | outside the plan by |"
    assert lines[begin + 6 : begin + 11] == [
        "| tokens/s, all GPUs | 9,300 to 17,300 | 4,938 | -47 % |",
        "| cost (USD) | 1,208 to 2,240 | 1,300 | as planned |",
        "| memory per GPU (GB) | 150 | 61.2 | -59 % |",
        "| hours of evaluation | unknown | 0.25 |  |",
        "| hours of fine-tuning | 0.5 |  |  |",
    ]
    assert "<td>as planned</td>" in page


def test_markdown_shows_its_pictures(finished, page):
    names = re.findall(r"!\[.*?\]\((.*?)\)", (finished / "report.md").read_text())
    assert names == ["perplexity.svg", "training.svg", "funnel.svg"]
    for name in names:
        assert ElementTree.parse(finished / name).getroot().tag.endswith("svg")


def test_base_and_trained_model_answer_side_by_side(page):
    shown = re.findall(
        r'<section aria-label="([^"]+)"><strong>[^<]+</strong><pre>([^<]*)</pre>', page
    )
    assert shown == [
        ("prompt", "Summarise &lt;this&gt;"),
        ("base model", "this this this"),
        ("fine-tuned model", "It | lays down"),
        ("reference", "It"),
    ]


def test_what_a_record_holds_is_shown_not_run(finished):
    hostile = "<script>alert(1)</script>| `x` \n# heading"
    sft = records.read(finished, "evaluation_sft.json")
    records.add(finished, "evaluation_sft.json", {**sft, "samples": [{"prompt": hostile}]})
    records.add_output(finished, "build", {"path": hostile, "digest": hostile})
    page = write_report(finished).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    markdown = (finished / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| build")]
    assert len(rows) == 1
    assert "<script" not in rows[0]
    assert "\n# heading" not in markdown


def test_a_run_that_failed_early_gets_a_report(home):
    record = records.open_record(home, "early", "fast_cpt", load_recipe("sample"))
    records.close_record(record, "failed")
    page = write_report(record).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Summary", "Versions", "Recipe"]
    assert ">None<" not in page


def test_writing_again_gives_the_same_page(finished, page):
    assert write_report(finished).read_text() == page
