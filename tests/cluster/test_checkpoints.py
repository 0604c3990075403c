"""Checkpoints outlive their host: the newest complete one is copied here, and sent to another host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.test_rented_host import eventually
from fastcpt.cluster import jobs
from fastcpt.cluster.agent import checkpoints as agent
from fastcpt.cluster.checkpoints import bring, forget, newest_here, send_back
from fastcpt.cluster.remote import ClusterError, Remote
from fastcpt.files import HOME, sha256_of_file, write_json
from fastcpt.recipe import Recipe
from faults.machines import Watch
from steps import training as step

INCLUDE = Path(__file__).resolve().parents[2] / "include"


def save(folder: Path, step: int, size: int = 1000) -> None:
    """A checkpoint of two ranks as the trainer leaves it, and the curve up to it."""
    checkpoint = folder / "checkpoints" / f"step_{step}"
    checkpoint.mkdir(parents=True)
    for name in ("rank_0.pt", "rank_1.pt"):
        (checkpoint / name).write_bytes(os.urandom(size))
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    digests = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(checkpoint.iterdir())
    }
    write_json(checkpoint / "digests.json", digests)
    with (folder / "metrics.jsonl").open("a") as curve:
        curve.write(f'{{"step": {step}}}\n')


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "host" / "models" / "t1"
    save(folder, 5)
    save(folder, 10)
    return folder


def test_the_newest_is_brought_and_the_one_before_goes_when_it_is_whole(
    remote: Remote, training: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "t1"
    answer = bring(remote, str(training), home)
    assert answer is not None
    assert answer["step"] == 10
    brought = home / "step_10"
    assert newest_here(home) == brought
    there = content(training / "checkpoints" / "step_10")
    assert content(brought / "checkpoints" / "step_10") == there
    assert (brought / "metrics.jsonl").read_text() == '{"step": 5}\n{"step": 10}\n'
    # nothing is kept there for it, and nothing is brought twice
    assert not (training / "leaving").exists()
    assert bring(remote, str(training), home) is None
    save(training, 15)
    answer = bring(remote, str(training), home)
    assert answer is not None
    assert [path.name for path in home.glob("[!.]*")] == ["step_15"]


def test_what_is_being_brought_stays_whole_when_the_training_removes_it(training: Path) -> None:
    state = agent.newest_checkpoint(str(training), -1)
    there = content(training / "checkpoints" / "step_10")
    save(training, 20)
    shutil.rmtree(training / "checkpoints" / "step_10")
    held = Path(state["path"])
    assert content(held / "checkpoints" / "step_10") == there
    for file in state["files"]:
        assert sha256_of_file(held / file["file"]) == file["sha256"]
    # asked again, a newer one takes its place
    assert agent.newest_checkpoint(str(training), -1)["step"] == 20
    assert [path.name for path in (training / "leaving").iterdir()] == ["step_20"]


def test_a_checkpoint_is_as_old_as_its_first_file(training: Path) -> None:
    checkpoint = training / "checkpoints" / "step_10"
    saved = time.time() - 90
    os.utime(checkpoint / "rank_1.pt", (saved, saved))
    assert agent.newest_checkpoint(str(training), -1)["age_s"] == pytest.approx(90, abs=10)
    # a clock that was set back makes nothing negative
    for file in checkpoint.iterdir():
        os.utime(file, (saved + 3600, saved + 3600))
    assert agent.newest_checkpoint(str(training), -1)["age_s"] == 0.0


def test_without_a_checkpoint_there_is_nothing_to_bring(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "t" / "checkpoints" / ".step_3.partial").mkdir(parents=True)
    assert bring(remote, str(tmp_path / "t"), tmp_path / "home") is None
    assert send_back(remote, str(tmp_path / "t"), tmp_path / "home") is None


def test_another_host_goes_on_from_what_was_brought(
    remote: Remote, training: Path, tmp_path: Path
) -> None:
    (training / "areas" / "tax").mkdir(parents=True)
    (training / "areas" / "tax" / "adapter.bin").write_bytes(b"done")
    home, other = tmp_path / "home" / "t1", tmp_path / "other" / "t1"
    bring(remote, str(training), home)
    there = content(training / "checkpoints" / "step_10")
    shutil.rmtree(training)
    assert send_back(remote, str(other), home) == 10
    assert content(other / "checkpoints" / "step_10") == there
    assert (other / "metrics.jsonl").read_text() == '{"step": 5}\n{"step": 10}\n'
    assert (other / "areas" / "tax" / "adapter.bin").read_bytes() == b"done"
    assert sorted(path.name for path in other.iterdir()) == [
        *("areas", "checkpoints", "metrics.jsonl")
    ]
    # one that is as new stays
    assert send_back(remote, str(other), home) is None
    save(other, 12)
    assert send_back(remote, str(other), home) is None


def program(
    remote: Remote, training: Path, home: Path, url: str | None = None
) -> subprocess.Popen[str]:
    """The process that a trigger starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcpt.cluster.checkpoints"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(INCLUDE)},
    )
    request = {"remote": asdict(remote), "folder": str(training), "home": str(home), "url": url}
    assert process.stdin is not None
    process.stdin.write(json.dumps(request))
    process.stdin.close()
    process.stdin = None
    return process


