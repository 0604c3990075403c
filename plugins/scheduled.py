"""The first task of a schedule's run: checks whether there are new documents to train on.

It compares the documents folder with the documents in the record of the schedule's last successful run, so
nothing is lost by a missed slot or a failed run.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Context, get_current_context
from airflow.sdk.exceptions import AirflowSkipException

from fastcpt.files import HOME, read_json
from fastcpt.reporting.record import RecordError, read
from fastcpt.schedules import FILE, read_schedules

# A slot that starts later than this was missed, unless it waited for the previous run.
LATE = timedelta(hours=1)


def look_for_new(name: str) -> dict[str, Any]:
    """The form's values for a run of the schedule; skips with the reason if no run is due."""
    from fastcpt.corpus.documents import list_parts
    from fastcpt.corpus.new_documents import arrived, state_of, text_bytes
    from fastcpt.planning.plan import estimated_tokens

    context = get_current_context()
    run = context["dag_run"]
    if _was_missed(context):
        raise AirflowSkipException(
            f"{name}: the time {run.run_after:%Y-%m-%d %H:%M} passed while Airflow was down or the "
            "schedule paused: it is not made up for, the next one looks for all that is new"
        )
    schedule = read_schedules(HOME / FILE)[name]
    recipe = schedule.load_recipe()
    last = last_success(HOME, name)
    before = read_json(last / "documents.json") if last else {}
    new = arrived(before, state_of(list_parts(recipe.documents)))
    tokens = estimated_tokens(text_bytes(new), recipe) if new else 0
    since = f"since {_time_of(last):%Y-%m-%d %H:%M}" if last else "and no run before"
    found = f"{name}: {len(new)} new or changed files, about {tokens:,} tokens, {since}"
    if tokens < schedule.at_least.new_tokens:
        raise AirflowSkipException(f"{found}: fewer than {schedule.at_least.new_tokens:,}")
    if last and run.run_after - _time_of(last) < timedelta(days=schedule.at_least.days):
        raise AirflowSkipException(f"{found}: less than {schedule.at_least.days:g} days ago")
    print(found)
    return {
        "recipe": schedule.recipe,
        "overrides": schedule.overrides,
        "require_approval": schedule.require_approval,
    }


def run_id(name: str) -> str:
    """The template for the id of a schedule's runs of ``fast_cpt``: its name and time."""
    return f"{name}__{{{{ dag_run.run_after.isoformat() }}}}"


def last_success(home: Path, name: str) -> Path | None:
    """The record of the schedule's newest successful run with a list of its documents."""
    records = (home / "runs").glob(f"{name}__*")
    return max(filter(_succeeded, records), key=_time_of, default=None)


def _succeeded(record: Path) -> bool:
    try:
        state = read(record, "run.json").get("state")
    except RecordError:  # another run's damaged record must not affect this one
        return False
    return state == "success" and (record / "documents.json").exists()


def _time_of(record: Path) -> datetime:
    """The scheduled time of a run, with which its id ends."""
    time = datetime.fromisoformat(read(record, "run.json")["run"].partition("__")[2])
    return time.astimezone(UTC)


def _was_missed(context: Context) -> bool:
    run: Any = context["dag_run"]
    late = run.start_date - run.run_after
    if run.run_type != "scheduled" or run.clear_number or late < LATE:
        return False
    before: Any = context["ti"].get_previous_dagrun()
    return not (before and before.end_date and before.end_date > run.run_after)
