"""Draw docs/dag.svg from the DAG: `.env/airflow/bin/python include/scripts/draw_dag.py`.

Graphviz draws it: `dot` has to be installed (`apt-get install graphviz`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / folder) for folder in ("include", "plugins", "dags")]

PICTURE = REPOSITORY / "docs" / "dag.svg"
Edge = tuple[str, str]  # a task, and a task downstream of it
LABELS = {
    ("gate", "train_sft"): "   below the threshold",
    ("gate", "train_cpt_stage2"): "otherwise",
}
LOOK = """
  bgcolor=white nodesep=0.25 ranksep=0.33
  node [shape=box style="rounded,filled" fillcolor="#eef3fb" color="#3b5b92" fontcolor="#16233b"
        fontname="Helvetica,Arial,sans-serif" fontsize=11.5 width=1.65 height=0.36]
  edge [color="#5b6b85" fontcolor="#44546f" fontname="Helvetica,Arial,sans-serif" fontsize=10
        arrowsize=0.7]
"""


def main() -> None:
    from fastcpt.files import whole_file

    edges = [
        f'  "{one}" -> "{other}" [label="{LABELS.get((one, other), "")}"]'
        for one, other in drawn(dag_edges())
    ]
    graph = "digraph fast_cpt {" + LOOK + "\n".join(edges) + "\n}\n"
    try:
        picture = subprocess.run(["dot", "-Tsvg"], input=graph, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("there is no dot on this machine: apt-get install graphviz")
    if picture.returncode:
        sys.exit(picture.stderr)
    with whole_file(PICTURE) as aside:
        aside.write_text(picture.stdout, encoding="utf-8")
    print(PICTURE)


def dag_edges() -> list[Edge]:
    """The DAG's edges."""
    import fast_cpt

    tasks = fast_cpt.fast_cpt().topological_sort()
    return [(task.task_id, after) for task in tasks for after in sorted(task.downstream_task_ids)]


def drawn(edges: Sequence[Edge]) -> list[Edge]:
    """The edges without those implied by a longer path; labelled edges stay."""
    return [edge for edge in edges if edge in LABELS or not _is_implied(edge, edges)]


def _is_implied(edge: Edge, edges: Iterable[Edge]) -> bool:
    start, end = edge
    seen: set[str] = set()
    waiting = [after for before, after in edges if before == start and after != end]
    while waiting:
        task = waiting.pop()
        if task == end:
            return True
        if task not in seen:
            seen.add(task)
            waiting += [after for before, after in edges if before == task]
    return False


if __name__ == "__main__":
    main()