def test_a_killed_transfer_goes_on_and_the_one_before_stays_meanwhile(
    remote: Remote, training: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "t1"
    bring(remote, str(training), home)
    save(training, 30, size=30_000_000)
    process = program(remote, training, home)
    partial = home / ".step_30.partial"

    def arrived() -> int:
        return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())

    until = time.monotonic() + 60
    while arrived() < 1_000_000:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    process.wait(30)
    assert newest_here(home) == home / "step_10"
    before = arrived()
    assert before
    output, errors = program(remote, training, home).communicate(timeout=300)
    assert json.loads(output)["step"] == 30, errors
    assert newest_here(home) == home / "step_30"
    assert not (home / "step_10").exists()
    assert content(home / "step_30" / "checkpoints" / "step_30") == content(
        training / "checkpoints" / "step_30"
    )


def test_at_a_url_it_outlives_this_machine_too(
    remote: Remote, training: Path, tmp_path: Path
) -> None:
    home, url = tmp_path / "home" / "t1", f"file://{tmp_path}/bucket/t1"
    assert program(remote, training, home, url).wait(120) == 0
    save(training, 15)
    assert program(remote, training, home, url).wait(120) == 0
    # the newest alone
    assert [path.name for path in (tmp_path / "bucket" / "t1").iterdir()] == ["step_15"]
    there = content(training / "checkpoints" / "step_15")
    shutil.rmtree(training)
    shutil.rmtree(home)
    assert send_back(remote, str(training), home, url) == 15
    assert content(training / "checkpoints" / "step_15") == there
    # what is damaged at the URL is not used
    shutil.rmtree(training)
    shutil.rmtree(home)
    damaged = tmp_path / "bucket" / "t1" / "step_15" / "checkpoints" / "step_15" / "rank_1.pt"
    damaged.write_bytes(b"x" * 1000)
    with pytest.raises(ClusterError, match=r"checkpoints/step_15/rank_1\.pt arrived damaged"):
        send_back(remote, str(training), home, url)
    forget(home, url)
    assert not (tmp_path / "bucket" / "t1").exists()


