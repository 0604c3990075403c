"""Copies checkpoints from the GPU host while a job's trigger watches it.

Each round is a separate process (``fastcpt.cluster.checkpoints``) at low priority. It ends with the trigger,
and the next one resumes where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from fastcpt.cluster.remote import Remote
from fastcpt.files import HOME
from fastcpt.planning.history import record_transfer


@dataclass(frozen=True)
class Bring:
    """Copy from a training's ``folder`` on the host to ``home`` here and on to ``url``.

    The copy is never older than ``minutes``, if checkpoints are saved and copied fast enough. The
    transfer's rate is recorded under ``line`` (``planning.history.line_of``).
    """

    line: str
    folder: str
    home: str
    minutes: float
    url: str | None = None


class Bringing:
    """The copying rounds of one trigger; ``log`` is its task's log.

    A round begins early enough to end before the copy here is as old as the interval, even if it takes
    twice as long as the last one.
    """

    def __init__(self, wanted: Bring, log: Any, clock: Callable[[], float]) -> None:
        self.wanted, self.log, self.clock = wanted, log, clock
        # at once: how old the copy of an earlier trigger is, is not known
        self.next = clock()
        self.round: asyncio.Task[None] | None = None

    def look(self, remote: Remote) -> None:
        """Start a round if one is due and none is running."""
        if self.clock() >= self.next and (self.round is None or self.round.done()):
            self.round = asyncio.get_running_loop().create_task(self._bring(remote))

    async def last(self, remote: Remote) -> None:
        """The job has ended: copy its last checkpoint."""
        if self.round is not None:
            await self.round
        await self._bring(remote)

    async def end(self) -> None:
        """Cancel a running round."""
        if self.round is not None and not self.round.done():
            self.round.cancel()
            with suppress(asyncio.CancelledError):
                await self.round

    async def _bring(self, remote: Remote) -> None:
        began, interval = self.clock(), 60 * self.wanted.minutes
        # if there is nothing new, or it fails
        self.next = began + interval / 4
        try:
            found = await self._ask(remote)
            if found is None:
                return
            self.next = began - found["age_s"] + interval - 2 * (self.clock() - began)
            size, seconds = found["bytes"], found["seconds"]
            self.log.info(
                "checkpoint step_%d is in %s: %.2f GB in %.0f s",
                *(found["step"], self.wanted.home, size / 1e9, seconds),
            )
            if found["from_its_beginning"]:
                record_transfer(HOME, self.wanted.line, size, seconds)
        except OSError as error:  # a failure must not stop the watching of the job
            self.log.warning("the checkpoint was not brought: %s", error)

    async def _ask(self, remote: Remote) -> dict[str, Any] | None:
        """The process's answer; None if there was nothing to copy."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fastcpt.cluster.checkpoints"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        request = {
            "remote": asdict(remote),
            "folder": self.wanted.folder,
            "home": self.wanted.home,
            "url": self.wanted.url,
        }
        try:
            output, errors = await process.communicate(json.dumps(request).encode())
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.terminate()
        if process.returncode:
            raise OSError(errors.decode(errors="replace").strip()[-1000:])
        found: dict[str, Any] | None = json.loads(output)
        return found
