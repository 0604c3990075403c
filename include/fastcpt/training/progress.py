"""Progress lines, printed by rank 0 at regular intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastcpt.training.ranks import rank

SILENCE = 20.0  # seconds without a line


class ProgressLines:
    """Prints a line if ``SILENCE`` seconds have passed since the last one, on rank 0 only."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    @property
    def due(self) -> bool:
        return rank() == 0 and time.monotonic() - self.said > SILENCE

    def say(self, line: str, now: bool = False) -> None:
        """Print ``line`` if one is due, or ``now``."""
        if rank() == 0 and (now or self.due):
            print(line, flush=True)
            self.said = time.monotonic()


@contextmanager
def signs_of_life(what: str) -> Iterator[None]:
    """Print ``what`` at the start of a long call, and again with the time every ``SILENCE`` seconds."""
    ended, begin = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(SILENCE):
            print(f"{what}, {time.monotonic() - begin:.0f} s so far", flush=True)

    print(what, flush=True)
    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()
