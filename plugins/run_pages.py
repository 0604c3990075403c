"""Run records in Airflow's UI: a list of them, the report of each, and a link on every task.

The pages are a FastAPI app inside Airflow's own API server, and reading them takes what reading
the DAG's runs takes: the same login, the same permission. They are static HTML, and their content
security policy allows no script, whatever a record may hold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperatorLink

from fastcpt.files import HOME
from fastcpt.reporting.pages import page
from fastcpt.reporting.record import RecordError, read, record_folder
from fastcpt.reporting.summary import summary, summary_text

if TYPE_CHECKING:
    from fastapi import FastAPI

DAG = "fast_cpt"
PREFIX = "/fast-cpt-runs"
# Airflow may be served below a path; links of the UI need it.
ROOT = urlsplit(conf.get("api", "base_url", fallback="/")).path.rstrip("/")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# What a damaged record can raise: files that do not parse, and values of another kind than ours.
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, OSError)


def records(home: Path) -> dict[str, Path]:
    """Every run record by the name of its folder, the newest first; damaged ones at the end."""
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
    """A run in the list: what stands in its cells, or (``damage``) why its record cannot be read."""

    name: str
    run: str
    damage: str = ""
    started: str = ""
    recipe: str = ""
    state: str = ""
    perplexity: str = ""
    base: str = ""
    branch: str = ""


def list_page(home: Path) -> str:
    """The table of all records. Links are relative: the page works under any prefix."""
    rows = [_row(name, record) for name, record in records(home).items()]
    return page("runs.html", title="Fast CPT runs", rows=rows)


def _row(name: str, record: Path) -> Row:
    try:
        facts = summary(record)
        return Row(
            name=name,
            run=str(facts["run"] or name),
            started=_started(record)[:16].replace("T", " "),
            recipe=str(facts["recipe"] or ""),
            state=str(facts["state"] or "not ended"),
            perplexity=_figure(facts["perplexity"]),
            base=_figure(facts["base_perplexity"]),
            branch=facts["branch"] or "",
        )
    except DAMAGED as error:
        return Row(name=name, run=name, damage=_why(error))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _why(error: Exception) -> str:
    """What is wrong with a record, in a sentence."""
    if isinstance(error, RecordError):
        return str(error)
    return f"a file of it holds something unexpected: {type(error).__name__}: {error}"


def run_page(record: Path) -> str:
    """The report of one run; before it is written, the summary of what is known."""
    report = record / "report.html"
    if report.is_file():
        return report.read_text("utf-8")
    text = damage = ""
    try:
        text = summary_text(record)
    except DAMAGED as error:
        damage = _why(error)
    return page("run.html", title=f"Fast CPT run {record.name}", summary=text, damage=damage)


def app(home: Path) -> FastAPI:
    """The pages, behind Airflow's login and the permission to read the DAG's runs."""
    # Workers and the scheduler load this module too, and serve no pages.
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi.responses import HTMLResponse

    may_read = requires_access_dag("GET", DagAccessEntity.RUN, param_dag_id=DAG)
    pages = FastAPI(
        dependencies=[Depends(may_read)], openapi_url=None, docs_url=None, redoc_url=None
    )

    @pages.get("/")
    def list_of_runs() -> HTMLResponse:
        return HTMLResponse(list_page(home), headers=SECURITY)

    @pages.get("/run/{name}")
    def one_run(name: str) -> HTMLResponse:
        # No path is made of what was asked for: it is looked up among the records there are.
        record = records(home).get(name)
        if record is None:
            raise HTTPException(404, "no such run record")
        return HTMLResponse(run_page(record), headers=SECURITY)

    return pages


class RunRecordLink(BaseOperatorLink):
    """The button "Run record" on every task of a run that has one."""

    name = "Run record"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The record's page inside Airflow's UI; empty, so that no button shows, without one."""
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
        }
    ]
    # Of the plugin, not of an operator: asked when a task's page is opened, also while it runs.
    global_operator_extra_links: ClassVar = [RunRecordLink()]

    @functools.cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """Asked for by the API server alone."""
        return [{"app": app(HOME), "url_prefix": PREFIX, "name": "Fast CPT runs"}]
