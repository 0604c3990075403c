"""Run records in Airflow's UI: a list, a page for each, a comparison of two to five, and links.

The pages are a FastAPI app inside Airflow's API server and need the same login and permission as reading the
DAG's runs. Their content security policy allows only the project's own script, whatever a record contains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlencode, urlsplit

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperatorLink

from fastcpt.files import HOME
from fastcpt.reporting.compare import FEWEST, MOST, compare
from fastcpt.reporting.pages import TEMPLATES, page
from fastcpt.reporting.progress import progress
from fastcpt.reporting.record import RecordError, failures, read, record_folder
from fastcpt.reporting.report import sections
from fastcpt.reporting.summary import duration, summary
from run_tasks import TaskNow, task_lines, tasks_of

if TYPE_CHECKING:
    from fastapi import FastAPI

DAG = "fast_cpt"
PREFIX = "/fast-cpt-runs"
# Airflow may be served below a path; links of the UI need it.
ROOT = urlsplit(conf.get("api", "base_url", fallback="/")).path.rstrip("/")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# What a damaged record can raise: files that do not parse, values of unexpected types.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, OSError)

TasksOf = Callable[[str, str], Sequence[TaskNow]]


def records(home: Path) -> dict[str, Path]:
    """Every run record by its folder's name, newest first; damaged ones last."""
    runs = home / "runs"
    if not runs.is_dir():
        return {}
    folders = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()]
    folders.sort(key=_started, reverse=True)
    return {path.name: path for path in folders}


def _started(record: Path) -> str:
    try:
        return str(read(record, "run.json").get("started", ""))
    except DAMAGED:
        return ""


@dataclass(frozen=True)
class Row:
    """A run in the list, or why its record cannot be read (``damage``)."""

    name: str
    run: str
    damage: str = ""
    started: str = ""
    recipe: str = ""
    state: str = ""
    hours: float | None = None
    cost: float | None = None
    perplexity: float | None = None
    base: float | None = None
    branch: str = ""
    model: str = ""

    @property
    def hours_words(self) -> str:
        return "" if self.hours is None else duration(self.hours * 3600)

    @property
    def cost_words(self) -> str:
        return "" if self.cost is None else f"${self.cost:,.2f}"

    @property
    def perplexity_words(self) -> str:
        return _figure(self.perplexity)

    @property
    def base_words(self) -> str:
        return _figure(self.base)


# The list's columns: field, title, whether numeric.
COLUMNS = (
    ("run", "run", False),
    ("started", "started (UTC)", False),
    ("recipe", "recipe", False),
    ("state", "state", False),
    ("hours", "time", True),
    ("cost", "cost", True),
    ("perplexity", "perplexity", True),
    ("base", "base model", True),
    ("branch", "outcome", False),
)


@dataclass(frozen=True)
class Choice:
    """The list's filter and order; ``sort`` is a column's name, with ``-`` for descending."""

    text: str = ""
    state: str = ""
    sort: str = "-started"


def list_page(home: Path, chosen: Choice | None = None) -> str:
    """The table of all records. Links are relative: the page works under any prefix."""
    chosen = chosen or Choice()
    every = [_row(name, record) for name, record in records(home).items()]
    wanted = chosen.text.casefold()
    rows = [
        row
        for row in every
        if wanted in f"{row.run} {row.recipe} {row.model}".casefold()
        and chosen.state in ("", row.state)
    ]
    key = chosen.sort.removeprefix("-")
    if key in {name for name, _, _ in COLUMNS}:
        # rows without a value come last in both orders
        known = [row for row in rows if getattr(row, key) not in (None, "")]
        rest = [row for row in rows if getattr(row, key) in (None, "")]
        known.sort(key=lambda row: getattr(row, key), reverse=chosen.sort.startswith("-"))
        rows = known + rest
    columns = [_column(chosen, *column) for column in COLUMNS]
    return page(
        "runs.html",
        title="Fast CPT runs",
        home="./",
        rows=rows,
        total=len(every),
        chosen=chosen,
        columns=columns,
    )


def _column(chosen: Choice, name: str, title: str, number: bool) -> dict[str, Any]:
    """A column's header, with a link that sorts by it, or reverses the order if already sorted by it."""
    order = {name: "ascending", f"-{name}": "descending"}.get(chosen.sort)
    sort = f"-{name}" if order == "ascending" or (order is None and number) else name
    link = "?" + urlencode({"text": chosen.text, "state": chosen.state, "sort": sort})
    return {"title": title, "number": number, "order": order, "link": link}


def _row(name: str, record: Path) -> Row:
    try:
        facts = summary(record)
        return Row(
            name=name,
            run=str(facts["run"] or name),
            started=_started(record)[:16].replace("T", " "),
            recipe=str(facts["recipe"] or ""),
            state=str(facts["state"] or "not ended"),
            hours=None if facts["seconds"] is None else facts["seconds"] / 3600,
            cost=facts["cost"],
            perplexity=facts["perplexity"],
            base=facts["base_perplexity"],
            branch=facts["branch"] or "",
            model=facts["model"] or "",
        )
    except DAMAGED as error:
        return Row(name=name, run=name, damage=_why(error))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _why(error: Exception) -> str:
    """What is wrong with a record, in one sentence."""
    if isinstance(error, RecordError):
        return str(error)
    return f"a file of it holds something unexpected: {type(error).__name__}: {error}"


