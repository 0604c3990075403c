"""docs/dag.svg shows the actual DAG: every task and every edge."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
EDGES = """
import draw_dag
edges = draw_dag.dag_edges()
print("drawn:", *(f"{one}->{other}" for one, other in draw_dag.drawn(edges)))
print("tasks:", *{task for edge in edges for task in edge})
abc = [("a", "b"), ("b", "c"), ("a", "c")]
print("implied:", draw_dag.drawn(abc))
"""


def titles(kind: str) -> set[str]:
    """What graphviz calls a picture's nodes or edges."""
    groups = ElementTree.parse(REPOSITORY / "docs" / "dag.svg").getroot().iter(f"{SVG}g")
    return {group.findtext(f"{SVG}title", "") for group in groups if group.get("class") == kind}


def test_the_picture_is_of_the_dag(tmp_path: Path) -> None:
    scripts = str(REPOSITORY / "include" / "scripts")
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": scripts}
    command = [sys.executable, "-c", EDGES]
    asked = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert asked.returncode == 0, asked.stderr
    told = dict(line.split(": ", 1) for line in asked.stdout.splitlines() if ": " in line)
    assert titles("edge") == set(told["drawn"].split())
    assert titles("node") == set(told["tasks"].split())
    assert len(titles("node")) > 10
    assert told["implied"] == "[('a', 'b'), ('b', 'c')]"
