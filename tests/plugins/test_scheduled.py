"""Whether a schedule starts a run: what is new since the last successful one, and what is not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException
from airflow.sdk.execution_time.context import set_current_context

import scheduled
from fastcpt.files import read_json
from fastcpt.reporting.record import close_record

if TYPE_CHECKING:
    from conftest import Run

SATURDAY = datetime(2026, 11, 21, 3, tzinfo=UTC)
WEEK = timedelta(days=7)


class Schedule:
    """The schedule ``weekly`` on the run's documents, and the runs that it leads to."""

    def __init__(self, run: Run, home: Path) -> None:
        self.run, self.home = run, home
        self.late, self.kind, self.clears = timedelta(0), "scheduled", 0
        self.ended_before: datetime | None = None
        self.write(new_tokens=1)

    def write(self, **at_least: float) -> None:
        overrides = {"documents.path": str(self.run.documents), "budget.money": 400}
        schedule = {"time": "0 3 * * 6", "recipe": "sample", "overrides": overrides}
        self.home.mkdir(exist_ok=True)
        content = {"weekly": {**schedule, "at_least": at_least}}
        (self.home / "schedules.yaml").write_text(json.dumps(content))  # JSON is YAML

    def add(self, name: str, characters: int) -> None:
        (self.run.documents / name).write_text("x" * characters)

    def look(self, time: datetime) -> dict[str, Any]:
        previous = self.ended_before and SimpleNamespace(end_date=self.ended_before)
        dag_run = SimpleNamespace(
            run_after=time,
            start_date=time + self.late,
            run_type=self.kind,
            clear_number=self.clears,
        )
        task = SimpleNamespace(get_previous_dagrun=lambda: previous)
        with set_current_context({"ti": task, "dag_run": dag_run}):  # type: ignore[typeddict-item]
            return scheduled.look_for_new("weekly")

    def skipped(self, time: datetime) -> str:
        with pytest.raises(AirflowSkipException) as reason:
            self.look(time)
        assert "\n" not in str(reason.value)
        return str(reason.value)

    def train(self, time: datetime, state: str) -> Path:
        """What the run of fast_cpt leaves that this time led to."""
        self.run.params |= {"documents": None, **self.look(time)}
        self.run.run_id = self.run.context["run_id"] = f"weekly__{time.isoformat()}"
        record = Path(self.run.step("plan")["record"])
        close_record(record, state)
        return record

    def leave_damaged(self, time: datetime) -> None:
        """A record of such a run whose ``run.json`` can no longer be read."""
        record = self.home / "runs" / f"weekly__{time:%Y}-damaged"
        record.mkdir(parents=True)
        (record / "run.json").write_text("{")


@pytest.fixture
def schedule(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    monkeypatch.setattr(scheduled, "HOME", tmp_path / "home")
    return Schedule(run, tmp_path / "home")


def test_the_first_time_leads_to_a_run_of_the_recipe_with_its_overrides(schedule: Schedule) -> None:
    record = schedule.train(SATURDAY, "success")
    recipe = (record / "recipe.yaml").read_text()
    assert f"path: {schedule.run.documents}" in recipe
    assert "money: 400" in recipe
    assert len(read_json(record / "documents.json")) == len(list(schedule.run.documents.iterdir()))


def test_nothing_new_is_skipped_with_one_line(schedule: Schedule) -> None:
    schedule.train(SATURDAY, "success")
    assert schedule.skipped(SATURDAY + WEEK) == (
        "weekly: 0 new or changed files, about 0 tokens, since 2026-11-21 03:00: fewer than 1"
    )


def test_a_run_that_failed_took_nothing(schedule: Schedule) -> None:
    schedule.train(SATURDAY, "success")
    schedule.add("new.jsonl", 4_400)
    schedule.train(SATURDAY + WEEK, "failed")
    assert schedule.look(SATURDAY + 2 * WEEK)["recipe"] == "sample"
    schedule.train(SATURDAY + 2 * WEEK, "success")
    assert "0 new" in schedule.skipped(SATURDAY + 3 * WEEK)


def test_what_comes_while_a_run_goes_on_is_new_afterwards(schedule: Schedule) -> None:
    record = schedule.train(SATURDAY, "running")
    schedule.add("new.jsonl", 4_400)
    close_record(record, "success")
    assert schedule.look(SATURDAY + WEEK)


def test_fewer_new_tokens_than_wanted_wait_until_they_are_enough(schedule: Schedule) -> None:
    schedule.train(SATURDAY, "success")
    # 4.4 characters per token, and the sample's recipe takes nine of ten
    schedule.write(new_tokens=1_800)
    schedule.add("new.jsonl", 4_400)
    said = schedule.skipped(SATURDAY + WEEK)
    assert "1 new or changed files, about 900 tokens" in said
    assert said.endswith("fewer than 1,800")
    schedule.add("more.jsonl", 4_400)
    assert schedule.look(SATURDAY + 2 * WEEK)


def test_days_count_from_time_to_time_however_late_a_run_began(schedule: Schedule) -> None:
    schedule.write(days=14)
    schedule.train(SATURDAY, "success")
    schedule.add("new.jsonl", 4_400)
    assert schedule.skipped(SATURDAY + WEEK).endswith("less than 14 days ago")
    assert schedule.look(SATURDAY + 2 * WEEK)


def test_a_damaged_record_of_an_earlier_run_stops_no_schedule(schedule: Schedule) -> None:
    schedule.train(SATURDAY, "success")
    schedule.leave_damaged(SATURDAY + WEEK)
    assert "0 new" in schedule.skipped(SATURDAY + 2 * WEEK)


def test_another_schedules_runs_do_not_count(schedule: Schedule) -> None:
    record = schedule.train(SATURDAY, "success")
    record.rename(record.with_name(record.name.replace("weekly", "weekly-law")))
    assert schedule.look(SATURDAY + WEEK)


def test_a_time_that_was_missed_is_not_made_up_for(schedule: Schedule) -> None:
    schedule.late = timedelta(days=2)
    assert "2026-11-21 03:00 passed while Airflow was down" in schedule.skipped(SATURDAY)
    schedule.ended_before = SATURDAY - timedelta(days=6)
    assert "passed while" in schedule.skipped(SATURDAY)


@pytest.mark.parametrize("why", ["waited", "cleared", "triggered"])
def test_a_time_that_waited_or_that_a_person_wants_is_no_missed_one(
    schedule: Schedule, why: str
) -> None:
    schedule.late = timedelta(days=2)
    if why == "waited":
        schedule.ended_before = SATURDAY + timedelta(days=2)
    elif why == "cleared":
        schedule.clears = 1
    else:
        schedule.kind = "manual"
    assert schedule.look(SATURDAY)
