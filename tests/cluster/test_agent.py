"""The agent on a host: one program on standard input, without installed files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastcpt.cluster.agent import program


def ask(at: Path, do: str, **values: Any) -> dict[str, Any]:
    """The answer of a Python that has nothing of ours, in a folder with another ``fastcpt``."""
    (at / "fastcpt").mkdir(exist_ok=True)
    (at / "fastcpt" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    done = subprocess.run(
        [sys.executable, "-"],
        input=program.request(do, json.dumps(values)).encode(),
        capture_output=True,
        cwd=at,
        env={**os.environ, "PYTHONPATH": str(at)},
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


def test_a_request_is_answered_by_what_was_sent(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("one § two")
    paths = {"kept": str(tmp_path / "kept"), "absent": str(tmp_path / "absent")}
    assert ask(tmp_path, "read_files", paths=paths) == {"kept": "one § two", "absent": None}
    # nothing was written there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastcpt", "kept"]


def test_a_mistake_there_is_told_with_its_line(tmp_path: Path) -> None:
    answer = ask(tmp_path, "verify", folder=str(tmp_path), files=[{}])
    assert 'File "fastcpt/cluster/agent/files.py", line ' in answer["error"]
    assert 'path = os.path.join(folder, wanted["file"])' in answer["error"]


def test_a_jobs_supervisor_is_of_the_version_that_started_it(tmp_path: Path) -> None:
    values = {"name": "j", "script": "true", "digest": "d", "secrets": {}, "result": None}
    root = tmp_path / "root"
    assert ask(tmp_path, "submit", root=str(root), alone="no", **values)["found"] == "started"
    assert (root / "jobs" / "j" / "supervisor.py").read_text() == program.supervisor()
    assert ask(tmp_path, "stop", root=str(root), name="j")["ended"]
