"""How the agent's modules are imported on the host: from the text of the program, without files.

A request has to work on a full or read-only disk, so nothing of it is written there.
"""

import sys
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from typing import Any, Dict, Optional


class Sent(MetaPathFinder, ExecutionLoader):
    """Modules by name from their sources."""

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
    # first: the host may have a fastcpt of its own, the training code of a job for one
    sys.meta_path.insert(0, Sent(sources))
