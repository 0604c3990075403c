"""Draw docs/dag.svg from the DAG itself: `.env/airflow/bin/python include/scripts/draw_dag.py`."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / folder) for folder in ("include", "plugins", "dags")]

LABELS = {
    ("gate", "train_sft"): "below the threshold",
    ("gate", "train_cpt_stage2"): "otherwise",
}


def main() -> None:
    import fast_cpt

    from fastcpt.reporting.pictures import dag_picture

    dag = fast_cpt.fast_cpt()
    edges = [
        (task.task_id, after) for task in dag.tasks for after in sorted(task.downstream_task_ids)
    ]
    target = REPOSITORY / "docs" / "dag.svg"
    dag_picture([task.task_id for task in dag.topological_sort()], edges, target, LABELS)
    print(target)


if __name__ == "__main__":
    main()
