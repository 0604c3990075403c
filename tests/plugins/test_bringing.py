"""When a trigger copies checkpoints from the host: the copy here is never older than the interval."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from bringing import Bring, Bringing
from fastcpt.cluster.remote import Remote


class Rounds(Bringing):
    """Rounds on a clock of the test's; each takes as long, and finds what, the test says."""

    def __init__(self) -> None:
        self.now, self.began, self.found = 100.0, list[float](), list[Any]()
        wanted = Bring("line", "/host/t1", "/home/t1", minutes=1.0)
        super().__init__(wanted, logging.getLogger("rounds"), lambda: self.now)

    async def _ask(self, remote: Remote) -> dict[str, Any] | None:
        self.began.append(self.now - 100.0)
        takes, age = self.found.pop(0)
        self.now += takes
        if age == "fails":
            raise OSError("the host does not answer")
        if age is None:
            return None
        return {"step": 1, "bytes": 1, "seconds": takes, "age_s": age, "from_its_beginning": False}

    def until(self, second: int) -> list[float]:
        """When rounds began, in seconds, while the trigger looks every second until this one."""

        async def look() -> None:
            while self.now < 100.0 + second:
                self.look(Remote("host", "user"))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                self.now += 1.0

        asyncio.run(look())
        return self.began


def test_a_round_begins_at_once_and_again_soon_while_nothing_is_new() -> None:
    rounds = Rounds()
    rounds.found = [(0.0, None)] * 3
    # a quarter of the minute: what is saved meanwhile waits no longer
    assert rounds.until(40) == [0.0, 15.0, 30.0]


@pytest.mark.parametrize(
    ("takes", "age", "second"),
    [
        # saved at -8, so at 52 it is too old; the round may take twice the 4 s of this one
        (4.0, 8.0, 44.0),
        (0.0, 0.0, 60.0),
        # longer than half of the interval: the next begins when it ends
        (40.0, 8.0, 40.0),
    ],
)
def test_the_next_round_ends_before_the_copy_is_too_old(
    takes: float, age: float, second: float
) -> None:
    rounds = Rounds()
    rounds.found = [(takes, age), (100.0, None)]
    began = rounds.until(90)
    assert began[0] == 0.0
    assert began[1] == pytest.approx(second, abs=1.0)


def test_a_round_that_fails_is_told_and_repeated(caplog: pytest.LogCaptureFixture) -> None:
    rounds = Rounds()
    rounds.found = [(2.0, "fails"), (100.0, None)]
    assert rounds.until(40)[1] == 15.0
    assert "the checkpoint was not brought: the host does not answer" in caplog.text
