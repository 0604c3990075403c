"""Pinned packages without a wheel for a Mac (arm64, Python 3.11), and whether their source is pure Python.

    macos_wheels.py [requirements.txt ...]

It asks pip's index (simple API, PEP 691) and downloads only the sources of packages without a
wheel. These are built here; they are pure Python if the resulting wheel is for any platform. Exits 1
if a package has neither.
"""

from __future__ import annotations

import argparse
import re
import ssl
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version
from pip._internal.models.index import PyPI

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("requirements.txt", "requirements-cluster.txt", "requirements-dev.txt")
PYTHON = (3, 11)
MACOS = (14, 0)  # wheels for older ones count too
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=FILES, help="(default: %(default)s)")
    files = [REPOSITORY / file for file in parser.parse_args().files]
    pinned = sorted({pin for file in files for pin in pinned(file.read_text())}, key=str.lower)
    context = ssl.create_default_context()
    with (
        httpx.Client(verify=context, timeout=60, follow_redirects=True) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        released = list(threads.map(lambda pin: index_files(client, pin), pinned))
    mac = tags_of_a_mac()
    without = [
        (pin, names)
        for pin, names in zip(pinned, released, strict=True)
        if not any(is_wheel_for(name, mac) for name in names)
    ]
    print(f"{len(pinned)} pinned packages, {len(without)} without a wheel for a Mac:")
    missing = 0
    for pin, names in without:
        has_source = any(name.endswith((".tar.gz", ".zip")) for name in names)
        print(f"  {pin}: {built(pin) if has_source else 'no source either'}", flush=True)
        missing += not has_source
    return int(missing > 0)


def pinned(text: str) -> list[str]:
    """``name==version`` of each line; extras do not affect which file is needed."""
    lines = (re.sub(r"\s*#.*|\[.*?\]", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def index() -> str:
    """The index that pip is configured for, or else PyPI."""
    done = subprocess.run(
        [*PIP, "config", "get", "global.index-url"], capture_output=True, text=True
    )
    return (done.stdout.strip() or PyPI.simple_url).rstrip("/")


def index_files(client: httpx.Client, pin: str) -> list[str]:
    """Names of the index's files for the pinned version."""
    name, version = pin.split("==")
    answer = client.get(f"{INDEX}/{canonicalize_name(name)}/", headers=JSON)
    answer.raise_for_status()
    names = [file["filename"] for file in answer.json()["files"]]
    return [name for name in names if version_of(name) == Version(version)]


def version_of(name: str) -> Version | None:
    try:
        return (parse_wheel_filename if name.endswith(".whl") else parse_sdist_filename)(name)[1]
    except ValueError:  # an egg, an installer, or a name older than the naming rules
        return None


def tags_of_a_mac() -> set[Tag]:
    platforms = list(mac_platforms(MACOS, "arm64"))
    return {
        *cpython_tags(PYTHON, platforms=platforms),
        *compatible_tags(PYTHON, "cp311", platforms),
    }


def is_wheel_for(name: str, tags: set[Tag]) -> bool:
    return name.endswith(".whl") and not tags.isdisjoint(parse_wheel_filename(name)[3])


def built(pin: str) -> str:
    """What the source of a package without a wheel needs to be built."""
    with tempfile.TemporaryDirectory() as folder:
        name = pin.split("==")[0]
        build = [*PIP, "wheel", "-q", "--no-deps", "--no-binary", name, "-w", folder, pin]
        done = subprocess.run(build, capture_output=True, text=True)
        made = next(Path(folder).glob("*.whl"), None)
    if made is None:
        return f"source that does not build here: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return f"source, {'pure Python' if made.stem.endswith('-any') else 'needs a compiler'}"


INDEX = index()

if __name__ == "__main__":
    sys.exit(main())
