"""The GPU host's environment: requirements are checked first, compiled wheels and the host's packages are kept.

The real script, venv and pip; the packages are a few lines each, in a folder in place of an index.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastcpt.cluster.environment import build_commands, environment_folder
from fastcpt.exit_codes import CANNOT_HEAL
from fastcpt.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "include" / "scripts" / "build_environment.py"
# a build backend that notes each time that it compiles, and for which GPUs
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import os, shutil, time
def build_wheel(folder, config_settings=None, metadata_directory=None):
    open(os.environ["COMPILED"], "a").write(os.environ["NVTE_CUDA_ARCHS"] + "\\n")
    time.sleep(1)
    name = "transformer_engine-2.19.0-py3-none-any.whl"
    shutil.copy(os.path.join(os.environ["MADE"], name), folder)
    return name
"""


def wheel(folder: Path, name: str, version: str) -> None:
    """A package of one empty module."""
    stem = f"{name}-{version}"
    files = {
        f"{name}.py": "",
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder that has the lists, the index, and the programs of a host."""
    for name in ("bin", "index", "made"):
        (tmp_path / name).mkdir()
    wheel(tmp_path / "index", "torch", "2.13.0")
    wheel(tmp_path / "index", "plain", "1.0")
    wheel(tmp_path / "made", "transformer_engine", "2.19.0")
    with tarfile.open(tmp_path / "index" / "transformer_engine-2.19.0.tar.gz", "w:gz") as archive:
        about = "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.19.0\n"
        files = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "PKG-INFO": about}
        for name, text in files.items():
            member = tarfile.TarInfo(f"transformer_engine-2.19.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "plain.txt").write_text("# a list\ntorch==2.13.0\nplain==1.0\n")
    (tmp_path / "gpu.txt").write_text("transformer-engine==2.19.0\n")
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3.11")
    program(tmp_path, "nvidia-smi", "echo 9.0; echo 9.0")
    return tmp_path


def program(host: Path, name: str, does: str = "true") -> None:
    (host / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
    (host / "bin" / name).chmod(0o755)


def build(host: Path, folder: str, *, gpus: bool) -> subprocess.CompletedProcess[str]:
    words = ["--folder", host / "environments" / folder, "--wheels", host / "wheels"]
    words += ["--requirements", host / "plain.txt"]
    words += ["--gpu_requirements", host / "gpu.txt"] if gpus else []
    environment = {
        "PATH": f"{host}/bin:/bin",
        "HOME": str(host),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(host / "index"),
        "COMPILED": str(host / "compiled"),
        "MADE": str(host / "made"),
        "CUDA_HOME": "/nowhere",
        "FASTCPT_SAY_EVERY_S": "0",
    }
    command = [host / "bin" / "python3", SCRIPT, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_build_says_each_step_and_how_long_it_took(host: Path) -> None:
    done = build(host, "one", gpus=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "environment: 1/2 a new environment"
    assert "environment: 2/2 2 packages" in lines
    # what a step is at, while it is
    assert any(" s: " in line for line in lines)
    assert sum(line.startswith("environment:   took ") for line in lines) == 2
    assert lines[-1].startswith("environment: ready after ")
    folder = host / "environments" / "one"
    assert (folder / "complete").exists()
    assert subprocess.run([folder / "bin/python", "-c", "import plain, torch"]).returncode == 0


def test_without_a_compiler_nothing_is_begun(host: Path) -> None:
    (host / "bin" / "c++").symlink_to("/nowhere/c++")
    done = build(host, "one", gpus=True)
    assert done.returncode == CANNOT_HEAL
    assert "transformer-engine must be compiled here, and there is no nvcc" in done.stdout
    assert "name an interpreter that has them as python in the connection" in done.stdout
    assert not (host / "environments").exists()


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_the_next_environment(host: Path) -> None:
    for name in ("nvcc", "c++"):
        program(host, name)
    first = build(host, "one", gpus=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3/3 transformer-engine, to be compiled, which takes long" in first.stdout
    # what pip is at, while it is
    assert re.search(r" s: .*\(pyproject.toml\): started", first.stdout), first.stdout
    # for the GPUs of this host alone
    assert set((host / "compiled").read_text().split()) == {"90"}
    times = (host / "compiled").read_text()
    # neither of them is needed again
    for name in ("nvcc", "c++"):
        (host / "bin" / name).unlink()
    second = build(host, "two", gpus=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "3/3 transformer-engine, as it was compiled before" in second.stdout
    assert (host / "compiled").read_text() == times
    # another GPU needs another
    program(host, "nvidia-smi", "echo 10.0")
    assert build(host, "three", gpus=True).returncode == CANNOT_HEAL


@pytest.mark.slow
def test_a_vendors_torch_stays_and_the_rest_comes_on_top(host: Path) -> None:
    """As in a vendor's container: a build of its own, of the same release line, for its GPUs."""
    vendor = host / "vendor"
    subprocess.run([sys.executable, "-m", "venv", vendor], check=True)
    (site,) = (vendor / "lib").glob("python3.*/site-packages")
    for name, version in {"torch": "2.13.0a0+nv26", "transformer_engine": "2.19.1"}.items():
        (site / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    (site / "torch.py").write_text("class version: cuda = '13.0'\n")
    (host / "bin" / "python3").unlink()
    program(host, "python3", f'exec {vendor}/bin/python3 "$@"')
    done = build(host, "one", gpus=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch 2.13.0a0+nv26 of " in done.stdout
    assert "2/2 1 packages" in done.stdout
    assert not (host / "compiled").exists()
    python = host / "environments" / "one" / "bin" / "python"
    seen = [python, "-c", "import plain, torch; print(torch.version.cuda)"]
    assert subprocess.run(seen, capture_output=True, text=True).stdout == "13.0\n"


def test_a_build_that_fails_shows_what_pip_said_last(host: Path) -> None:
    (host / "plain.txt").write_text("torch==2.13.0\nnowhere==1.0\n")
    done = build(host, "one", gpus=False)
    assert done.returncode == 1
    assert "No matching distribution found for nowhere==1.0" in done.stdout
    assert not (host / "environments" / "one" / "complete").exists()


def test_flash_attn_is_built_only_where_a_recipe_names_it() -> None:
    named = load_recipe("cpt_config_fast")
    silent = load_recipe("cpt_config_fast", {"model.attn_implementation": "auto"})
    (asked,), (left) = (
        build_commands(recipe, "/root", "/code", "/env") for recipe in (named, silent)
    )
    assert asked[-2:] == [
        "/code/requirements-cluster-gpu.txt",
        "/code/requirements-cluster-flash.txt",
    ]
    assert left[0][-1] == "/code/requirements-cluster-gpu.txt"
    on_cpus = load_recipe("sample")
    assert (
        build_commands(on_cpus, "/root", "/code", "/env")[0][-1] == "/code/requirements-cluster.txt"
    )
    folders = {environment_folder(one, "/root", REPOSITORY) for one in (named, silent, on_cpus)}
    assert len(folders) == 3
    assert os.path.dirname(folders.pop()) == "/root/environments"
