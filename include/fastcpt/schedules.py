"""``schedules.yaml``: which recipe runs again when, and how much has to be new.

    weekly:                            # the DAG fast_cpt_weekly
      time: "0 3 * * 6"                # cron, or @daily, @weekly, @monthly
      timezone: Europe/Brussels        # UTC without it
      recipe: cpt_config_fast
      overrides: {documents.path: /documents/law, cluster.connection: gpu_cluster}
      at_least: {new_tokens: 5_000_000, days: 7}
      require_approval: true           # false without it

Everything is checked when the file is read, including the recipe with its overrides.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import croniter
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from fastcpt.recipe import Recipe, RecipeError, load_recipe
from fastcpt.recipe_sections import Section
from fastcpt.yaml_files import YamlError, read_yaml_lines

FILE = "schedules.yaml"  # in HOME


class SchedulesError(ValueError):
    """The file cannot be used; the message has one line per problem: file, line, field, what to do."""


class AtLeast(Section):
    """What has to be new since the schedule's last successful run; all given conditions must hold."""

    new_tokens: int = Field(1, ge=1, description="Estimated, as the plan estimates them.")
    days: float = Field(0.0, ge=0.0, le=3660.0, description="From one run's time to the next's.")


class Schedule(Section):
    time: str
    timezone: str = "UTC"
    recipe: str
    overrides: dict[str, Any] = Field(default={}, description="Dotted keys of the recipe.")
    at_least: AtLeast = AtLeast()
    require_approval: bool = False

    @field_validator("time")
    @classmethod
    def is_a_time(cls, time: str) -> str:
        if not croniter.is_valid(time):
            raise ValueError(
                'no cron expression: five fields as in "0 3 * * 6" (Saturdays at 3:00), or @weekly'
            )
        return time

    @field_validator("timezone")
    @classmethod
    def is_a_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no time zone: a name as Europe/Brussels, or UTC") from None
        return name

    def load_recipe(self) -> Recipe:
        """The recipe of its runs."""
        return load_recipe(self.recipe, self.overrides)


# part of a DAG's id and, before "__", of a run's: no underscore
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,49}$")]
SCHEDULES = TypeAdapter(dict[Name, Schedule])
Lines = dict[tuple[str, ...], int]


def read_schedules(path: Path) -> dict[str, Schedule]:
    """The schedules by name; empty if there is no file. Raises ``SchedulesError``."""
    if not path.exists():
        return {}
    try:
        content, lines = read_yaml_lines(path)
    except YamlError as error:
        raise SchedulesError(str(error)) from error
    if content is None:
        return {}
    try:
        schedules = SCHEDULES.validate_python(content)
    except ValidationError as error:
        raise SchedulesError(
            "\n".join(_problem(path.name, lines, item) for item in error.errors())
        ) from error
    problems = [
        f"{path.name}:{_line(lines, keys)}: {name}: {problem}"
        for name, schedule in schedules.items()
        for keys, problem in _recipe_problems(name, schedule)
    ]
    if problems:
        raise SchedulesError("\n".join(problems))
    return schedules


def _recipe_problems(name: str, schedule: Schedule) -> list[tuple[tuple[str, ...], str]]:
    """The problems of the recipe and its overrides, each with its keys in the file."""
    for key, value in schedule.overrides.items():
        if key in Recipe.model_fields and isinstance(value, dict):
            wanted = f"overrides are dotted keys: '{key}.{next(iter(value), '...')}', not '{key}'"
            return [((name, "overrides", key), wanted)]
    try:
        recipe = schedule.load_recipe()
    except RecipeError as error:
        return [
            ((name, *_override_in(problem, schedule)), problem)
            for problem in str(error).splitlines()
        ]
    if not recipe.documents.path:
        missing = "its recipe names no documents: add documents.path to the overrides"
        return [((name, "overrides"), missing)]
    return []


def _override_in(problem: str, schedule: Schedule) -> tuple[str, ...]:
    found = [key for key in schedule.overrides if f" {key}:" in problem or f"'{key}'" in problem]
    return ("overrides", found[0]) if found else ("recipe",)


def _line(lines: Lines, keys: tuple[str, ...]) -> int:
    return next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), 1)


def _problem(file: str, lines: Lines, error: Any) -> str:
    """One of pydantic's errors as file, line, field and what to do."""
    keys = tuple(str(part) for part in error["loc"] if part != "[key]")
    where = f"{file}:{_line(lines, keys)}: {'.'.join(keys) or 'schedules'}"
    if error["loc"][-1:] == ("[key]",):
        return f"{where}: a schedule's name is small letters, digits and hyphens"
    if error["type"] == "extra_forbidden":
        known = list((AtLeast if "at_least" in keys[:-1] else Schedule).model_fields)
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    given = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{given}"
