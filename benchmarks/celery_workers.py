"""Scoring and tokenizing distributed over two Celery workers: separate processes with a shared folder.

    . include/scripts/tools.sh; .env/airflow/bin/python benchmarks/celery_workers.py --data FOLDER --tokenizer FOLDER

Starts an Airflow with the CeleryExecutor (the broker is a folder), two workers of one task each and
an OpenSSH server, triggers the DAG and waits for `build`. The corpus must be, byte for byte, the
one that a single process builds. Celery's packages (requirements-celery.txt) are installed under
``.env/celery``. The last line is one JSON object: the number of mapped tasks of each worker, and
whether the corpora are ``identical``; the exit code is 0 only if both workers did both steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CELERY = REPOSITORY / ".env" / "celery"
WORKERS = ("one", "two")
MAPPED = ("score", "tokenize")
CORPUS = ("plan", "list_documents", "score", "select", "tokenize", "build")
sys.path[:0] = [str(REPOSITORY / part) for part in ("include", "include/scripts")]


def install() -> None:
    listed = REPOSITORY / "requirements-celery.txt"
    done = CELERY / listed.name
    if not done.exists() or done.read_text() != listed.read_text():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(CELERY), "-r", str(listed)], check=True)
        done.write_text(listed.read_text())


def settings(home: Path) -> dict[str, str]:
    """Settings that give the local stack's Airflow Celery workers."""
    queue = home / "queue"
    queue.mkdir()
    return {
        "PYTHONPATH": f"{REPOSITORY}/include:{CELERY}",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "getpass.getuser",  # $LOGNAME: tells the workers apart
        "AIRFLOW__CELERY__BROKER_URL": "filesystem://",
        "AIRFLOW__CELERY__RESULT_BACKEND": f"db+sqlite:///{home}/celery.db",
        "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__DATA_FOLDER_IN": str(queue),
        "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__DATA_FOLDER_OUT": str(queue),
        "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__CONTROL_FOLDER": str(home / "control"),
    }


def start_worker(name: str, home: Path, environment: dict[str, str]) -> int:
    options = ["--concurrency", "1", "--celery-hostname", name, "--skip-serve-logs"]
    with (home / "logs" / f"worker-{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(REPOSITORY / ".env/airflow/bin/airflow"), "celery", "worker", *options],
            env={**environment, "LOGNAME": name},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=home,
        )
    return process.pid


def built_by_workers(home: Path, conf: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The mapped tasks by worker, seconds until the corpus was built, and its path."""
    os.environ["FASTCPT_HOME"] = str(home)
    import local_stack
    import process_groups

    local = local_stack.airflow_environment
    celery = settings(home)
    local_stack.airflow_environment = lambda *facts: local(*facts) | celery
    state = local_stack.start_stack()
    try:
        environment = {**os.environ, **state["settings"], **celery}
        workers = [start_worker(name, home, environment) for name in WORKERS]
        state["processes"] += [
            process_groups.entry(pid, "airflow celery worker") for pid in workers
        ]
        with local_stack.Api(state["url"], local_stack.HOME) as api:
            api.log_in()
            run = api.trigger(conf)
            began = time.monotonic()
            while (states := states_of(api, run))["build"] != "success":
                failed = [task for task in CORPUS if states[task] in ("failed", "upstream_failed")]
                if failed or time.monotonic() - began > 900:
                    sys.exit(f"{failed or 'build'} did not succeed: {states}")
                time.sleep(1)
            tasks = api.get(f"dagRuns/{run}/taskInstances", limit=1000)["task_instances"]
            figures: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
            for step in MAPPED:
                figures[step] = Counter(t["hostname"] for t in tasks if t["task_id"] == step)
            api.end_unfinished_runs()
    finally:
        local_stack.end_stack(state)
    (corpus,) = (home / "corpora").iterdir()
    return figures, corpus


def states_of(api: Any, run: str) -> dict[str, str]:
    tasks = api.get(f"dagRuns/{run}/taskInstances", limit=1000)["task_instances"]
    return {task["task_id"]: task["state"] for task in tasks}


def built_alone(home: Path, recipe_file: Path) -> Path:
    """The corpus that one process builds."""
    from fastcpt.corpus.build import build
    from fastcpt.corpus.documents import list_parts
    from fastcpt.corpus.score import score_parts
    from fastcpt.corpus.select import select
    from fastcpt.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    scores = score_parts(list_parts(recipe.documents), recipe, home, 1)
    selection = select([score["path"] for score in scores], recipe, home)
    return Path(build(selection["path"], recipe, home, 1)["path"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    install()
    conf = {
        "recipe": "local",
        "documents": str(arguments.data.resolve()),
        "tokenizer": str(arguments.tokenizer.resolve()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "shared"
        home.mkdir()
        figures, corpus = built_by_workers(home, conf)
        print(f"by two workers: {json.dumps(figures)}", flush=True)
        (recipe,) = (home / "runs").glob("*/recipe.yaml")
        alone = built_alone(Path(scratch) / "alone", recipe)
        figures["identical"] = bytes_of(corpus) == bytes_of(alone)
    print(json.dumps(figures))
    both = all(set(figures[step]) == set(WORKERS) for step in MAPPED)
    return 0 if both and figures["identical"] else 1


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


if __name__ == "__main__":
    sys.exit(main())
