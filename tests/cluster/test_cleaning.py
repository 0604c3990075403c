"""What nothing needs goes from a GPU host, over a real SSH connection, whatever refers to what on both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.execution_time.context import set_current_context

import steps.cleaning
from fastcpt.cluster import jobs
from fastcpt.cluster.remote import Remote, ask
from fastcpt.files import write_json
from fastcpt.registry.in_use import Policy, on_host

DAY = 86_400.0
SCRIPT = Path(__file__).parents[2] / "include" / "scripts" / "remove_unused.py"


def moment(days_ago: float) -> str:
    then = time.time() - days_ago * DAY
    return datetime.fromtimestamp(then, UTC).isoformat(timespec="seconds")


def aged(folder: Path, days_ago: float) -> None:
    then = time.time() - days_ago * DAY
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then), follow_symlinks=False)


def made(root: Path, *names: str, days_ago: float = 90, size: int = 1000) -> None:
    for name in names:
        (root / name / "deep" / "er").mkdir(parents=True)
        (root / name / "deep" / "er" / "content").write_bytes(bytes(size))
        aged(root / name, days_ago)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Five models of a recipe, law-4 the champion and law-2 before it; all runs ended 60 days ago.

    law-2 and law-4 were trained from one stage 1 on one corpus. law-1 was brought here, the others were
    left on the host.
    """
    home = tmp_path / "home"
    stage1 = {"1": "s1", "2": "s24", "3": "s3", "4": "s24", "5": "s5"}
    corpora = {"1": "c1", "2": "c24", "3": "c3", "4": "c24", "5": "c5"}
    known: dict[str, Any] = {}
    for number, before in stage1.items():
        name, record = f"law-{number}", home / "runs" / f"r{number}"
        facts = {"run": f"r{number}", "started": moment(60), "ended": moment(60)}
        write_json(record / "run.json", {**facts, "state": "success"})
        aged(record, 60)
        path = str(home / "models" / name) if number == "1" else f"gpu:/root/published/{name}"
        trainings = {"training": f"t{number}", "before_sft": before}
        known[name] = {"record": record.name, "corpus": corpora[number], "path": path, **trainings}
    made(home, "models/law-1")
    promoted = (("law-1", None), ("law-2", "law-1"), ("law-4", "law-2"))
    events = [{"what": "promoted", "model": one, "instead_of": of} for one, of in promoted]
    write_json(home / "models" / "law" / "models.json", {"models": known, "events": events})
    return home


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What those runs left on the host, and what else lies there."""
    root = tmp_path / "root"
    made(root, *(f"models/{name}" for name in ("s1", "s24", "s3", "s5", "failed", "base-0")))
    made(root, *(f"models/t{number}" for number in range(1, 6)))
    made(root, *(f"published/law-{number}" for number in range(1, 6)), "published/others")
    made(root, *(f"runs/r{number}" for number in range(1, 6)), "runs/forgotten")
    made(root, "corpora/c1", "corpora/c24", "corpora/c3", "corpora/c5", "corpora/old")
    made(root, "code/old", "environments/old", "instructions/old", "wheels/old", "jobs/old")
    made(root, "code/new", "environments/new", "corpora/new", "models/new", days_ago=3)
    return root


def clean(
    remote: Remote,
    home: Path,
    root: Path,
    days: float = 30,
    candidates: int | None = 0,
    remove: bool = True,
) -> set[str]:
    """What went, by its path below the root."""
    asked = on_host(home, Policy(days, candidates))
    found = ask(remote, "clean", root=str(root), remove=remove, **asked)["folders"]
    assert all(one["bytes"] == 1000 for one in found if "/jobs/" not in one["path"])
    return {str(Path(one["path"]).relative_to(root)) for one in found}


OLD = {"code/old", "environments/old", "instructions/old", "corpora/old", "jobs/old"}


def test_the_champion_and_the_one_before_it_keep_all_that_they_came_from(
    remote: Remote, home: Path, root: Path
) -> None:
    there = {str(path.relative_to(root)) for path in root.glob("*/*")}
    gone = {
        *OLD,
        *("models/s1", "models/s3", "models/s5", "models/t1", "models/t3", "models/t5"),
        *("models/failed", "models/base-0"),
        # law-1 goes here and there; a published model that no recipe knows stays
        *("published/law-1", "published/law-3", "published/law-5"),
        *("corpora/c1", "corpora/c3", "corpora/c5", "runs/forgotten"),
    }
    # of the records here those of models that lie on the host stay, and with them those there
    gone |= {"runs/r1"}
    assert clean(remote, home, root, remove=False) == gone
    assert {str(path.relative_to(root)) for path in root.glob("*/*")} == there
    assert clean(remote, home, root) == gone
    assert {str(path.relative_to(root)) for path in root.glob("*/*")} == there - gone
    assert clean(remote, home, root) == set()


def test_so_many_candidates_stay_with_what_they_came_from(
    remote: Remote, home: Path, root: Path
) -> None:
    gone = clean(remote, home, root, candidates=1)
    assert gone.isdisjoint({"published/law-5", "models/s5", "models/t5", "corpora/c5"})
    assert {"published/law-3", "models/s3", "models/t3", "corpora/c3"} <= gone


def test_without_candidates_trainings_and_models_stay(
    remote: Remote, home: Path, root: Path
) -> None:
    assert clean(remote, home, root, candidates=None) == OLD


def test_trainings_stay_while_a_model_does_not_say_which_it_came_from(
    remote: Remote, home: Path, root: Path
) -> None:
    file = home / "models" / "law" / "models.json"
    file.write_text(file.read_text().replace('"before_sft"', '"of an older version"'))
    gone = clean(remote, home, root)
    assert {name for name in gone if name.startswith("models/")} == set()
    assert "published/law-3" in gone


def test_a_run_that_goes_on_keeps_what_was_used_since_it_began(
    remote: Remote, home: Path, root: Path
) -> None:
    # it waits for GPUs since 50 days, and begins with a model that is the champion no more
    write_json(home / "runs" / "waits" / "run.json", {"run": "waits", "started": moment(50)})
    write_json(home / "runs" / "waits" / "start.json", {"model": "law-3", "training": "s3"})
    made(root, "corpora/of-it", days_ago=45)
    made(root, "corpora/before-it", days_ago=55)
    gone = clean(remote, home, root)
    assert "corpora/before-it" in gone
    assert gone.isdisjoint({"corpora/of-it", "models/s3"})
    assert "models/t3" in gone


def test_a_job_keeps_what_its_script_names_however_old_it_is(
    remote: Remote, home: Path, root: Path
) -> None:
    used = ("models/failed", "corpora/old", "code/old")
    words = [str(root / name) for name in used]
    job = jobs.Job("goes-on", [["sleep", "60"], ["echo", *words]], alone="no")
    assert jobs.submit(remote, str(root), job) == "started"
    try:
        for name in (*used, "jobs/goes-on"):
            aged(root / name, 80)
        gone = clean(remote, home, root)
    finally:
        jobs.stop(remote, str(root), "goes-on")
    assert gone.isdisjoint({*used, "jobs/goes-on"})
    assert {"models/s3", "environments/old"} <= gone
    for name in (*used, "jobs/goes-on"):
        aged(root / name, 80)
    assert clean(remote, home, root) == {*used, "jobs/goes-on"}


def test_what_a_run_finds_done_is_young_again(remote: Remote, home: Path, root: Path) -> None:
    result = root / "models" / "failed" / "training.json"
    result.write_text("{}")
    aged(result.parent, 80)
    job = jobs.Job("again", [["train", str(root / "models" / "failed")]], result=str(result))
    assert jobs.submit(remote, str(root), job) == "complete"
    assert "models/failed" not in clean(remote, home, root)


def test_a_removal_that_was_killed_is_finished_by_the_next(
    remote: Remote, home: Path, root: Path
) -> None:
    half = root / "models" / ".s9.removed"
    half.mkdir()
    assert clean(remote, home, root, remove=False)
    assert half.is_dir()
    clean(remote, home, root)
    assert not half.exists()


def test_the_shell_lists_first_and_then_removes(remote: Remote, home: Path, root: Path) -> None:
    options = {
        "--host": remote.host,
        "--port": remote.port,
        "--user": remote.user,
        "--key_file": remote.key_file,
        "--known_hosts": remote.known_hosts,
        "--root": root,
    }
    words = [str(word) for pair in options.items() for word in pair]
    environment = {**os.environ, "FASTCPT_HOME": str(home)}

    def run(*more: str) -> list[str]:
        command = [sys.executable, SCRIPT, *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    made(root, "corpora/large", size=20_000_000)
    *listed, last = run("--dry_run")
    assert f"    0.02 GB  {root}/corpora/large" in listed
    assert last == "    0.02 GB  would be freed"
    assert (root / "corpora" / "large").is_dir()
    assert run() == [*listed, "    0.02 GB  freed"]
    assert not (root / "corpora" / "large").exists()


def test_the_form_cleans_both_sides_where_it_says_so(
    remote: Remote,
    home: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = {"key_file": remote.key_file, "known_hosts": remote.known_hosts, "root": str(root)}
    host = {"conn_type": "gpuhost", "host": remote.host, "login": remote.user, "port": remote.port}
    monkeypatch.setenv("AIRFLOW_CONN_GPU", json.dumps({**host, "extra": extra}))
    monkeypatch.setattr(steps.cleaning, "HOME", home)
    made(home, "tokens/old")
    form: dict[str, Any] = {"connection": "gpu", "days": 30, "candidates": 0, "remove": False}

    def trigger() -> str:
        context: Any = {"params": form}
        with set_current_context(context):
            steps.cleaning.clean()
        return capsys.readouterr().out

    listed = trigger()
    assert f"0.00 GB  gpu:{root}/published/law-3" in listed
    assert f"0.00 GB  {home}/tokens/old" in listed
    assert (root / "published" / "law-3").is_dir()
    form["remove"] = True
    trigger()
    left = [home / "tokens" / "old", home / "models" / "law-1", root / "published" / "law-3"]
    assert not any(folder.exists() for folder in left)
    assert (root / "models" / "s24").is_dir()
