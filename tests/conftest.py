"""Shared by all tests: on macOS, tests that need Linux are skipped with their reason; ``--pictures``."""

from __future__ import annotations

import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", metavar="FOLDER", help="keep pictures of the pages there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform != "darwin":
        return
    for item in items:
        if marker := item.get_closest_marker("linux"):
            item.add_marker(pytest.mark.skip(reason=f"needs Linux: {marker.args[0]}"))
