"""Removes what nothing needs any more, on this machine and on a GPU host, when a person triggers it."""

from __future__ import annotations

from typing import TypedDict

from airflow.sdk import get_current_context

from fastcpt.files import HOME
from fastcpt.recipe_sections import Cluster
from fastcpt.registry.in_use import Policy, on_host
from remote_job import connection_of, remote_of


class Cleaned(TypedDict):
    """GB that were freed, or would be, and whether they were."""

    here_gb: float
    there_gb: float
    removed: bool


def clean() -> Cleaned:
    """Remove what the form's policy allows, or only list it with sizes (``remove`` off)."""
    from fastcpt.cluster.remote import ask_through
    from fastcpt.registry.cleaning import clean as clean_here
    from fastcpt.registry.cleaning import line

    values = get_current_context()["params"]
    policy, remove = Policy(values["days"], values["candidates"]), values["remove"]
    # first, because the records here say what the host has to keep
    asked, sizes = on_host(HOME, policy), {"here": 0, "there": 0}
    if connection := values["connection"]:
        root = connection_of(connection).extra_dejson.get("root")
        root = root or Cluster.model_fields["root"].default
        remote = remote_of(connection)
        for found in ask_through(remote, "clean", root=root, remove=remove, **asked)["folders"]:
            sizes["there"] += found["bytes"]
            print(line(f"{connection}:{found['path']}", found["bytes"]))
    for folder, size in clean_here(HOME, policy, dry_run=not remove):
        sizes["here"] += size
        print(line(folder, size))
    for where, size in sizes.items():
        print(line(f"{'freed' if remove else 'would be freed'} {where}", size))
    return {"here_gb": sizes["here"] / 1e9, "there_gb": sizes["there"] / 1e9, "removed": remove}
