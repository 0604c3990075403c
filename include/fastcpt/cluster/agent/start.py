"""Imports the agent's modules on the host from the program's text.

No file is written, as a request has to work on a full or read-only disk.
"""

import sys
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from typing import Any, Dict, Optional


class Sent(MetaPathFinder, ExecutionLoader):
    """Imports modules from their sources, given by name."""

    def __init__(self, sources: Dict[str, str]) -> None:
        self.sources = sources

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Optional[ModuleSpec]:
        return spec_from_loader(fullname, self) if fullname in self.sources else None

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(fullname + ".") for name in self.sources)

    def get_source(self, fullname: str) -> str:
        return self.sources[fullname]

    def get_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".py"


def start(sources: Dict[str, str]) -> None:
    # first in line: the host may have a fastcpt of its own, such as a job's training code
    sys.meta_path.insert(0, Sent(sources))
