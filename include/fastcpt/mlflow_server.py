"""A client for the part of MLflow's REST API that mirroring runs and models needs.

https://mlflow.org/docs/latest/api_reference/rest-api.html documents the requests. MLflow's own
``mlflow-skinny`` is not used: it would downgrade two packages that Airflow's pins hold and add nine more,
among them Databricks' and Google's clients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

# Seconds for one request, and for all requests of one step: a slow server delays a step by no more.
REQUEST_S, AT_ONCE_S = 5.0, 20.0
# MLflow's limits for one log-batch request.
MOST_METRICS, MOST_PARAMS = 1000, 100
# MLflow's limits for the characters of a parameter and of a tag.
LONGEST_PARAM, LONGEST_TAG = 6000, 8000
# The tag by which a run is found again: the name of its record's folder.
RECORD = "fast_cpt.record"


class MlflowError(OSError):
    """The server did not answer, or refused. The message has no password."""


class Refused(MlflowError):
    """The server refused the request; it would refuse it again."""


@dataclass(frozen=True)
class Login:
    """Where a server is. A ``password`` without ``user`` is a token."""

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def mlflow_name(recipe: str) -> str:
    """The name of a recipe's experiment and of its registered model."""
    return f"fast_cpt-{recipe}"


class Mlflow:
    """A server, used for at most ``AT_ONCE_S`` seconds. All methods raise ``MlflowError``."""

    def __init__(self, login: Login) -> None:
        self.login, self.until = login, time.monotonic() + AT_ONCE_S

    def ask(self, method: str, path: str, **values: Any) -> dict[str, Any]:
        """One request's answer. ``path`` is below ``/api/2.0/mlflow/``."""
        if time.monotonic() > self.until:
            raise MlflowError(f"{self.login.url} took longer than {AT_ONCE_S:g} s")
        try:
            answer = httpx.request(
                method,
                f"{self.login.url.rstrip('/')}/api/2.0/mlflow/{path}",
                auth=self._basic(),
                headers=self._bearer(),
                timeout=REQUEST_S,
                params=values if method == "GET" else None,
                json=None if method == "GET" else values,
            )
            found = answer.json() if answer.is_success else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            why = str(error) or type(error).__name__
            raise MlflowError(f"{self.login.url} does not answer as MLflow does: {why}") from None
        if not isinstance(found, dict):
            kind = Refused if answer.status_code in (400, 404, 409) else MlflowError
            why = f"{answer.status_code} to {path}: {answer.text[:300]}"
            raise kind(f"{self.login.url} answered {why}")
        return found

    def _basic(self) -> tuple[str, str] | None:
        return (self.login.user, self.login.password or "") if self.login.user else None

    def _bearer(self) -> dict[str, str]:
        token = self.login.password if not self.login.user else None
        return {"Authorization": f"Bearer {token}"} if token else {}

    def experiment(self, recipe: str) -> str:
        """The id of a recipe's experiment, created if it is missing."""
        name = mlflow_name(recipe)
        wanted = {"filter": f"name = '{name}'", "max_results": 1, "view_type": "ALL"}
        found = self.ask("POST", "experiments/search", **wanted).get("experiments")
        if not found:
            return str(self.ask("POST", "experiments/create", name=name)["experiment_id"])
        if found[0]["lifecycle_stage"] == "deleted":
            raise Refused(f"the experiment {name} was deleted in MLflow: restore it there")
        return str(found[0]["experiment_id"])

    def runs(self, experiment: str, record: str) -> list[dict[str, Any]]:
        """The MLflow runs of a record, the newest first: more than one if the run was cleared."""
        found = self.ask(
            "POST",
            "runs/search",
            experiment_ids=[experiment],
            filter=f"tags.`{RECORD}` = '{record}'",
            order_by=["attributes.start_time DESC"],
            max_results=100,
        )
        return list(found.get("runs", []))

    def log(
        self,
        run: str,
        metrics: list[dict[str, Any]] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Add to a run; ``metrics`` are ``{key, value, timestamp, step}``, the oldest first."""
        metrics, pairs = metrics or [], list((params or {}).items())
        for first in range(0, len(pairs), MOST_PARAMS):
            part = as_list(dict(pairs[first : first + MOST_PARAMS]))
            self.ask("POST", "runs/log-batch", run_id=run, params=part)
        for first in range(0, len(metrics), MOST_METRICS):
            part = metrics[first : first + MOST_METRICS]
            self.ask("POST", "runs/log-batch", run_id=run, metrics=part)
        if tags:
            self.ask("POST", "runs/log-batch", run_id=run, tags=as_list(tags))


def as_list(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Named values in the form of requests."""
    return [{"key": key, "value": value} for key, value in values.items()]


def as_mapping(values: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Named values from the form of answers."""
    return {one["key"]: one["value"] for one in values or []}
