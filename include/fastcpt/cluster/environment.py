"""The code and its Python packages on the cluster, each in a folder named by its digest."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastcpt.cluster.remote import ClusterError, Remote, ask
from fastcpt.cluster.transfer import files_of, send
from fastcpt.files import digest_of, sha256_of_file
from fastcpt.recipe import Recipe
from fastcpt.recipe_sections import Cluster

REQUIREMENTS = "requirements-cluster.txt"
GPU_REQUIREMENTS = "requirements-cluster-gpu.txt"
FLASH_REQUIREMENTS = "requirements-cluster-flash.txt"
# training goes as a whole, with the modules that it shares with other rooms
SHIPPED = (
    "fastcpt/__init__.py",
    "fastcpt/exit_codes.py",
    "fastcpt/families.py",
    "fastcpt/gpus.py",
    "fastcpt/gpus.yaml",
    "fastcpt/law_sets.yaml",
    "fastcpt/recipe.py",
    "fastcpt/recipe_score.py",
    "fastcpt/recipe_sections.py",
    "fastcpt/recurring.py",
    "fastcpt/best_fit.py",
    "fastcpt/files.py",
    "fastcpt/gate.py",
    "fastcpt/progress.py",
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
        for name in (REQUIREMENTS, GPU_REQUIREMENTS, FLASH_REQUIREMENTS):
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
    """The absolute path of ``cluster.python``; ``ClusterError`` if its packages are not the pinned ones."""
    answer = ask(remote, "versions", python=cluster.python, pins=pins(repository / REQUIREMENTS))
    if answer["wrong"]:
        raise ClusterError(
            f"{remote.host}: {cluster.python} (cluster.python) does not have the pinned packages:\n"
            + "\n".join(f"- {line}" for line in answer["wrong"])
            + f"\nInstall {REQUIREMENTS} there, or leave cluster.python empty to have it built"
        )
    return str(answer["python"])


def gpu_lists(recipe: Recipe) -> list[str]:
    """The lists to install after ``requirements-cluster.txt``: flash-attn only if the recipe names it."""
    if recipe.cluster.cpu_only:
        return []
    named = recipe.model.attn_implementation == "flash_attention_2"
    return [GPU_REQUIREMENTS, *([FLASH_REQUIREMENTS] if named else [])]


def environment_folder(recipe: Recipe, root: str, repository: Path) -> str:
    """The folder of the environment built from the pinned lists."""
    digests = [sha256_of_file(repository / name) for name in (REQUIREMENTS, *gpu_lists(recipe))]
    return f"{root}/environments/{digest_of(digests)}"


def build_commands(recipe: Recipe, root: str, code: str, folder: str) -> list[list[str]]:
    """The command that builds the environment on the host; it writes ``<folder>/complete`` last."""
    command = ["python3", f"{code}/include/scripts/build_environment.py", "--folder", folder]
    command += ["--wheels", f"{root}/wheels", "--requirements", f"{code}/{REQUIREMENTS}"]
    lists = [f"{code}/{name}" for name in gpu_lists(recipe)]
    return [[*command, *(["--gpu_requirements", *lists] if lists else [])]]
