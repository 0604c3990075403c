"""The GPU host, its SSH server or the network between die while a job runs: what the watcher sees."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import local_sshd
import pytest

import job_log
import remote_job
from fastcpt.cluster import jobs, remote
from faults.machines import Host, Training, Watch, eventually, remote_of, sshd_sessions

pytestmark = pytest.mark.linux("network namespaces, mounts, Slurm, /proc")


def job_of(training: Training, steps: int, pace: float = 0.5) -> jobs.Job:
    return jobs.Job("train", [training.command(steps, pace)], result=training.result)


@pytest.mark.faults
def test_a_rebooted_host_costs_less_than_one_checkpoint_interval(
    host: Host, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(training, 40)
    jobs.submit(host.remote, str(tmp_path), job, "one")
    watch = Watch(monkeypatch, host.remote, tmp_path, "train")
    training.wait_for_step(13)
    host.power_off()
    saved = training.checkpoint
    assert max(training.numbers("steps")) - saved <= 5
    time.sleep(3)
    host.boot()
    event = watch.wait(180)
    assert event["status"]["state"] == "lost"
    with pytest.raises(jobs.JobLost, match="the host was rebooted"):
        jobs.outcome(host.remote, "train", event["status"], event["last_lines"])
    # what Airflow's retry does
    assert jobs.submit(host.remote, str(tmp_path), job, "two") == "started"
    again = Watch(monkeypatch, host.remote, tmp_path, "train")
    assert again.wait(180)["status"]["state"] == "succeeded"
    assert training.numbers("starts") == [0, saved]
    assert again.steps == list(range(saved + 1, 41))
    assert training.never_twice


@pytest.mark.faults
def test_sshd_killed_and_back_after_a_minute(
    server: dict[str, Any], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    jobs.submit(to, str(tmp_path), job_of(training, 180), "one")
    watch = Watch(monkeypatch, to, tmp_path, "train")
    training.wait_for_step(10)
    # the listener and every connection it has accepted
    os.killpg(server["pid"], signal.SIGKILL)
    for pid in sshd_sessions(server["port"]):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(server["pid"], 0)
    time.sleep(60)
    server.update(local_sshd.start_server(Path(server["key_file"]).parent, port=server["port"]))
    assert watch.wait(300)["status"]["state"] == "succeeded"
    assert watch.steps == list(range(1, 181))
    assert training.numbers("starts") == [0]


@pytest.mark.faults
def test_a_network_cut_of_three_minutes(
    host: Host, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.submit(host.remote, str(tmp_path), job_of(training, 500), "one")
    watch = Watch(monkeypatch, host.remote, tmp_path, "train")
    eventually(lambda: len(watch.steps) > 5, 90)
    host.cut()
    time.sleep(180)
    before, went_on = len(watch.steps), max(training.numbers("steps"))
    assert went_on > before + 100
    host.join()
    # the job went on all the while, and what it wrote arrives
    eventually(lambda: len(watch.steps) >= went_on, 180)
    assert watch.wait(400)["status"]["state"] == "succeeded"
    assert watch.steps == list(range(1, 501))
    assert training.numbers("starts") == [0]


@pytest.mark.faults
def test_a_connection_that_hangs_without_closing(
    server: dict[str, Any], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    jobs.submit(to, str(tmp_path), job_of(training, 240), "one")
    watch = Watch(monkeypatch, to, tmp_path, "train")
    eventually(lambda: len(watch.steps) > 5, 90)
    # the sessions stand still and answer nothing; the listener takes new connections
    hanging = [pid for pid in sshd_sessions(server["port"]) if "sshd" in name_of(pid)]
    hanging.remove(server["pid"])
    assert hanging
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert watch.wait(480)["status"]["state"] == "succeeded"
    finally:
        for pid in hanging:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert watch.steps == list(range(1, 241))
    assert training.numbers("starts") == [0]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


@pytest.mark.faults
def test_a_host_that_stays_away_fails_the_try_and_not_the_job(
    host: Host, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(training, 10)
    training.hold(6)
    jobs.submit(host.remote, str(tmp_path), job, "one")
    with monkeypatch.context() as patch:
        patch.setattr(remote_job, "UNREACHABLE_S", 5.0)
        patch.setattr(remote, "CONNECT_TIMEOUT_S", 3)
        patch.setitem(remote.ASK_TIMEOUT_S, "poll", 5)
        watch = Watch(patch, host.remote, tmp_path, "train")
        training.wait_for_step(3)
        host.cut()
        assert "unreachable" in watch.wait(180)
    host.join()
    # the next try finds the job of the first
    assert jobs.submit(host.remote, str(tmp_path), job, "two") == "running"
    training.release()
    again = Watch(monkeypatch, host.remote, tmp_path, "train")
    assert again.wait(180)["status"]["state"] == "succeeded"
    assert training.numbers("starts") == [0]


@pytest.mark.slow
def test_a_login_that_is_refused_for_a_while_delays_the_watcher_alone(
    server: dict[str, Any], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    training.hold(30)
    jobs.submit(to, str(tmp_path), job_of(training, 40), "one")
    watch = Watch(monkeypatch, to, tmp_path, "train")
    eventually(lambda: watch.steps, 60)
    # sshd is back before the home is: no key is known, and no connection is left
    keys = Path(server["key_file"]).parent / "authorized_keys"
    keys.rename(keys.with_name("away"))
    for pid in sshd_sessions(server["port"]):
        if pid != server["pid"]:
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: any("refused the login" in line for line in watch.warnings), 60)
    keys.with_name("away").rename(keys)
    training.release()
    assert watch.wait(120)["status"]["state"] == "succeeded"
    assert watch.steps == list(range(1, 41))
    assert training.numbers("starts") == [0]


@pytest.mark.slow
def test_a_log_that_is_cut_is_said_and_goes_on(
    server: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    cut = tmp_path / "cut"
    script = f"echo one; echo two; until test -e {cut}; do sleep 0.1; done; echo three; sleep 3"
    jobs.submit(to, str(tmp_path), jobs.Job("cut", [["bash", "-c", script]]), "one")
    watch = Watch(monkeypatch, to, tmp_path, "cut")
    eventually(lambda: "two" in watch.lines, 30)
    os.truncate(tmp_path / "jobs" / "cut" / "job.log", 0)
    cut.touch()
    assert watch.wait(60)["status"]["state"] == "succeeded"
    assert watch.lines == ["one", "two", "three"]
    assert [line for line in watch.warnings if "job.log was cut there: " in line]


@pytest.mark.slow
def test_a_supervisor_that_stands_still_is_said_in_the_log(
    server: dict[str, Any], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    training.hold(6)
    jobs.submit(to, str(tmp_path), job_of(training, 10), "one")
    watch = Watch(monkeypatch, to, tmp_path, "train")
    eventually(lambda: watch.steps, 60)
    (status,) = remote.ask(to, "poll", root=str(tmp_path), jobs=[{"name": "train", "seen": 0}])[
        "jobs"
    ]
    supervisor = status["status"]["supervisor"]
    os.kill(supervisor, signal.SIGSTOP)
    said = "running: its supervisor is stopped and sees nothing; go on with: kill -CONT"
    eventually(lambda: f"{said} {supervisor}" in watch.lines, 60)
    os.kill(supervisor, signal.SIGCONT)
    training.release()
    assert watch.wait(60)["status"]["state"] == "succeeded"


@pytest.mark.slow
def test_two_orchestrators_share_one_cluster(
    server: dict[str, Any], training: Training, tmp_path: Path
) -> None:
    to = remote_of(server)
    # the same run of two orchestrators at the same instant: one job
    answers: list[str] = []
    job = job_of(training, 10, 0.2)

    def submit(owner: str) -> None:
        answers.append(jobs.submit(to, str(tmp_path), job, owner))

    threads = [threading.Thread(target=submit, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    # and another run of theirs: it waits for the GPUs
    other = Training(tmp_path / "other")
    (other.folder / "gpu").symlink_to(training.folder / "gpu")
    second = jobs.Job("other", [other.command(10, 0.2)], result=other.result)
    assert jobs.submit(to, str(tmp_path), second, "four") == "started"
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["running", "running", "started"]
    eventually(lambda: Path(training.result).exists() and Path(other.result).exists(), 180)
    assert training.numbers("starts") == [0]
    assert training.never_twice
    assert other.never_twice


@pytest.mark.slow
def test_orchestrators_with_roots_of_their_own_share_the_gpus_of_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a login whose home is the test's
    facts = local_sshd.start_server(tmp_path / "sshd", {"HOME": str(tmp_path)})
    to = remote_of(facts)
    try:
        one, other = Training(tmp_path / "one"), Training(tmp_path / "other")
        (other.folder / "gpu").symlink_to(one.folder / "gpu")
        one.hold(20)
        for name, training in (("first", one), ("second", other)):
            command = training.command(20, 0.2)
            job = jobs.Job(name, [command], result=training.result, alone="host")
            assert jobs.submit(to, str(tmp_path / f"root of {name}"), job, "one") == "started"
            if training is one:
                training.wait_for_step(1)
        watch = Watch(monkeypatch, to, tmp_path / "root of second", "second")
        # the log says what it waits for
        eventually(lambda: watch.lines, 60)
        assert watch.lines[0].startswith("waiting: job first has the GPUs (")
        one.release()
        assert watch.wait(120)["status"]["state"] == "succeeded"
        assert watch.steps == list(range(1, 21))
        assert other.never_twice
        assert one.never_twice
        assert one.numbers("steps") == list(range(1, 21))
    finally:
        os.killpg(facts["pid"], signal.SIGTERM)
        os.waitpid(facts["pid"], 0)


@pytest.mark.slow
def test_a_job_that_writes_nothing_is_seen_to_run(
    server: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "QUIET_S", 2.0)
    goes_on = tmp_path / "goes on"
    until = f"until test -e '{goes_on}'; do sleep 0.1; done"
    job = jobs.Job("quiet", [["echo", "step 7/9 loss 2.5"], ["bash", "-c", until]])
    jobs.submit(remote_of(server), str(tmp_path), job, "one")
    watch = Watch(monkeypatch, remote_of(server), tmp_path, "quiet")
    said = re.compile(r"running, silent for (\d+) s after: step 7/9 loss 2\.5")

    def silences() -> list[int]:
        return [int(found[1]) for line in watch.lines if (found := said.fullmatch(line))]

    # each time it is due, and each step once
    eventually(lambda: len(silences()) >= 2, 60)
    goes_on.touch()
    assert watch.wait(60)["status"]["state"] == "succeeded"
    assert silences()[1] >= silences()[0] + 2
    assert watch.lines[0] == "step 7/9 loss 2.5"
    assert watch.lines.count("step 7/9 loss 2.5") == 1


@pytest.mark.faults
def test_a_log_of_100_mb_without_ends_of_lines_and_in_no_encoding(
    server: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = remote_of(server)
    program = """if True:
        import os
        line = b'x' * 99 + bytes([10])
        for number in range(500_000):
            os.write(1, line)
        os.write(1, b'y' * 50_000_000)
        os.write(1, bytes([10, 255, 254, 195, 10]) + b'the end')
    """
    jobs.submit(to, str(tmp_path), jobs.Job("noisy", [["python3", "-c", program]]), "one")
    watch = Watch(monkeypatch, to, tmp_path, "noisy")
    event = watch.wait(900)
    assert event["status"]["state"] == "succeeded"
    assert watch.lines.count("x" * 99) == 500_000
    assert sum(len(line) for line in watch.lines if line.startswith("y")) == 50_000_000
    assert max(map(len, watch.lines)) <= job_log.LONGEST_LINE
    assert watch.lines[-2:] == ["\ufffd\ufffd\ufffd", "the end"]
