"""Work spread over processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fastcpt.corpus.documents import DocumentsError, list_parts
from fastcpt.corpus.processes import WorkerDiedError, in_processes
from fastcpt.recipe import Documents


def test_results_come_with_their_calls() -> None:
    found = dict(in_processes(os.path.join, [("a", str(n)) for n in range(20)], processes=3))
    assert found == {n: f"a/{n}" for n in range(20)}


def test_an_error_comes_through_as_itself() -> None:
    calls = [(Documents(path="/no/such/folder"),)] * 3
    with pytest.raises(DocumentsError, match="/no/such/folder"):
        list(in_processes(list_parts, calls, processes=2))


def test_a_killed_worker_is_an_error_that_a_retry_may_heal() -> None:
    assert issubclass(WorkerDiedError, OSError)
    with pytest.raises(WorkerDiedError, match="ended during raise_signal"):
        list(in_processes(signal.raise_signal, [(signal.SIGKILL,)] * 2, processes=2))


def test_no_worker_stays_behind(tmp_path: Path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    for _ in in_processes(os.path.join, [("a", "b")] * 10, processes=2):
        break
    assert children() == before
