"""A job runs once, is found again, reports its result, and ends when it is stopped."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import Remote, ask
from fastcpt.cluster.transfer import files_of, send


def poll(remote: Remote, root: Path, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = ask(remote, "poll", root=str(root), jobs=[{"name": name, "seen": 0}])[
        "jobs"
    ][0]
    return answer


def wait(remote: Remote, root: Path, name: str, state: str, seconds: float = 30) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answer = poll(remote, root, name)
        if answer["status"]["state"] == state:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"still {answer['status']}, wanted {state}")


def log_of(answer: dict[str, Any]) -> str:
    return base64.b64decode(answer["log"]).decode()


def processes(pattern: str) -> set[int]:
    """The processes with ``pattern`` on their command line, shells of the job included."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if pattern.encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
    return found


def test_a_job_runs_to_its_end_and_its_log_is_there(remote: Remote, tmp_path: Path) -> None:
    job = jobs.Job("a", [["echo", "one 'quoted' $HOME `id`"], ["echo", "two"]])
    assert jobs.submit(remote, str(tmp_path), job) == "started"
    answer = wait(remote, tmp_path, "a", "succeeded")
    assert log_of(answer) == "one 'quoted' $HOME `id`\ntwo\n"
    assert answer["status"]["exit_code"] == 0


def test_the_first_command_that_fails_ends_the_job(remote: Remote, tmp_path: Path) -> None:
    job = jobs.Job("b", [["bash", "-c", "exit 7"], ["echo", "never"]])
    jobs.submit(remote, str(tmp_path), job)
    answer = wait(remote, tmp_path, "b", "failed")
    assert answer["status"]["exit_code"] == 7
    assert "never" not in log_of(answer)
    with pytest.raises(jobs.JobFailed, match="ended with 7"):
        jobs.outcome(remote, "b", answer["status"], [])


def test_exit_code_78_is_not_to_be_tried_again(remote: Remote, tmp_path: Path) -> None:
    program = "print('ValueError: shard 3 is damaged'); raise SystemExit(78)"
    jobs.submit(remote, str(tmp_path), jobs.Job("c", [["python3", "-c", program]]))
    answer = wait(remote, tmp_path, "c", "failed")
    lines = log_of(answer).splitlines()
    with pytest.raises(jobs.JobRefused, match=r"^shard 3 is damaged$"):
        jobs.outcome(remote, "c", answer["status"], lines)


def test_a_running_job_is_found_and_not_started_again(remote: Remote, tmp_path: Path) -> None:
    count = tmp_path / "count"
    job = jobs.Job("d", [["bash", "-c", f"echo run >> {count}; sleep 6"]])
    assert jobs.submit(remote, str(tmp_path), job) == "started"
    wait(remote, tmp_path, "d", "running")
    assert jobs.submit(remote, str(tmp_path), job) == "running"
    wait(remote, tmp_path, "d", "succeeded")
    assert count.read_text() == "run\n"