def test_only_one_process_brings_at_a_time(
    remote: Remote, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "t1"

    def in_between(*_: Any, **__: Any) -> dict[str, Any]:
        with pytest.raises(ClusterError, match="another process brings checkpoints to"):
            bring(remote, str(training), home)
        return {"step": 10, "path": None, "files": []}

    monkeypatch.setattr("fastcpt.cluster.checkpoints.ask_through", in_between)
    assert bring(remote, str(training), home) is None


def test_a_disk_that_is_too_small_here_is_named(
    remote: Remote, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ClusterError, match=r"0\.00 GB to bring, .* free some, or set checkpoints\.to"
    ):
        bring(remote, str(training), tmp_path / "home")


# Saves a checkpoint, goes on until it may fail, and saves another first.
TRAINER = """
import json, os, sys, time
from hashlib import sha256
folder = sys.argv[1]
def save(step):
    place = os.path.join(folder, "checkpoints", f"step_{step}")
    os.makedirs(place)
    text = f"weights of step {step}".encode()
    with open(os.path.join(place, "rank_0.pt"), "wb") as file:
        file.write(text)
    digest = {"bytes": len(text), "sha256": sha256(text).hexdigest()}
    with open(os.path.join(place, "digests.json"), "w") as file:
        json.dump({"rank_0.pt": digest}, file)
save(5)
while not os.path.exists(os.path.join(folder, "fail")):
    time.sleep(0.1)
save(10)
sys.exit(3)
"""


def test_checkpoints_are_brought_while_a_job_runs_and_the_last_of_one_that_fails(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = tmp_path / "t1", tmp_path / "home" / "t1"
    job = jobs.Job("train", [[sys.executable, "-c", TRAINER, str(folder)]])
    jobs.submit(remote, str(tmp_path), job, "one")
    bring_it = {"line": "c", "folder": str(folder), "home": str(home), "minutes": 0.05}
    watch = Watch(monkeypatch, remote, tmp_path, "train", bring_it)
    eventually((home / "step_5").exists, 60)
    (folder / "fail").touch()
    assert watch.wait(60)["status"]["state"] == "failed"
    # before the event: the host may be given back after it
    brought = home / "step_10" / "checkpoints" / "step_10" / "rank_0.pt"
    assert brought.read_text() == "weights of step 10"
    told = [line for line in watch.lines if line.startswith("checkpoint step_")]
    assert [line.split(":")[0] for line in told] == [
        f"checkpoint step_{number} is in {home}" for number in (5, 10)
    ]
    assert not watch.warnings


def test_a_training_step_puts_the_newest_checkpoint_on_a_host_without_it(
    remote: Remote, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, root = tmp_path / "home", tmp_path / "host"
    bring(remote, str(training), home / "t1")
    shutil.rmtree(training)
    content = {"name": "r", "checkpoints": {"bring_every_minutes": 30.0, "to": str(home)}}
    recipe = Recipe.model_validate(content)
    monkeypatch.setattr(step, "planned_recipe", lambda plan: recipe)
    monkeypatch.setattr(step, "result_of", lambda context, task: {"root": str(root)})
    monkeypatch.setattr(step, "remote_of", lambda connection: remote)
    monkeypatch.setattr(step, "_job_of", lambda context: "train")
    wanted = {
        "line": "gpu_cluster",
        "folder": str(training),
        "home": str(home / "t1"),
        "minutes": 30.0,
        "url": None,
    }
    # not beside a job of the training that runs
    jobs.submit(remote, str(root), jobs.Job("train", [["sleep", "60"]]))
    assert step._bring({}, str(training)) == wanted
    assert not training.exists()
    jobs.stop(remote, str(root), "train")
    assert step._bring({}, str(training)) == wanted
    assert (training / "checkpoints" / "step_10" / "state.json").read_text() == '{"step": 10}'


def test_a_url_is_reached_by_way_of_this_machine(tmp_path: Path) -> None:
    content = {"name": "r", "checkpoints": {"to": "s3://bucket/runs/"}}
    home, url = step.homes_of(Recipe.model_validate(content), "/root/models/t1")
    assert (home, url) == (HOME / "checkpoints" / "t1", "s3://bucket/runs/t1")
    content = {"name": "r", "checkpoints": {"to": str(tmp_path)}}
    assert step.homes_of(Recipe.model_validate(content), "/x/t1") == (tmp_path / "t1", None)
