"""The commands in README, CONTRIBUTING and docs/: each runs here, or its reason not to is below."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastcpt.schedules import read_schedules

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *(REPOSITORY / "docs").glob("*.md"),
]
# How a command begins, and why it does not run here.
ELSEWHERE = {
    "make run": "minutes: tests/e2e",
    "make up": "leaves Airflow running: tests/e2e",
    "make down": "ends what make up started: tests/test_local_stack.py",
    "make test": "this runs in it",
    "make install-dev": "what make test begins with",
    "make lint": "what make test begins with",
    "pre-commit install": "changes the checkout's hooks",
    ". include/scripts/tools.sh": "sets the path for the next line",
    ".env/airflow/bin/python -m pytest": "this runs in it",
    ".env/cluster/bin/python -m pytest": "this runs in it",
    "include/scripts/deployment.sh": "needs a Docker engine: tests/deployment",
    "cp my_key": "the reader's own files: tests/deployment",
    "docker compose": "needs a Docker engine: tests/deployment",
    "git pull": "needs a Docker engine: tests/deployment",
    "git clone REPOSITORY": "the reader's own address",
    "xcode-select": "macOS",
    "brew": "macOS",
    ".env/airflow/bin/hf": "the hub, with the reader's own account",
    "ssh-keyscan -p PORT HOST": "the reader's own host",
    "ssh-keygen -lf my_known_hosts": "the reader's own host",
    ".env/airflow/bin/python include/scripts/champion.py": "needs models of earlier runs: tests/registry",
    ".env/airflow/bin/python include/scripts/remove_unused.py --host": "the reader's own host: tests/cluster",
    "NVTE_FP8_DPA_BWD=1": "a GPU host: tests/training runs the same scripts",
    "deepspeed": "a GPU host: tests/training runs the same scripts",
    "python scripts/": "a GPU host: tests/training runs the same scripts",
}
# A plan that does not fit ends with 1, and says so.
STATUS = {"--cluster 4xB200": 1}


def commands() -> list[tuple[str, str]]:
    """Each command of each block of shell, with the page that prints it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, re.sub(r"\s+# .*", "", line)) for line in lines if line.strip()]
    return found


HERE = [one for one in commands() if not one[1].startswith(tuple(ELSEWHERE))]


def test_there_are_commands_and_every_reason_is_still_needed() -> None:
    every = [line for _, line in commands()]
    assert len(every) > 25
    assert HERE
    for start in ELSEWHERE:
        assert any(line.startswith(start) for line in every), start


@pytest.mark.parametrize(("page", "line"), HERE, ids=[f"{page}-{line[:60]}" for page, line in HERE])
def test_a_printed_command_runs_as_printed(page: str, line: str, tmp_path: Path) -> None:
    """In a checkout of its own, so that what it writes is nobody's."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "include", tmp_path / "include", ignore=leave)
    (tmp_path / ".env").symlink_to(REPOSITORY / ".env")
    asked = {"input": "\n\n\n", "capture_output": True, "text": True, "timeout": 120}
    home = {**os.environ, "HOME": str(tmp_path), "FASTCPT_HOME": str(tmp_path / "home")}
    done = subprocess.run(["bash", "-euc", line], cwd=tmp_path, env=home, **asked)
    expected = next((status for part, status in STATUS.items() if part in line), 0)
    assert done.returncode == expected, f"{page}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_the_printed_schedules_are_ones(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "schedules.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "schedules.yaml").write_text(block)
    assert set(read_schedules(tmp_path / "schedules.yaml")) == {"weekly"}
