"""The code and its Python packages on the cluster, each in a folder named by its digest."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastcpt.cluster.remote import ClusterError, Remote, ask
from fastcpt.cluster.transfer import files_of, send
from fastcpt.files import digest_of, sha256_of_file
from fastcpt.recipe_sections import Cluster

REQUIREMENTS = "requirements-cluster.txt"
GPU_REQUIREMENTS = "requirements-cluster-gpu.txt"
# training is shipped whole, with the modules that it shares with the other rooms
SHIPPED = (
    "fastcpt/__init__.py",
    "fastcpt/exit_codes.py",
    "fastcpt/families.py",
    "fastcpt/gpus.py",
    "fastcpt/gpus.yaml",
    "fastcpt/recipe.py",
    "fastcpt/recipe_sections.py",
    "fastcpt/best_fit.py",
    "fastcpt/files.py",
    "fastcpt/gate.py",
    "fastcpt/ids.py",
    "fastcpt/intervals.py",
    "fastcpt/manifests.py",
    "fastcpt/shapes.py",
    "fastcpt/step_memory.py",
    "fastcpt/yaml_files.py",
)
SHIPPED_FOLDERS = ("fastcpt/training", "scripts", "configs")


def ship_code(remote: Remote, root: str, repository: Path) -> dict[str, Any]:
    """Bring the training code to ``<root>/code/<digest>``; returns ``{path, digest, reused}``."""
    with tempfile.TemporaryDirectory(prefix="fast_cpt-code-") as folder:
        staging = Path(folder)
        for name in _code(repository / "include"):
            target = staging / "include" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / "include" / name, target)
        for name in (REQUIREMENTS, GPU_REQUIREMENTS):
            shutil.copyfile(repository / name, staging / name)
        files = files_of(staging)
        digest = digest_of(files)
        sent = send(remote, staging, f"{root}/code/{digest}", files)
    return {"path": sent["path"], "digest": digest, "reused": sent["reused"]}


def _code(include: Path) -> list[str]:
    found = [path for folder in SHIPPED_FOLDERS for path in (include / folder).rglob("*")]
    names = [str(path.relative_to(include)) for path in found if path.is_file()]
    return [*SHIPPED, *(name for name in names if "__pycache__" not in name)]


def pins(requirements: Path) -> dict[str, str]:
    """The packages of a requirements file and their pinned versions."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {name.split("[")[0]: version for name, version in pairs}


def check_python(remote: Remote, cluster: Cluster, repository: Path) -> str:
    """The absolute path of ``cluster.python``, its packages compared with the pinned ones."""
    answer = ask(remote, "versions", python=cluster.python, pins=pins(repository / REQUIREMENTS))
    if answer["wrong"]:
        raise ClusterError(
            f"{remote.host}: {cluster.python} (cluster.python) does not have the pinned packages:\n"
            + "\n".join(f"- {line}" for line in answer["wrong"])
            + f"\nInstall {REQUIREMENTS} there, or leave cluster.python empty to have it built"
        )
    return str(answer["python"])


def environment_folder(cluster: Cluster, root: str, repository: Path) -> str:
    """Where the environment built from the pinned files lies."""
    files = [REQUIREMENTS] if cluster.cpu_only else [REQUIREMENTS, GPU_REQUIREMENTS]
    return f"{root}/environments/{digest_of([sha256_of_file(repository / name) for name in files])}"


def build_commands(cluster: Cluster, code: str, folder: str) -> list[list[str]]:
    """The commands that build the environment; the last one writes ``<folder>/complete``."""
    pip = [f"{folder}/bin/python", "-m", "pip", "install", "--disable-pip-version-check"]
    commands = [
        ["python3", "-m", "venv", "--clear", folder],
        [*pip, "-r", f"{code}/{REQUIREMENTS}"],
    ]
    if not cluster.cpu_only:
        # built from source against the torch just installed
        commands.append([*pip, "--no-build-isolation", "-r", f"{code}/{GPU_REQUIREMENTS}"])
    return [*commands, ["touch", f"{folder}/complete"]]