def test_a_job_whose_result_is_there_is_complete(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    job = jobs.Job("e", [["false"]], result=str(tmp_path / "result.json"))
    assert jobs.submit(remote, str(tmp_path), job) == "complete"


@pytest.mark.slow
@pytest.mark.linux("a host's processes are found in /proc")
def test_stopping_ends_every_process_of_the_job(remote: Remote, tmp_path: Path) -> None:
    # one that ignores SIGTERM and one that left the process group
    program = "trap '' TERM; setsid sleep 98765 & sleep 98764"
    jobs.submit(remote, str(tmp_path), jobs.Job("f", [["bash", "-c", program]]))
    wait(remote, tmp_path, "f", "running")
    began = time.monotonic()
    jobs.stop(remote, str(tmp_path), "f")
    assert time.monotonic() - began < 30
    assert not processes("98765")
    assert not processes("98764")
    assert poll(remote, tmp_path, "f")["status"]["state"] == "cancelled"


@pytest.mark.linux("a host's processes are found in /proc")
def test_a_killed_supervisor_is_seen_and_its_job_ended_before_the_next(
    remote: Remote, tmp_path: Path
) -> None:
    job = jobs.Job("g", [["sleep", "87654"]])
    jobs.submit(remote, str(tmp_path), job)
    running = wait(remote, tmp_path, "g", "running")
    os.kill(running["status"]["supervisor"], signal.SIGKILL)
    lost = wait(remote, tmp_path, "g", "lost")
    with pytest.raises(jobs.JobLost, match="its supervisor is gone"):
        jobs.outcome(remote, "g", lost["status"], [])
    before = processes("87654")
    assert jobs.submit(remote, str(tmp_path), job) == "started"
    wait(remote, tmp_path, "g", "running")
    assert not before & processes("87654")
    jobs.stop(remote, str(tmp_path), "g")
    assert not processes("87654")


def test_two_jobs_on_the_same_gpus_run_one_after_the_other(remote: Remote, tmp_path: Path) -> None:
    order = tmp_path / "order"
    for name in ("h1", "h2"):
        script = f"echo {name} begins >> {order}; sleep 1; echo {name} ends >> {order}"
        jobs.submit(remote, str(tmp_path), jobs.Job(name, [["bash", "-c", script]]))
    for name in ("h1", "h2"):
        wait(remote, tmp_path, name, "succeeded")
    first, second = order.read_text().split()[0], order.read_text().split()[4]
    assert order.read_text().splitlines() == [
        f"{first} begins",
        f"{first} ends",
        f"{second} begins",
        f"{second} ends",
    ]


def test_a_secret_reaches_the_job_and_no_file_that_stays(remote: Remote, tmp_path: Path) -> None:
    program = 'test "${#HF_TOKEN}" = 12 && echo right'
    job = jobs.Job("i", [["bash", "-c", program]], secrets={"HF_TOKEN": "s3cr3t-value"})
    jobs.submit(remote, str(tmp_path), job)
    answer = wait(remote, tmp_path, "i", "succeeded")
    assert log_of(answer) == "right\n"
    assert "s3cr3t" not in repr(job)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if "s3cr3t" in path.read_text()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)


@pytest.mark.linux("a host's processes are found in /proc")
def test_stopping_a_job_leaves_one_of_the_same_name_under_another_root(
    remote: Remote, tmp_path: Path
) -> None:
    for root in ("one", "other"):
        jobs.submit(remote, str(tmp_path / root), jobs.Job("k", [["sleep", "76543"]]))
        wait(remote, tmp_path / root, "k", "running")
    jobs.stop(remote, str(tmp_path / "one"), "k")
    assert poll(remote, tmp_path / "one", "k")["status"]["state"] == "cancelled"
    assert poll(remote, tmp_path / "other", "k")["status"]["state"] == "running"
    jobs.stop(remote, str(tmp_path / "other"), "k")
    assert not processes("76543")


def test_what_is_made_there_is_its_owners_alone(remote: Remote, tmp_path: Path) -> None:
    here, root = tmp_path / "here", tmp_path / "root"
    (here / "validation").mkdir(parents=True)
    (here / "validation" / "shard").write_text("content")
    for path in (here, *here.rglob("*")):
        path.chmod(0o777)
    send(remote, here, f"{root}/corpora/abc", files_of(here))
    result = root / "models" / "abc" / "final" / "done"
    commands = [["mkdir", "-p", str(result.parent)], ["touch", str(result)]]
    jobs.submit(remote, str(root), jobs.Job("j", commands, result=str(result)))
    wait(remote, root, "j", "succeeded")
    made = [root, *root.rglob("*")]
    assert result in made
    assert root / "corpora" / "abc" / "validation" / "shard" in made
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o700}
    assert not [path for path in made if path.stat().st_mode & 0o077]


def test_names_of_jobs_tell_what_they_are_and_never_collide() -> None:
    one = jobs.job_name("fast_cpt", "manual__2026-11-23T00:00:00+00:00", "train_cpt", -1)
    other = jobs.job_name("fast_cpt", "manual__2026-11-23T00:00:00-00:00", "train_cpt", -1)
    assert one.startswith("fast_cpt-manual__2026-11-23T00-00-00-00-00-train_cpt")
    assert one != other
