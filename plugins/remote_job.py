"""A task that runs a job on the cluster: started or found again, then watched by the triggerer.

The wait holds no worker. The job's log comes into the task's log line by line. A retry finds the
job of the try before; marking the task failed, clearing it or deleting its run ends the job there.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow.sdk import BaseHook, BaseOperator, Connection, Context
from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from fastcpt.cluster import jobs
from fastcpt.cluster.remote import ClusterError, ConnectionLost, Remote, ask, ask_async

POLL_S = 2.0
# So long the triggerer goes on asking a host that does not answer, before the task is tried again.
UNREACHABLE_S = 1800.0
LAST_LINES = 30


def connection_of(connection_id: str) -> Connection:
    """The Airflow connection of type SSH; ``ClusterError`` where there is none or it holds a key.

    Extra fields: ``key_file``, ``known_hosts``, and of the host: ``python``, ``root``. Keys stay in
    their files: a ``private_key`` in the connection is refused.
    """
    try:
        connection = BaseHook.get_connection(connection_id)
    except Exception as error:
        if "isn't defined" not in str(error) and "not found" not in str(error).lower():
            raise
        raise ClusterError(
            f"no Airflow connection '{connection_id}': add it (Admin, Connections, type SSH), "
            "or name another one in the trigger form"
        ) from None
    extra = connection.extra_dejson
    if "private_key" in extra:
        raise ClusterError(
            f"connection '{connection_id}': keep the private key in a file and give its path as "
            "key_file in the extra field"
        )
    if not connection.host:
        raise ClusterError(f"connection '{connection_id}' has no host")
    return connection


def remote_of(connection_id: str) -> Remote:
    """How to reach the host of an Airflow connection."""
    connection = connection_of(connection_id)
    extra = connection.extra_dejson
    return Remote(
        str(connection.host),
        connection.login or None,
        connection.port,
        extra.get("key_file") or None,
        extra.get("known_hosts") or None,
    )


@dataclass(frozen=True)
class RemoteJob:
    """What a task has to run, decided at run time.

    ``result`` is the file whose presence means that it is done; ``fetch`` names more small files
    that the task's answer is made of. ``answer`` is the answer where it is known beforehand.
    """

    connection: str
    root: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    result: str | None = None
    fetch: dict[str, str] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    uses_gpus: bool = True


class RemoteJobOperator(BaseOperator):
    """Run the job that ``job(context)`` describes; a mapping instead of a job is the answer itself.

    ``secrets(context)`` gives environment variables that reach the job through a 0600 file alone.
    ``then(context, files)`` makes the task's answer of the fetched files (name -> text or None).
    """

    def __init__(
        self,
        *,
        job: Callable[[Context], RemoteJob | Mapping[str, Any]],
        then: Callable[[Context, dict[str, str | None]], Any] | None = None,
        secrets: Callable[[Context], Mapping[str, str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.then = then
        self.secrets = secrets

    def execute(self, context: Context) -> Any:
        wanted = self.job(context)
        if isinstance(wanted, Mapping):
            return dict(wanted)
        name = _name(context)
        job = jobs.Job(
            name,
            wanted.commands,
            wanted.environment,
            wanted.folder,
            wanted.result,
            self.secrets(context) if self.secrets else {},
            wanted.uses_gpus,
        )
        self._stop = (wanted.connection, wanted.root, name)
        found = jobs.submit(remote_of(wanted.connection), wanted.root, job)
        self.log.info("job %s: %s", name, found)
        if found == "complete":
            return self._answer(context, wanted)
        self.defer(
            trigger=RemoteJobTrigger(wanted.connection, wanted.root, name),
            method_name="execute_complete",
            kwargs={"wanted": asdict(wanted)},
        )

    def execute_complete(
        self, context: Context, event: dict[str, Any], wanted: dict[str, Any]
    ) -> Any:
        """The job has ended: its outcome, and the answer made from its files."""
        if "unreachable" in event:
            raise ConnectionLost(event["unreachable"])
        if "refused" in event:
            raise ClusterError(event["refused"])
        job = RemoteJob(**wanted)
        remote = remote_of(job.connection)
        jobs.outcome(remote, _name(context), event["status"], event["last_lines"])
        return self._answer(context, job)

    def _answer(self, context: Context, job: RemoteJob) -> Any:
        if job.answer is not None:
            return job.answer
        paths = {**({"result": job.result} if job.result else {}), **job.fetch}
        files = ask(remote_of(job.connection), "read_files", paths=paths)
        if self.then:
            return self.then(context, files)
        return json.loads(files["result"]) if files.get("result") else None

    def on_kill(self) -> None:
        """The task was ended while it ran: so is its job."""
        if stop := getattr(self, "_stop", None):
            connection, root, name = stop
            jobs.stop(remote_of(connection), root, name)


def _name(context: Context) -> str:
    task = context["task_instance"]
    return jobs.job_name(task.dag_id, task.run_id, task.task_id, task.map_index)


class RemoteJobTrigger(BaseTrigger):
    """Watches a job: streams its log, and fires when it has ended or is gone."""

    def __init__(self, connection: str, root: str, name: str) -> None:
        super().__init__()
        self.connection = connection
        self.root = root
        self.name = name

    def serialize(self) -> tuple[str, dict[str, Any]]:
        kwargs = {"connection": self.connection, "root": self.root, "name": self.name}
        return ("remote_job.RemoteJobTrigger", kwargs)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        clock = asyncio.get_running_loop().time
        answered = clock()
        seen: int | None = None
        # a piece of the log may end inside a line, or inside a character
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest, last_lines = "", [""]
        while True:
            try:
                remote = await sync_to_async(remote_of)(self.connection)
                answer = await ask_async(remote, "poll", root=self.root, name=self.name, seen=seen)
            except ConnectionLost as error:
                self.log.warning("%s; asking again", error)
                if clock() - answered > UNREACHABLE_S:
                    yield TriggerEvent({"unreachable": str(error)})
                    return
                await asyncio.sleep(min(30.0, 5 * POLL_S))
                continue
            except ClusterError as error:
                yield TriggerEvent({"refused": str(error)})
                return
            answered = clock()
            piece = base64.b64decode(answer["log"])
            seen = answer["seen"] + len(piece)
            *lines, rest = (rest + decoder.decode(piece)).split("\n")
            ended = answer["status"]["state"] not in jobs.ACTIVE and seen >= answer["size"]
            if ended and rest:
                lines.append(rest)
            for line in lines:
                # a progress bar rewrites its line: its last state is what counts
                self.log.info("%s", line.rstrip("\r").rpartition("\r")[2])
            last_lines = [*last_lines, *lines][-LAST_LINES:]
            if ended:
                yield TriggerEvent({"status": answer["status"], "last_lines": last_lines})
                return
            if not piece or seen >= answer["size"]:
                await asyncio.sleep(POLL_S)

    async def on_kill(self) -> None:
        """Marked failed, cleared or deleted while it waited: the job ends with it."""
        remote = await sync_to_async(remote_of)(self.connection)
        await ask_async(remote, "stop", root=self.root, name=self.name)
