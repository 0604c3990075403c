"""Maps a function over many items, in one process per core.

Workers are separate commands, not forks: Airflow's tasks are daemons and may not use multiprocessing,
and forking a process with threads may hang. Calls and results go through pipes. When the parent is gone,
a worker reads the end of its input and exits.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

LARGE = 8 << 20  # bytes or characters: less than this is not worth several processes


class WorkerDiedError(OSError):
    """A worker process ended in the middle of a call (killed, or out of memory)."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    processes: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """``(index of the call, result)`` as calls end; the first error of a call is raised here.

    ``function`` is defined at module level; arguments and results can be pickled. Calls are taken from
    the iterable as workers become free. A single call, or ``processes`` of 1, runs in this process.
    """
    processes = processes or cores()
    if isinstance(calls, Sequence):
        processes = min(processes, len(calls))
    if processes <= 1:
        for index, arguments in enumerate(calls):
            yield index, function(*arguments)
        return
    waiting = _Waiting(calls)
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    workers = [_start() for _ in range(processes)]
    threads = [
        threading.Thread(target=_feed, args=(worker, function, waiting, done), daemon=True)
        for worker in workers
    ]
    try:
        for thread in threads:
            thread.start()
        busy = len(threads)
        while busy:
            index, result, error = done.get()
            if error is not None:
                raise error
            if index == _NO_MORE:
                busy -= 1
            else:
                yield index, result
    finally:
        waiting.ended = True
        for worker in workers:
            # all results are here, or the caller wants no more
            worker.kill()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.wait()


def in_order(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    processes: int | None = None,
) -> Iterator[Any]:
    """Results of ``in_processes`` in the calls' order."""
    early: dict[int, Any] = {}
    following = 0
    for index, result in in_processes(function, calls, processes):
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1


def over_parts(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    sizes: Sequence[float],
    processes: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """``in_processes`` over files of very different sizes; ``function``'s last argument is processes.

    A file larger than one process's share gets all processes, the others get one each. If all files
    together are small, they stay in this process.
    """
    processes = 1 if sum(sizes) < LARGE else processes or cores()
    share = max(LARGE, sum(sizes) / processes)
    large = [n for n, size in enumerate(sizes) if size > share and processes > 1]
    for n in large:
        yield n, function(*calls[n], processes)
    others = [n for n in range(len(calls)) if n not in set(large)]
    for place, result in in_processes(function, [(*calls[n], 1) for n in others], processes):
        yield others[place], result


_NO_MORE = -1


class _Waiting:
    """A thread-safe queue of calls that no worker has taken yet."""

    def __init__(self, calls: Iterable[tuple[Any, ...]]):
        self.calls = enumerate(calls)
        self.lock = threading.Lock()
        self.ended = False

    def take(self) -> tuple[int, tuple[Any, ...]]:
        with self.lock:
            if self.ended:
                return _NO_MORE, ()
            return next(self.calls, (_NO_MORE, ()))


def _start() -> subprocess.Popen[bytes]:
    library = str(Path(__file__).resolve().parents[2])
    paths = [library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # one process per core: more threads would only compete
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "fastcpt.corpus.processes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _feed(
    worker: subprocess.Popen[bytes],
    function: Callable[..., Any],
    waiting: _Waiting,
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]],
) -> None:
    """Give one worker calls until there are no more."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    index, result, error = 0, None, None
    while index != _NO_MORE and error is None:
        try:
            index, arguments = waiting.take()
            if index != _NO_MORE:
                pickle.dump((function.__module__, function.__name__, arguments), worker.stdin)
                worker.stdin.flush()
                result, error = pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            error = WorkerDiedError(
                f"a worker process ended during {function.__name__}; out of memory?"
            )
        except Exception as failure:  # raised by the iterable of calls
            error = failure
        done.put((index, result, error))


def _serve() -> None:
    """The worker's loop."""
    calls, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's prints must not mix with the results
    while True:
        try:
            module, name, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            result, failure = getattr(importlib.import_module(module), name)(*arguments), None
        except Exception as error:
            result, failure = None, error
        pickle.dump((result, failure), results)
        results.flush()


if __name__ == "__main__":
    _serve()
