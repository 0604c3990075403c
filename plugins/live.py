"""News of a running job for the run's page: its state and last line, and a training's curve so far.

The triggerer, which watches the job anyway, writes them into the run's record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcpt.cluster.remote import ClusterError, Remote, ask_async
from fastcpt.reporting.record import add, add_text
from tracking import follow

EVERY_S = 15.0  # a curve of 4,000 rows is a megabyte, so do not fetch it more often

log = logging.getLogger(__name__)


class Live:
    """``metrics``: the job's ``metrics.jsonl`` on the host; empty if it has none."""

    def __init__(self, record: str, task: str, metrics: str = "") -> None:
        self.record, self.task, self.metrics = Path(record), task, metrics
        self.left = 0.0
        self.following: asyncio.Task[None] | None = None

    async def leave(self, remote: Remote, status: Mapping[str, Any], line: str) -> None:
        """Write ``live/<task>.json`` and the curve into the record, at most every ``EVERY_S``.

        If something cannot be fetched or written, the page is out of date; the job is not affected.
        MLflow is told in a thread: a slow server does not delay the watching.
        """
        if time.monotonic() - self.left < EVERY_S or not self.record.is_dir():
            return
        self.left = time.monotonic()
        now = {
            "state": status["state"],
            "why": status.get("why", ""),
            "line": line[:500],
            "at": time.time(),
        }
        try:
            await asyncio.to_thread(add, self.record, f"live/{self.task}.json", now)
            if self.metrics:
                paths = {"metrics": self.metrics}
                found = (await ask_async(remote, "read_files", paths=paths))["metrics"]
                whole = (found or "")[: (found or "").rfind("\n") + 1]
                if whole:
                    name = f"{self.task}/metrics.jsonl"
                    await asyncio.to_thread(add_text, self.record, name, whole)
        except (ClusterError, OSError) as error:
            log.info("the page of the run is not up to date: %s", error)
        if self.following is None or self.following.done():
            self.following = asyncio.create_task(asyncio.to_thread(follow, self.record))
