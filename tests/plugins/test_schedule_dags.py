"""The schedules' DAGs in a real Airflow of one process: parsed, with nothing new, and failing."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import notifications
from fastcpt.corpus.documents import list_parts
from fastcpt.corpus.new_documents import state_of
from fastcpt.corpus.sample import generate_sample
from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.registry.champion import take_untold
from fastcpt.reporting.record import close_record, open_record
from receivers import MailServer, WebServer, receivers, settings_of
from registry.conftest import GOOD, add_corpus
from registry.test_champion import SCRIPT, add

pytestmark = pytest.mark.slow

PLUGINS = Path(notifications.__file__).parent
# What the DAG processor does with the folder, and then one run of a schedule.
PARSE_AND_RUN = """
import json, os, sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
facts = {"dags": sorted(bag.dags), "errors": {k.rpartition("/")[2]: v for k, v in bag.import_errors.items()}}
for name, scheduled in bag.dags.items():
    if name != "fast_cpt":
        facts[name] = [scheduled.max_active_runs, scheduled.catchup]
        facts.setdefault("times", {})[name] = str(scheduled.schedule)
if len(sys.argv) > 2:
    began = sum(os.times()[:4])
    run = bag.dags[sys.argv[2]].test()
    facts["states"] = {ti.task_id: ti.state for ti in run.get_task_instances()}
    facts["seconds"] = sum(os.times()[:4]) - began
print("\\nFACTS " + json.dumps(facts))
"""


class Airflow:
    """FASTCPT_HOME with a sample of documents, and an Airflow that has it."""

    def __init__(self, folder: Path, mail: MailServer, web: WebServer) -> None:
        self.home, self.mail, self.web = folder / "home", mail, web
        self.documents = folder / "sample" / "parsed"
        self.home.mkdir()
        generate_sample(folder / "sample", documents=20)
        self.environment = {
            **os.environ,
            "FASTCPT_HOME": str(self.home),
            "PYTHONPATH": f"{PLUGINS}:{PLUGINS.parent / 'include'}",
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(PLUGINS.parent / "dags"),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(PLUGINS),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            **settings_of(mail, web),
        }
        self.call("-m", "airflow", "db", "migrate")

    def call(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    def schedules(self, **schedules: str) -> None:
        """Write the file: each schedule on a folder of documents."""
        content = {
            name: {"time": "@weekly", "recipe": "sample", "overrides": {"documents.path": folder}}
            for name, folder in schedules.items()
        }
        write_json(self.home / "schedules.yaml", content)  # JSON is YAML

    def parse(self, *run: str) -> dict[str, Any]:
        """The DAGs that there are; the states of a run of the named one; all it said as ``log``."""
        log = self.call("-c", PARSE_AND_RUN, str(PLUGINS.parent / "dags"), *run)
        return {**json.loads(log.rpartition("\nFACTS ")[2].splitlines()[0]), "log": log}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    with receivers() as servers:
        yield Airflow(tmp_path_factory.mktemp("airflow"), *servers)


@pytest.fixture
def airflow(started: Airflow) -> Airflow:
    """No schedules yet, nothing received."""
    (started.home / "schedules.yaml").unlink(missing_ok=True)
    started.mail.received.clear()
    started.web.received.clear()
    return started


def test_a_schedule_with_nothing_new_is_skipped_within_seconds(airflow: Airflow) -> None:
    airflow.schedules(weekly=str(airflow.documents), other="/nowhere")
    recipe = load_recipe("sample", {"documents.path": str(airflow.documents)})
    record = open_record(airflow.home, "weekly__2026-11-21T00:00:00+00:00", "fast_cpt", recipe)
    write_json(record / "documents.json", state_of(list_parts(recipe.documents)))
    close_record(record, "success")
    found = airflow.parse("fast_cpt_weekly")
    assert found["dags"] == [
        "fast_cpt",
        "fast_cpt_champion",
        "fast_cpt_cleaning",
        "fast_cpt_messages",
        "fast_cpt_other",
        "fast_cpt_rentals",
        "fast_cpt_weekly",
    ]
    assert found["errors"] == {}
    # one at a time, and none for the times before
    assert found["fast_cpt_weekly"] == [1, False]
    assert found["states"] == {"look_for_new": "skipped", "run": "skipped"}
    # of the processor: others may use the machine as well
    assert found["seconds"] < 20
    assert found["log"].count("weekly: 0 new or changed files, about 0 tokens, since 2026") == 1
    assert airflow.web.received == airflow.mail.received == []


def test_a_schedule_that_cannot_look_fails_at_once_and_is_told(airflow: Airflow) -> None:
    airflow.schedules(weekly=str(airflow.home / "nowhere"))
    assert airflow.parse("fast_cpt_weekly")["states"] == {
        "look_for_new": "failed",
        "run": "upstream_failed",
    }
    ((recipients, message),) = airflow.mail.received
    assert recipients == ["ann@example.org"]
    assert "failed: look_for_new of fast_cpt_weekly" in message["Subject"]
    (post,) = airflow.web.received
    title, reason, link = post["text"].split("\n")
    assert title.startswith("*Fast CPT: failed: look_for_new of fast_cpt_weekly, manual__")
    assert "/nowhere' does not exist; give a folder of documents" in reason
    assert "/dags/fast_cpt_weekly/runs/manual__" in link


def test_a_file_that_is_wrong_is_an_import_error_and_leaves_fast_cpt_alone(
    airflow: Airflow,
) -> None:
    (airflow.home / "schedules.yaml").write_text("weekly:\n  tme: '@weekly'\n  recipe: sample\n")
    found = airflow.parse()
    assert found["dags"] == [
        "fast_cpt",
        "fast_cpt_champion",
        "fast_cpt_cleaning",
        "fast_cpt_messages",
        "fast_cpt_rentals",
    ]
    assert list(found["errors"]) == ["fast_cpt_schedules.py"]
    error = found["errors"]["fast_cpt_schedules.py"]
    assert "schedules.yaml:2: weekly.tme: unknown key; did you mean 'time'?" in error


def test_a_rollback_in_a_shell_is_told_once_and_only_then_is_there_a_schedule(
    airflow: Airflow,
) -> None:
    add_corpus(airflow.home)
    for model, against in (("law-1", None), ("law-2", "law-1")):
        add(airflow.home, model, against, GOOD)
        # what the run that published it has told
        assert take_untold(airflow.home, "law") is not None
    airflow.call(str(SCRIPT), "--recipe", "law", "rollback", "--why", "wrong dates")
    airflow.web.answer = 500
    try:
        found = airflow.parse("fast_cpt_messages")
    finally:
        airflow.web.answer = 200
    assert found["times"]["fast_cpt_messages"] == "*/2 * * * *"
    # a webhook that fails changes nothing
    assert found["states"] == {"tell_untold": "success"}
    ((_, message),) = airflow.mail.received
    assert message["Subject"].startswith("Fast CPT: rolled back: tell_untold of fast_cpt_messages")
    (post,) = airflow.web.received
    told = f"law-1 rolled back (instead of law-2): wrong dates ({getpass.getuser()})"
    assert post["text"].split("\n")[1] == told
    assert airflow.parse()["times"]["fast_cpt_messages"] == "None"
