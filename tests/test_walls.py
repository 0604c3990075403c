"""Who may import whom: dags -> plugins -> fastcpt, and no room of the library another."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from fastcpt.cluster.agent.program import MODULES
from fastcpt.cluster.environment import SHIPPED

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARY = REPOSITORY / "include" / "fastcpt"
ROOMS = ["corpus", "planning", "cluster", "training", "registry", "reporting", "rent"]
SHARED = {
    "fastcpt",
    "fastcpt.best_fit",
    "fastcpt.__version__",
    *(f"fastcpt.{name}" for name in ("exit_codes", "families", "files", "gate", "gguf", "ids")),
    "fastcpt.manifests",
    *(
        f"fastcpt.{name}"
        for name in (
            "recipe",
            "recipe_form",
            "recipe_score",
            "recipe_sections",
            "shapes",
            "step_memory",
        )
    ),
    *(f"fastcpt.{name}" for name in ("gpus", "held_out", "intervals", "mlflow_server", "progress")),
    *(f"fastcpt.{name}" for name in ("recurring", "yaml_files")),
}
GPU_LIBRARIES = {"torch", "deepspeed", "transformers", "peft", "transformer_engine", "flash_attn"}


def imports_of(path: Path, module_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "fastcpt":
                found |= {f"fastcpt.{name.name}" for name in node.names}
    return found


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_there_is_something_to_check() -> None:
    assert all(len(files_of(LIBRARY / room)) > 1 for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other_room(room: str) -> None:
    for path in files_of(LIBRARY / room):
        of_library = {name for name in imports_of(path) if name.split(".")[0] == "fastcpt"}
        foreign = {
            name
            for name in of_library - SHARED
            if not name.startswith(f"fastcpt.{room}") and name != "fastcpt"
        }
        assert not foreign, f"{path}: {foreign}"


def test_the_library_does_not_know_airflow_plugins_or_dags() -> None:
    for path in files_of(LIBRARY):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {
            "airflow",
            "bringing",
            "gpu_turns",
            "job_log",
            "live",
            "new_run",
            "notifications",
            "remote_job",
            "rentals",
            "retries",
            "run_pages",
            "run_state",
            "run_tasks",
            "scheduled",
            "steps",
            "tracking",
        }, path


def test_what_the_shipped_code_imports_is_shipped() -> None:
    shipped = {name for name in SHIPPED if name.endswith(".py")}
    shipped |= {str(path.relative_to(LIBRARY.parent)) for path in files_of(LIBRARY / "training")}
    for name in sorted(shipped):
        for module in imports_of(LIBRARY.parent / name):
            file = Path(*module.split(".")).with_suffix(".py")
            if (LIBRARY.parent / file).is_file():
                assert str(file) in shipped, f"{name} imports {module}"


def test_the_agent_is_the_standard_library_and_itself_for_python_3_8() -> None:
    agent = LIBRARY / "cluster" / "agent"
    assert sorted(MODULES) == sorted(path.stem for path in agent.glob("[!_]*.py"))
    shared = [LIBRARY / name for name in ("__init__.py", "exit_codes.py", "cluster/__init__.py")]
    for path in [*shared, *files_of(agent)]:
        ast.parse(path.read_text(), feature_version=(3, 8))
        for module in imports_of(path):
            standard = module.split(".")[0] in sys.stdlib_module_names
            own = module == "fastcpt.exit_codes" or module.startswith("fastcpt.cluster.agent")
            assert standard or own, f"{path}: {module}"


def test_only_training_knows_torch() -> None:
    elsewhere = [path for path in files_of(LIBRARY) if "training" not in path.parts]
    for path in [*elsewhere, *files_of(REPOSITORY / "dags", REPOSITORY / "plugins")]:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & GPU_LIBRARIES, path


def test_the_dag_file_imports_nothing_heavy_when_it_is_parsed() -> None:
    heavy = {"pyarrow", "numpy", "tokenizers", "matplotlib", "zstandard", "fsspec"}
    for path in files_of(REPOSITORY / "dags"):
        roots = {name.split(".")[0] for name in imports_of(path, module_level_only=True)}
        assert not roots & heavy, path
