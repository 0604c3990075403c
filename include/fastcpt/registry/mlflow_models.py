"""Sends a recipe's models to MLflow: versions of a registered model, with aliases ``champion`` and ``candidate``.

What is sent is the difference between ``models.json`` and what the server has: sending twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastcpt.mlflow_server import LONGEST_TAG, Mlflow, as_list, as_mapping, mlflow_name
from fastcpt.registry.champion import champion, models, reason

MODEL = "fast_cpt.model"  # a version's tag: the model's name, by which it is found again
LONGEST_DESCRIPTION = 4000  # characters; the report has the whole reason


def send_models(server: Mlflow, home: Path, recipe: str, place: Callable[[str], str]) -> None:
    """Register the models that the server lacks, and set both aliases.

    ``candidate`` is the newest model that is not the champion. ``place`` turns a model's ``path`` into a
    URI. Raises ``MlflowError``.
    """
    registered, known = mlflow_name(recipe), models(home, recipe)
    wanted = {"filter": f"name = '{registered}'"}
    found = server.ask("GET", "registered-models/search", **wanted).get("registered_models")
    if not found:
        server.ask("POST", "registered-models/create", name=registered)
    versions = {
        as_mapping(one.get("tags")).get(MODEL): str(one["version"])
        for one in _versions(server, registered)
    }
    for model, facts in known.items():
        if model not in versions:
            versions[model] = _create(server, recipe, model, facts, place(facts["path"]))
    best = champion(home, recipe)
    others = [model for model in known if model != best]
    aliases = {one["alias"]: one["version"] for one in found[0].get("aliases", [])} if found else {}
    for alias, its in (("champion", best), ("candidate", others[-1] if others else None)):
        if its is None and alias in aliases:
            server.ask("DELETE", "registered-models/alias", name=registered, alias=alias)
        elif its is not None and aliases.get(alias) != versions[its]:
            values = {"name": registered, "alias": alias, "version": versions[its]}
            server.ask("POST", "registered-models/alias", **values)


def _versions(server: Mlflow, registered: str) -> list[dict[str, Any]]:
    """All versions of a registered model, in one request: there are fewer than its limit."""
    wanted = {"filter": f"name = '{registered}'", "max_results": 10_000}
    return list(server.ask("GET", "model-versions/search", **wanted).get("model_versions", []))


def _create(server: Mlflow, recipe: str, model: str, facts: Mapping[str, Any], source: str) -> str:
    """Create a model's version, linked to the MLflow run that published it if the server has that."""
    runs = server.runs(server.experiment(recipe), facts["record"])
    tags = {
        MODEL: model,
        "fast_cpt.run": facts["run"],
        "fast_cpt.training": facts["training"],
        "fast_cpt.corpus": facts["corpus"],
        "fast_cpt.recommended": str(facts["decision"]["recommended"]).lower(),
    }
    made = server.ask(
        "POST",
        "model-versions/create",
        name=mlflow_name(recipe),
        source=source,
        description=reason(facts["decision"])[:LONGEST_DESCRIPTION],
        tags=as_list({key: value[:LONGEST_TAG] for key, value in tags.items()}),
        **({"run_id": runs[0]["info"]["run_id"]} if runs else {}),
    )
    return str(made["model_version"]["version"])
