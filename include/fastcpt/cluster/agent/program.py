"""The agent as one program, sent with each request and stored as a job's supervisor."""

from functools import lru_cache
from importlib.util import find_spec

PACKAGE = "fastcpt.cluster.agent"
START = PACKAGE + ".start"
MODULES = (
    "checkpoints",
    "cleaning",
    "files",
    "gpu_locks",
    "host",
    "hosts",
    "job_folder",
    "jobs",
    "main",
    "processes",
    "program",
    "rent",
    "slurm",
    "start",
    "supervisor",
    "watcher",
)


def source(module: str) -> str:
    """A module's source: on this side from its file, on the host from the program itself."""
    spec = find_spec(module)
    assert spec is not None
    text: str = spec.loader.get_source(module)  # type: ignore[union-attr]
    return text


@lru_cache(maxsize=None)
def text(last: str) -> str:
    """A program that can import all of the agent and ends with the lines ``last``."""
    names = ["fastcpt", "fastcpt.cluster", PACKAGE, *(PACKAGE + "." + name for name in MODULES)]
    names.append("fastcpt.exit_codes")
    sources = {name: source(name) for name in names}
    return f"{source(START)}\n\nstart({sources!r})\n{last}\n"


def request(do: str, values: str) -> str:
    """The program that answers one request; ``values`` is JSON."""
    return text(f"from {PACKAGE}.main import respond") + f"respond({do!r}, {values!r})\n"


def supervisor() -> str:
    """The program in a job's folder, and a rented host's watcher."""
    return text(f"from {PACKAGE}.main import main\nmain()")
