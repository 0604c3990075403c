"""Work distributed over processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcpt.corpus import processes
from fastcpt.corpus.documents import DocumentsError, list_parts
from fastcpt.corpus.processes import WorkerDiedError, in_order, in_processes, over_parts
from fastcpt.recipe_sections import Documents


def test_results_come_with_their_calls() -> None:
    found = dict(in_processes(os.path.join, [("a", str(n)) for n in range(20)], processes=3))
    assert found == {n: f"a/{n}" for n in range(20)}


def test_results_in_order_of_calls_that_are_made_as_workers_are_free() -> None:
    made = []

    def calls() -> Iterator[tuple[float]]:
        for n in range(60):
            made.append(n)
            yield (0.02 if n % 2 else 0.0,)

    results = in_order(time.sleep, calls(), processes=2)
    next(results)
    assert len(made) < 30
    assert len(list(results)) == 59


def test_the_order_is_the_calls() -> None:
    calls = ((str(n), "x" * (n % 7)) for n in range(50))
    assert list(in_order(os.path.join, calls, processes=3)) == [
        f"{n}/{'x' * (n % 7)}" for n in range(50)
    ]


def test_an_error_of_what_makes_the_calls_comes_through() -> None:
    def calls() -> Iterator[tuple[str, str]]:
        yield ("a", "b")
        raise DocumentsError("cut short")

    with pytest.raises(DocumentsError, match="cut short"):
        list(in_order(os.path.join, calls(), processes=2))


def test_a_large_file_gets_all_processes_and_small_ones_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "LARGE", 5)
    found = dict(over_parts(max, [(0,)] * 4, [100, 6, 1, 1], processes=3))
    assert found == {0: 3, 1: 1, 2: 1, 3: 1}
    # little altogether: no process is started
    monkeypatch.setattr(processes, "_start", None)
    assert dict(over_parts(max, [(0,)] * 2, [2, 2], processes=3)) == {0: 1, 1: 1}


def test_an_error_comes_through_as_itself() -> None:
    calls = [(Documents(path="/no/such/folder"),)] * 3
    with pytest.raises(DocumentsError, match="/no/such/folder"):
        list(in_processes(list_parts, calls, processes=2))


def test_a_killed_worker_is_an_error_that_a_retry_may_heal() -> None:
    assert issubclass(WorkerDiedError, OSError)
    with pytest.raises(WorkerDiedError, match="ended during raise_signal"):
        list(in_processes(signal.raise_signal, [(signal.SIGKILL,)] * 2, processes=2))


@pytest.mark.linux("/proc")
def test_no_worker_stays_behind(tmp_path: Path) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    for _ in in_processes(os.path.join, [("a", "b")] * 10, processes=2):
        break
    assert children() == before
