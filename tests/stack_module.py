"""The script behind ``make run``, loaded with its state in a folder of the test."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from fastcpt import files

SCRIPTS = Path(__file__).resolve().parents[1] / "include" / "scripts"


def load_local_stack(home: Path, scripts: Path = SCRIPTS) -> ModuleType:
    """``local_stack`` whose HOME is ``home``, and so of all that it starts, of one checkout's ``scripts``."""
    os.environ["FASTCPT_HOME"] = str(home)
    files.HOME = home  # read when the process began, with the home of whoever runs the tests
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("local_stack", scripts / "local_stack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert home.resolve() == module.HOME
    return module


def own_checkout(folder: Path) -> Path:
    """A copy of what of this checkout a run needs, for a test that adds a recipe; its environments are this one's."""
    here = SCRIPTS.parents[1]
    for name in ("dags", "plugins", "include"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(here / name, folder / name, ignore=skip)
    for file in here.glob("requirements*.txt"):
        shutil.copy(file, folder)
    (folder / ".env").symlink_to((here / ".env").resolve())
    return folder
