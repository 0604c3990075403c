"""A login that has worked before is retried; one that never did fails at once."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import LoginRefused, Remote, ask
from fastcpt.cluster.transfer import files_of, send


@contextmanager
def refused_once(host: Remote) -> Iterator[None]:
    """The key is not taken until somebody was refused, as where a host is back before its users' homes.

    A shared connection that is open still gets through.
    """
    keys = Path(str(host.key_file)).with_name("authorized_keys")
    log = keys.with_name("sshd.log")
    keys.rename(keys.with_name("away"))
    size = log.stat().st_size

    def bring_back() -> None:
        until = time.monotonic() + 60
        while "authenticating user" not in log.read_text()[size:] and time.monotonic() < until:
            time.sleep(0.1)
        keys.with_name("away").rename(keys)

    watching = threading.Thread(target=bring_back)
    watching.start()
    yield
    watching.join()
    assert "authenticating user" in log.read_text()[size:]


def close_shared(host: Remote) -> None:
    end = [*host.ssh(), "-O", "exit", "--", host.host]
    subprocess.run(end, stdin=subprocess.DEVNULL, capture_output=True, check=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    for number in range(3):
        (folder / f"shard_{number}").write_bytes(b"x" * 1000)
    return folder


def test_a_job_is_submitted_when_the_host_takes_the_key_again(
    start: Callable[..., Remote], tmp_path: Path
) -> None:
    host = start()
    ask(host, "check", root=str(tmp_path))
    close_shared(host)
    with refused_once(host):
        assert jobs.submit(host, str(tmp_path), jobs.Job("a", [["true"]])) == "started"


def test_a_transfer_goes_on_when_the_host_takes_the_key_again(
    start: Callable[..., Remote], tmp_path: Path, corpus: Path
) -> None:
    host = start()
    ask(host, "check", root=str(tmp_path))
    # requests go through the shared connection, rsync makes its own
    with refused_once(host):
        assert send(host, corpus, str(tmp_path / "there"), files_of(corpus))["sent"] == 3


def test_a_login_that_never_worked_is_refused_at_once(
    start: Callable[..., Remote], tmp_path: Path, corpus: Path
) -> None:
    host = start()
    Path(str(host.key_file)).with_name("authorized_keys").write_text("")
    began = time.monotonic()
    with pytest.raises(LoginRefused, match="check the connection's login and key_file"):
        jobs.submit(host, str(tmp_path), jobs.Job("a", [["true"]]))
    with pytest.raises(LoginRefused, match="check the connection's login and key_file"):
        send(host, corpus, str(tmp_path / "there"), files_of(corpus))
    assert time.monotonic() - began < 20
