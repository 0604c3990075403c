"""One training over several hosts: DeepSpeed's launcher on each, started and ended together."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import local_sshd
import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import Remote, ask
from fastcpt.recipe import load_recipe
from fastcpt.training import commands
from faults.machines import RANK, REPOSITORY, Host, eventually, free_port, remote_of

pytestmark = [pytest.mark.faults, pytest.mark.linux("network namespaces, mounts, Slurm, /proc")]


@pytest.fixture
def pair(host: Host, tmp_path: Path) -> Iterator[tuple[Remote, str]]:
    """The first host, and the name that it has for the second one in its SSH configuration."""
    facts = host.facts
    config = tmp_path / "ssh_config"
    lines = {
        "HostName": facts["host"],
        "Port": facts["port"],
        "User": facts["user"],
        "IdentityFile": facts["key_file"],
        "UserKnownHostsFile": facts["known_hosts"],
    }
    config.write_text(
        "Host second\n" + "".join(f"  {key} {value}\n" for key, value in lines.items())
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    (programs / "ssh").chmod(0o755)
    first = local_sshd.start_server(
        tmp_path / "first", {"PATH": f"{programs}:{os.environ['PATH']}"}
    )
    yield remote_of(first), "second"
    os.killpg(first["pid"], 15)
    os.waitpid(first["pid"], 0)


def job_of(name: str, second: str, folder: Path, **environment: str) -> jobs.Job:
    (folder / "rank.py").write_text(RANK)
    overrides = {"cluster.gpus": 4, "cluster.hosts": [second], "cluster.cpu_only": True}
    recipe = load_recipe("sample", overrides)
    at = commands.Host(str(REPOSITORY / ".env/cluster/bin/python"), str(REPOSITORY), "recipe.yaml")
    command = [*commands.launch(recipe, at, free_port()), str(folder / "rank.py"), str(folder)]
    values = {**commands.environment(recipe, at), "NOTE": "a 'word' $HOME; exit", **environment}
    return jobs.Job(name, [command], values)


def poll(to: Remote, root: Path, name: str) -> dict[str, Any]:
    asked = [{"name": name, "seen": 0}]
    return dict(ask(to, "poll", root=str(root), jobs=asked)["jobs"][0])


def ended(to: Remote, root: Path, name: str) -> bool:
    return poll(to, root, name)["status"]["state"] not in jobs.ACTIVE


def test_ranks_of_two_hosts_meet(pair: tuple[Remote, str], tmp_path: Path) -> None:
    first, second = pair
    jobs.submit(first, str(tmp_path), job_of("a", second, tmp_path, BEATS="1"))
    eventually(lambda: ended(first, tmp_path, "a"), 400)
    answer = poll(first, tmp_path, "a")
    log = base64.b64decode(answer["log"]).decode()
    assert answer["status"]["state"] == "succeeded", log
    told = sorted(line for line in log.splitlines() if line.startswith("rank "))
    assert [line.split()[:4] for line in told] == [["rank", str(r), "of", "4"] for r in range(4)]
    # a value with quotes in it arrives on both hosts as it is
    assert all(line.endswith("a 'word' $HOME; exit") for line in told)


def test_stopping_ends_the_ranks_of_both_hosts(pair: tuple[Remote, str], tmp_path: Path) -> None:
    first, second = pair
    jobs.submit(first, str(tmp_path), job_of("b", second, tmp_path, BEATS="10000"))
    beats = [tmp_path / f"beat-{rank}" for rank in range(4)]
    eventually(lambda: all(beat.exists() for beat in beats), 400)
    jobs.stop(first, str(tmp_path), "b")
    eventually(lambda: still(beats), 30)


def still(beats: list[Path]) -> bool:
    def sizes() -> list[int]:
        return [beat.stat().st_size if beat.exists() else 0 for beat in beats]

    before = sizes()
    time.sleep(3)
    return before == sizes()


def test_a_rank_that_fails_ends_the_others(pair: tuple[Remote, str], tmp_path: Path) -> None:
    first, second = pair
    jobs.submit(first, str(tmp_path), job_of("c", second, tmp_path, BEATS="10000", FAILS="yes"))
    eventually(lambda: ended(first, tmp_path, "c"), 400)
    status = poll(first, tmp_path, "c")["status"]
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert still([tmp_path / f"beat-{rank}" for rank in range(4)])


def test_a_second_host_that_loses_the_first_ends_its_part(
    pair: tuple[Remote, str], host: Host, tmp_path: Path
) -> None:
    first, second = pair
    jobs.submit(first, str(tmp_path), job_of("d", second, tmp_path, BEATS="10000"))
    beats = [tmp_path / f"beat-{rank}" for rank in range(4)]
    eventually(lambda: all(beat.exists() for beat in beats), 400)
    host.cut()
    # nobody else ends them: they see for themselves that they are alone
    eventually(lambda: still(beats), 240, 5)
    eventually(lambda: ended(first, tmp_path, "d"), 120)


def test_a_second_host_with_another_key_is_not_trained_on(
    pair: tuple[Remote, str], host: Host, tmp_path: Path
) -> None:
    first, second = pair
    known_hosts = Path(host.facts["known_hosts"])
    address, kind, _ = known_hosts.read_text().split()
    other = (tmp_path / "first" / "host_key.pub").read_text().split()[1]
    known_hosts.write_text(f"{address} {kind} {other}\n")
    jobs.submit(first, str(tmp_path), job_of("e", second, tmp_path, BEATS="10000"))
    eventually(lambda: ended(first, tmp_path, "e"), 180)
    answer = poll(first, tmp_path, "e")
    assert answer["status"]["state"] == "failed"
    assert "Host key verification failed" in base64.b64decode(answer["log"]).decode()
