"""Shows a remote job's log in the task's log: whole lines, once each, and a note if the job is silent."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping
from typing import Any

from fastcpt.cluster import jobs

# After this long without output from a running job, a line says so: with the poll interval, 30 s.
QUIET_S = 24.0
# A line without an end is shown in pieces of this many bytes.
LONGEST_LINE = 64 * 1024
LAST_LINES = 30


class Shown:
    """What the task's log has shown of a job: its log up to byte ``seen``, and why it is not running."""

    def __init__(self, log: Any, clock: Callable[[], float]) -> None:
        self.log, self.clock = log, clock
        self.seen: int | None = None
        self.last_lines = [""]
        self.why = ""
        self.wrote = self.told = clock()

    async def show(self, answer: Mapping[str, Any]) -> tuple[int, bool]:
        """Log the answer of a poll; the bytes of log shown, and whether the job has ended and is read."""
        status, piece = answer["status"], base64.b64decode(answer["log"])
        if "cut" in answer:
            self.log.warning(
                "job.log was cut there: %d bytes, %d were shown before. It is shown from its beginning",
                answer["size"],
                answer["cut"],
            )
        all_read = answer["seen"] + len(piece) >= answer["size"]
        over = status["state"] not in jobs.ACTIVE and all_read
        lines, taken = lines_of(piece, whole=over)
        self.seen = answer["seen"] + taken
        for number, line in enumerate(lines):
            self.log.info("%s", line)
            if number % 500 == 499:
                await asyncio.sleep(0)  # let the triggerer watch other jobs
        self.last_lines = [*self.last_lines, *lines][-LAST_LINES:]
        now = self.clock()
        if lines:
            self.wrote = self.told = now
        elif status["state"] == "running" and now - self.told > QUIET_S:
            self.told = now
            self.log.info(
                "running, silent for %.0f s after: %s", now - self.wrote, self.last_lines[-1]
            )
        why = status.get("why", "")
        if why and why != self.why and not over:
            self.log.info("%s: %s", status["state"], why)
        self.why = why
        return taken, over


def lines_of(piece: bytes, whole: bool) -> tuple[list[str], int]:
    """The complete lines of a piece of log and their bytes; with ``whole`` also the last, incomplete one.

    The rest is read again next time. A line longer than ``LONGEST_LINE`` is cut.
    """
    taken = len(piece) if whole else piece.rfind(b"\n") + 1
    if not taken and len(piece) >= LONGEST_LINE:
        taken = len(piece)
        # not inside a character
        while taken > len(piece) - 4 and piece[taken - 1] & 0xC0 == 0x80:
            taken -= 1
        taken -= piece[taken - 1] >= 0xC0
    if not taken:
        return [], 0
    shown = []
    for line in piece[:taken].removesuffix(b"\n").split(b"\n"):
        # a progress bar rewrites its line: show only the last state
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        shown += [text[at : at + LONGEST_LINE] for at in range(0, len(text), LONGEST_LINE)] or [""]
    return shown, taken