def run_page(record: Path, tasks_of: TasksOf = lambda dag, run: ()) -> str:
    """A run's page: why it failed, what it is doing, and its report so far."""
    found: dict[str, Any] = {"failures": [], "going": False, "waits": [], "progress": None}
    damage, report, airflow = "", [], ""
    try:
        facts = read(record, "run.json")
        dag, run = str(facts.get("dag", "")), str(facts.get("run", ""))
        airflow = f"{ROOT}/dags/{quote(dag)}/runs/{quote(run)}"
        tasks = tasks_of(dag, run)
        links = {task.task: f"{airflow}/tasks/{quote(task.task)}" for task in tasks}
        found["failures"] = _failures(record, facts, tasks, links)
        found["going"] = not facts.get("state")
        if found["going"]:
            links |= {
                task.task: f"{links[task.task]}/required_actions"
                for task in tasks
                if task.state == "awaiting_input"
            }
            found["waits"] = task_lines(record, dag, run, tasks, links)
            found["progress"] = progress(record)
        report = sections(record)
    except DAMAGED as error:
        damage = _why(error)
    title = f"Fast CPT run {record.name if damage else run}"
    return page(
        "run.html",
        title=title,
        home="../",
        airflow=airflow,
        sections=report,
        damage=damage,
        **found,
    )


def _failures(
    record: Path, facts: dict[str, Any], tasks: Sequence[TaskNow], links: dict[str, str]
) -> list[dict[str, str]]:
    """Why tasks failed; without tasks that were cleared since, and empty if the run succeeded."""
    if facts.get("state") == "success":
        return []
    failed = {task.task for task in tasks if task.state == "failed"}
    told = failures(record)
    if len(told) > 1:
        told.pop("report", None)  # it names the others
    return [
        {"task": task, "message": message, "log": links.get(task, ""), "advice": _advice(task)}
        for task, message in told.items()
        if task in failed or not tasks
    ]


def _advice(task: str) -> str:
    if task == "plan":
        return "Nothing was spent. Correct what the message names and trigger the run again."
    return (
        f"Do what the message says, then clear {task} and what follows it: "
        "all that is done is found again, and a training goes on from its last checkpoint."
    )


def compare_page(home: Path, names: Sequence[str]) -> str:
    """A comparison of the named records, or what is wrong with the choice."""
    there = records(home)
    chosen = [there[name] for name in dict.fromkeys(names) if name in there]
    problem, found = "", []
    if not FEWEST <= len(chosen) <= MOST:
        problem = f"Choose {FEWEST} to {MOST} runs in the list; {len(chosen)} were chosen."
    else:
        try:
            found = compare(chosen)
        except DAMAGED as error:
            problem = f"A record of these is damaged: {_why(error)}"
    title = f"{len(chosen)} Fast CPT runs beside each other"
    return page("compare.html", title=title, home="./", problem=problem, sections=found)


def run_pages_app(home: Path, tasks_of: TasksOf = tasks_of) -> FastAPI:
    """The pages, behind Airflow's login and the permission to read the DAG's runs."""
    # Imported here because workers and the scheduler load this module too, but serve no pages.
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from fastapi import Depends, FastAPI, HTTPException, Query
    from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

    may_read = requires_access_dag("GET", DagAccessEntity.RUN, param_dag_id=DAG)
    pages = FastAPI(
        dependencies=[Depends(may_read)], openapi_url=None, docs_url=None, redoc_url=None
    )

    @pages.get("/")
    def list_of_runs(text: str = "", state: str = "", sort: str = "-started") -> HTMLResponse:
        return HTMLResponse(list_page(home, Choice(text, state, sort)), headers=SECURITY)

    @pages.get("/pages.js")
    def script() -> FileResponse:
        return FileResponse(TEMPLATES / "pages.js", media_type="text/javascript", headers=SECURITY)

    @pages.get("/run/{name}")
    def one_run(name: str) -> HTMLResponse:
        # The name is looked up among the records, never used as a path.
        record = records(home).get(name)
        if record is None:
            raise HTTPException(404, "no such run record")
        return HTMLResponse(run_page(record, tasks_of), headers=SECURITY)

    chosen = Query(default=[])

    @pages.get("/compare")
    def beside_each_other(run: list[str] = chosen) -> HTMLResponse:
        return HTMLResponse(compare_page(home, run), headers=SECURITY)

    @pages.get("/of")
    def of_airflows_run(run_id: str) -> RedirectResponse:
        """The page of a run by Airflow's run id, or the list if it has no record."""
        name = record_folder(home, run_id).name
        there = f"run/{quote(name)}" if name in records(home) else ""
        return RedirectResponse(f"./{there}", headers=SECURITY)

    return pages


class RunRecordLink(BaseOperatorLink):
    """The button "Run record" on every task of a run that has one."""

    name = "Run record"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The record's page inside Airflow's UI; empty without a record, so that no button shows."""
        record = record_folder(HOME, ti_key.run_id)
        try:
            if read(record, "run.json").get("dag") != ti_key.dag_id:
                return ""
        except RecordError:
            return ""
        return f"{ROOT}/plugin{PREFIX}{PREFIX}/run/{record.name}"


class RunPages(AirflowPlugin):
    name = "fast_cpt_runs"
    external_views: ClassVar = [
        {
            "name": "CPT runs",  # what fits below an icon
            "href": f"{ROOT}{PREFIX}/",
            "url_route": PREFIX.removeprefix("/"),
            "destination": "nav",
            "nav_top_level": True,  # two pages of plugins would share a menu
        },
        {
            "name": "Fast CPT",  # a tab of a run's own page
            "href": f"{ROOT}{PREFIX}/of?run_id={{RUN_ID}}",
            "url_route": "fast-cpt",
            "destination": "dag_run",
        },
    ]
    # A link of the plugin, not of an operator, is evaluated when a task's page is opened, also while it runs.
    global_operator_extra_links: ClassVar = [RunRecordLink()]

    @functools.cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """Only the API server asks for this."""
        return [{"app": run_pages_app(HOME), "url_prefix": PREFIX, "name": "Fast CPT runs"}]
