"""One version: where it is defined, where it is repeated, and that it is sent to the cluster."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

from fastcpt import __version__
from fastcpt.cluster.environment import SHIPPED

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_version_is_the_last_release_of_the_changelog() -> None:
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    releases = [
        re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)", line) for line in headings[1:]
    ]
    assert releases[0]
    assert releases[0][1] == __version__
    assert all(releases)


def test_the_project_takes_its_version_from_the_library() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    module, _, name = settings["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(import_module(module), name) == __version__


def test_airflow_is_told_the_same_version() -> None:
    metadata = (REPOSITORY / "plugins" / "fast_cpt.dist-info" / "METADATA").read_text()
    assert f"\nVersion: {__version__}\n" in metadata


def test_the_cluster_gets_the_module_that_holds_it() -> None:
    assert "fastcpt/__init__.py" in SHIPPED
