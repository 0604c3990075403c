"""How the page "New run" handles choices: messages at their fields, a plan, and the request that starts the run."""

from __future__ import annotations

import html
import re
from pathlib import Path

import new_run
from fastcpt.corpus.sample import generate_sample
from fastcpt.recipe import recipe_names
from fastcpt.recipe_form import FORM


def test_the_page_has_every_recipe_and_every_field() -> None:
    page = new_run.form_page()
    assert re.findall(r'<option value="(\w+)"', page) == recipe_names()
    for name in FORM:
        assert f'name="{name}"' in page
        assert f'for="{name}"' in page


def test_choices_become_a_plan_and_what_starts_the_run(tmp_path: Path) -> None:
    generate_sample(tmp_path / "sample", documents=20)
    documents = str(tmp_path / "sample" / "parsed")
    typed = {
        "recipe": "sample",
        "documents": documents,
        "max_steps": "30",
        "require_approval": True,
    }
    answer = new_run.checked(tmp_path, typed)
    assert (answer["wrong"], answer["problems"]) == ({}, [])
    assert answer["own"]["max_steps"] == "120"
    assert answer["conf"] == {
        "recipe": "sample",
        "documents": documents,
        "max_steps": 30,
        "require_approval": True,
        "run_even_if_plan_says_no": False,
    }
    assert "in 30 steps" in answer["plan"]
    assert "MB of text" in answer["plan"]


def test_wrong_values_are_told_at_their_fields_and_start_nothing(tmp_path: Path) -> None:
    typed = {"recipe": "sample", "max_steps": "many", "gpus": "0", "budget_hours": "-1"}
    answer = new_run.checked(tmp_path, typed)
    assert set(answer["wrong"]) == {"max_steps", "gpus", "budget_hours"}
    assert "greater than or equal to 1" in answer["wrong"]["gpus"]
    assert "conf" not in answer
    assert "conf" not in new_run.checked(tmp_path, {"recipe": "../../etc/passwd"})


def test_a_plan_that_does_not_fit_names_what_would(tmp_path: Path) -> None:
    answer = new_run.checked(tmp_path, {"recipe": "cpt_config_fast", "documents": "/not/here"})
    words = html.unescape(re.sub(r"<[^>]*>", " ", answer["plan"]))
    assert "The plan does not fit." in words
    assert "What would fit" in words
    assert "not seen from here" in words
    assert "conf" in answer  # the run itself refuses it, or goes on where it is told to
