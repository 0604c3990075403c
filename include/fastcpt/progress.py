"""Lines that say how far a long step is, from time to time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

EVERY_S = 10.0  # between two lines


class Progress:
    """``what`` is done in ``total`` times ``unit``; threads may share one.

    ``say`` takes the lines; by default they are logged.
    """

    def __init__(
        self, what: str, unit: str, total: float, say: Callable[[str], None] = log.info
    ) -> None:
        self.what, self.unit, self.total, self._say = what, unit, total, say
        self.done = 0.0
        self.started = self.said = time.monotonic()
        self._lock = threading.Lock()

    def add(self, amount: float) -> None:
        """Count what was done, and say rate and time left if ``EVERY_S`` seconds passed without a line."""
        with self._lock:
            self.done += amount
            now = time.monotonic()
            if now - self.said < EVERY_S:
                return
            self.said = now
        self._say(self.line(now - self.started))

    @property
    def due(self) -> bool:
        return time.monotonic() - self.said >= EVERY_S

    def tell(self, line: str) -> None:
        """Say a line of the step's own instead."""
        self._say(line)
        self.said = time.monotonic()

    def line(self, seconds: float) -> str:
        rate = self.done / max(seconds, 1e-9)
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate else "time left unknown"
        return (
            f"{self.what}: {_number(self.done)} of {_number(self.total)} {self.unit}, "
            f"{_number(rate)} {self.unit}/s, {left}"
        )


@contextmanager
def signs_of_life(what: str) -> Iterator[None]:
    """Print ``what`` at the start of a call that counts nothing, and again every ``EVERY_S`` seconds."""
    ended, begin = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(EVERY_S):
            print(f"{what}, {time.monotonic() - begin:.0f} s so far", flush=True)

    print(what, flush=True)
    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
