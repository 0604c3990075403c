"""schedules.yaml: its content, and its errors, each with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcpt.schedules import SchedulesError, read_schedules

GOOD = """\
weekly:
  time: "0 3 * * 6"
  timezone: Europe/Brussels
  recipe: cpt_config_fast
  overrides:
    documents.path: /documents/law
    budget.money: 400
  at_least: {new_tokens: 5_000_000, days: 7}
  require_approval: true
monthly-lora:
  time: "@monthly"
  recipe: cpt_lora_config
  overrides: {documents.path: /documents/law}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "schedules.yaml").write_text(text)
    return folder / "schedules.yaml"


def test_several_schedules_each_with_recipe_overrides_time_and_condition(tmp_path: Path) -> None:
    found = read_schedules(written(tmp_path, GOOD))
    assert list(found) == ["weekly", "monthly-lora"]
    weekly, monthly = found.values()
    assert (weekly.time, weekly.timezone) == ("0 3 * * 6", "Europe/Brussels")
    recipe = weekly.load_recipe()
    assert (recipe.name, recipe.documents.path) == ("cpt_config_fast", "/documents/law")
    assert recipe.budget.money == 400
    assert (weekly.at_least.new_tokens, weekly.at_least.days) == (5_000_000, 7)
    assert weekly.require_approval
    assert (monthly.timezone, monthly.at_least.new_tokens, monthly.at_least.days) == ("UTC", 1, 0)
    assert not monthly.require_approval


def test_no_file_and_an_empty_one_are_no_schedules(tmp_path: Path) -> None:
    assert read_schedules(tmp_path / "schedules.yaml") == {}
    assert read_schedules(written(tmp_path, "# none yet\n")) == {}


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('"0 3 * * 6"', '"0 30 * * 6"', "schedules.yaml:2: weekly.time: no cron expression"),
        ("Europe/Brussels", "Brussels", "schedules.yaml:3: weekly.timezone: no time zone"),
        ("cpt_config_fast", "cpt_config_fats", "schedules.yaml:4: weekly: no recipe"),
        ("  timezone:", "  timezon:", "schedules.yaml:3: weekly.timezon: unknown key; did you"),
        ("days: 7", "day: 7", "schedules.yaml:8: weekly.at_least.day: unknown key; did you"),
        ("5_000_000", "0", "schedules.yaml:8: weekly.at_least.new_tokens: Input should be g"),
        ("budget.money", "budget.mony", "schedules.yaml:7: weekly: override: unknown key"),
        ("money: 400", "money: much", "schedules.yaml:7: weekly: override: budget.money: Input"),
        ("documents.path: /documents/law\n    b", "b", "weekly: its recipe names no documents"),
        ("budget.money: 400", "budget: {money: 400}", "'budget.money', not 'budget'"),
        ("monthly-lora:", "Monthly_LoRA:", "schedules.yaml:10: Monthly_LoRA: a schedule's name"),
        ("monthly-lora:", "weekly:", "schedules.yaml:10: the key 'weekly' stands here again"),
        ('  time: "@monthly"\n', "", "schedules.yaml:10: monthly-lora.time: Field required"),
        (GOOD, "- weekly\n", "schedules.yaml:1: schedules: Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_field(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    assert right in GOOD
    with pytest.raises(SchedulesError) as refused:
        read_schedules(written(tmp_path, GOOD.replace(right, wrong, 1)))
    (line,) = str(refused.value).splitlines()
    assert message in line
