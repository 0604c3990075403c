"""The agent as one program: what is sent with a request, and what a job's supervisor is."""

from functools import lru_cache
from importlib.util import find_spec

PACKAGE = "fastcpt.cluster.agent"
START = PACKAGE + ".start"
MODULES = (
    "checkpoints",
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
    """A module's text: from its file here, from the program itself on the host."""
    spec = find_spec(module)
    assert spec is not None
    text: str = spec.loader.get_source(module)  # type: ignore[union-attr]
    return text


@lru_cache(maxsize=None)
def text(last: str) -> str:
    """The program that can import all of the agent and ends with the lines ``last``."""
    names = ["fastcpt", "fastcpt.cluster", PACKAGE, *(PACKAGE + "." + name for name in MODULES)]
    sources = {name: source(name) for name in names}
    return f"{source(START)}\n\nstart({sources!r})\n{last}\n"


def request(do: str, values: str) -> str:
    """The program that answers one request; ``values`` are JSON."""
    return text(f"from {PACKAGE}.main import respond") + f"respond({do!r}, {values!r})\n"


def supervisor() -> str:
    """The program in a job's folder, and a rented host's watcher."""
    return text(f"from {PACKAGE}.main import main\nmain()")
