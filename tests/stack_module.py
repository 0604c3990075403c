"""The script behind ``make run``, loaded with its state in a folder of the test."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from fastcpt import files

SCRIPTS = Path(__file__).resolve().parents[1] / "include" / "scripts"


def load_local_stack(home: Path) -> ModuleType:
    """``local_stack`` whose HOME is ``home``, and so of all that it starts."""
    os.environ["FASTCPT_HOME"] = str(home)
    files.HOME = home  # read when the process began, with the home of whoever runs the tests
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("local_stack", SCRIPTS / "local_stack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert home.resolve() == module.HOME
    return module
