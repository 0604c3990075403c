"""Build the Python environment of a GPU host, on that host, and show the progress.

Uses only Python 3.8's standard library and ``exit_codes.py``, as nothing else may be installed yet.
Packages to compile are known in advance: without a compiler it ends at once. Compiled wheels are kept
in a folder named by a digest of their inputs, and the next environment installs them from there. If
the host's Python already has torch for its GPUs (a vendor's container), that is used and the rest
installed on top.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.exit_codes import CANNOT_HEAL

PYTHONS = ("python3.12", "python3.11", "python3")
SAY_EVERY_S = float(os.environ.get("FASTCPT_SAY_EVERY_S", "30"))
# published only as source, since nvcc compiles them for torch, CUDA and the GPU
SOURCES = ("transformer-engine", "flash-attn")
# nvcc's memory for one of their larger files
COMPILER_GB = 8
ASK = """
import importlib.metadata as m, json, os, sys, sysconfig
try: import ensurepip; venv = True
except ImportError: venv = False
found, cuda = {}, None
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
if "torch" in found:
    import torch
    cuda = torch.version.cuda
sites = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
headers = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
print(json.dumps({"version": list(sys.version_info[:2]), "venv": venv, "headers": headers, "sites": sites, "found": found, "cuda": cuda}))
"""
MAKE = """
import pathlib, sys, venv
folder, sites = sys.argv[1:]
venv.create(folder, clear=True, with_pip=True)
(packages,) = pathlib.Path(folder).glob("lib/python*/site-packages")
(packages / "host.pth").write_text(sites)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the environment to be")
    parser.add_argument("--wheels", type=Path, required=True, help="where compiled wheels are kept")
    parser.add_argument("--requirements", type=Path, nargs="+", required=True)
    parser.add_argument("--gpu_requirements", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    build(arguments.folder, arguments.wheels, arguments.requirements, arguments.gpu_requirements)


def build(folder: Path, wheels: Path, plain: list[Path], on_gpus: list[Path]) -> None:
    """Make ``folder`` an environment with the packages in the lists; the file ``complete`` is written last."""
    began = time.monotonic()
    pins = read_pins([*plain, *on_gpus])
    python, facts = interpreter(with_torch=bool(on_gpus))
    own = own_packages(facts, pins) if on_gpus else {}
    for name, version in own.items():
        say(f"{name} {version} of {python} stays")
    wanted = [pin for pin in pins.items() if pin[0] not in own]
    compiled = [pin for pin in wanted if plain_name(pin[0]) in SOURCES]
    others = [pin for pin in wanted if pin not in compiled]
    kept = wheels / digest(facts, own, compiled, pins["torch"])
    there = (kept / "complete").exists()
    if compiled and not there:
        require_compiler(", ".join(name for name, _ in compiled), facts)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # after the new environment's packages, so that pinned packages take precedence over the host's
    sites = "".join(f"{site}\n" for site in facts["sites"]) if own else ""
    new = [python, "-c", MAKE, str(folder), sites]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--progress-bar", "off"]
    steps: list[tuple[str, list[str], dict[str, str]]] = [("a new environment", new, {})]
    steps += [(f"{len(others)} packages", [*pip, "--no-cache-dir", *joined(others)], {})]
    how = "as it was compiled before" if there else "to be compiled, which takes long"
    # pip keeps compiled wheels in its cache
    options = ["--no-build-isolation", "--cache-dir", str(kept)]
    for pin in compiled:
        command = [*pip, *options, *joined([pin])]
        steps.append((f"{pin[0]}, {how}", command, compiler_settings()))
    log = folder.with_name(f"{folder.name}.log")
    for number, (title, command, settings) in enumerate(steps, start=1):
        run_step(f"{number}/{len(steps)} {title}", command, settings, log)
    if compiled:
        (kept / "complete").touch()
    (folder / "complete").touch()
    say(f"ready after {minutes_and_seconds(time.monotonic() - began)}")


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def refuse(problem: str) -> NoReturn:
    """End with the problem and an exit code that prevents retries, which could not help."""
    print(f"EnvironmentError: {problem}", flush=True)
    sys.exit(CANNOT_HEAL)


def minutes_and_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def read_pins(lists: list[Path]) -> dict[str, str]:
    """The packages in the lists, with extras (``name[extra]``), and their pinned versions."""
    lines = [line.split("#")[0].strip() for file in lists for line in file.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {name: version for name, version in pairs}


def joined(pins: list[tuple[str, str]]) -> list[str]:
    return [f"{name}=={version}" for name, version in pins]


def plain_name(name: str) -> str:
    return name.partition("[")[0]


def interpreter(with_torch: bool) -> tuple[str, dict[str, Any]]:
    """The Python to build with and its facts; a Python with torch for GPUs is preferred."""
    fit, seen = [], []
    for name in PYTHONS:
        path = shutil.which(name)
        if path is None:
            continue
        asked = subprocess.run([path, "-c", ASK, "torch", *SOURCES], stdout=subprocess.PIPE)
        facts = json.loads(asked.stdout) if asked.returncode == 0 else {}
        version = ".".join(map(str, facts.get("version", ["?"])))
        seen.append(f"{path} is {version}{'' if facts.get('venv') else ' without venv'}")
        if version in ("3.11", "3.12") and facts["venv"]:
            fit.append((path, facts))
    if not fit:
        refuse(
            f"no Python 3.11 or 3.12 with venv here ({', '.join(seen) or 'none at all'}): install "
            "python3.11 and python3.11-venv, or name an interpreter as python in the connection"
        )
    return next((one for one in fit if with_torch and one[1]["cuda"]), fit[0])


def own_packages(facts: dict[str, Any], pins: dict[str, str]) -> dict[str, str]:
    """The host's packages to keep, by their names in the lists: vendor builds of the same release line."""
    if not facts["cuda"]:
        return {}
    own = {
        name: facts["found"][plain_name(name)]
        for name, version in pins.items()
        if release_line(facts["found"].get(plain_name(name), "")) == release_line(version)
    }
    # packages compiled against another torch are of no use
    return own if "torch" in own else {}


def release_line(version: str) -> str:
    """``2.13`` of ``2.13.0a0+nv26.10``."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else ""


def digest(
    facts: dict[str, Any], own: dict[str, str], pins: list[tuple[str, str]], torch: str
) -> str:
    """A digest of everything the compiled wheels depend on, such as torch and GPU."""
    made_of = [
        joined(pins), own.get("torch", torch), facts["cuda"], facts["version"], capabilities(),
        platform.machine(), platform.libc_ver(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def capabilities() -> list[str]:
    """The compute capabilities of the GPUs here (``9.0`` for Hopper); empty without GPUs."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(asked.stdout.decode().split()))


def nvcc() -> str | None:
    """The CUDA compiler, even if it is not on the login's PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    inside = os.path.join(home, "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path=inside)


def require_compiler(packages: str, facts: dict[str, Any]) -> None:
    """End at once if tools for compiling are missing, with one message that names all."""
    missing = []
    if nvcc() is None:
        missing.append("nvcc (the CUDA toolkit)")
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        missing.append("a C++ compiler (the package g++)")
    if not facts["headers"]:
        missing.append("Python's headers (python3.11-dev or python3.12-dev)")
    if missing:
        refuse(
            f"{packages} must be compiled here, and there is no {', no '.join(missing)}: "
            "install it, rent a host whose image has PyTorch and transformer-engine, or name an "
            "interpreter that has them as python in the connection"
        )


def compiler_settings() -> dict[str, str]:
    """Compile only for this host's GPUs, with as many processes as memory allows; the login's settings win."""
    archs = ";".join(capability.replace(".", "") for capability in capabilities())
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    settings = {"MAX_JOBS": str(max(1, min(os.cpu_count() or 1, int(memory_gb / COMPILER_GB))))}
    settings["NVTE_PYTORCH_FORCE_BUILD"] = "TRUE"
    if archs:
        settings.update(FLASH_ATTN_CUDA_ARCHS=archs, NVTE_CUDA_ARCHS=archs)
    compiler = nvcc()
    if compiler is not None:
        settings["CUDA_HOME"] = os.path.dirname(os.path.dirname(compiler))
        settings["PATH"] = f"{os.path.dirname(compiler)}:{os.environ['PATH']}"
    return {
        name: value for name, value in settings.items() if name == "PATH" or name not in os.environ
    }


def run_step(title: str, command: list[str], settings: dict[str, str], log: Path) -> None:
    """Run a step; its output goes to ``log``, its progress is printed."""
    say(title)
    began = said = time.monotonic()
    # else the last line would be what pip was at when its buffer was full
    environment = {**os.environ, **settings, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                say(f"  {minutes_and_seconds(said - began)}: {last_lines(log, 1)}")
    if process.returncode:
        print(last_lines(log, 30))
        sys.exit(
            f"environment: {title} ended with {process.returncode}; all it printed is in {log}"
        )
    say(f"  took {minutes_and_seconds(time.monotonic() - began)}")


def last_lines(log: Path, count: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(line[:200] for line in lines[-count:])


if __name__ == "__main__":
    main()
