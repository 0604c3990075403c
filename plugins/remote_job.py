"""A task that starts a job on the cluster, or finds it again, and has the triggerer watch it.

Waiting occupies no worker. The job's log is copied into the task's log line by line. A retry finds the job
of the previous try. Marking the task failed, clearing it or deleting its run ends the job.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow.sdk import BaseHook, BaseOperator, Connection, Context
from airflow.sdk.exceptions import AirflowTaskTimeout
from airflow.triggers.base import BaseTrigger, TriggerEvent

import gpu_turns
from bringing import Bring, Bringing
from fastcpt.cluster import jobs
from fastcpt.cluster.remote import (
    OUTAGE_S,
    ClusterError,
    ConnectionLost,
    LoginRefused,
    Remote,
    ask_async,
    ask_through,
)
from fastcpt.files import HOME
from job_log import Shown
from live import Live
from notifications import tell_once

POLL_S = 2.0
# A job that runs for longer than this is polled less often.
SHORT_S = 120.0
LONG_POLL_S = 5.0
# How long the triggerer keeps asking a host that does not answer, before the task is retried.
UNREACHABLE_S = 1800.0
# A name with this prefix is a run's rented host instead of a connection.
RENTED = "rented."


def connection_of(connection_id: str, with_host: bool = True) -> Connection:
    """The Airflow connection of a GPU host; ``ClusterError`` if there is none or it contains a key.

    Extra fields: ``key_file``, ``known_hosts``, and for the host ``python``, ``root``. Private keys stay in
    files: a ``private_key`` in the connection is refused.
    """
    try:
        connection = BaseHook.get_connection(connection_id)
    except Exception as error:
        if "isn't defined" not in str(error) and "not found" not in str(error).lower():
            raise
        raise ClusterError(
            f"no Airflow connection '{connection_id}': add it (Admin, Connections, type GPU host), "
            "or name another one in the trigger form"
        ) from None
    extra = connection.extra_dejson
    if "private_key" in extra:
        raise ClusterError(
            f"connection '{connection_id}': keep the private key in a file and give its path as "
            "key_file in the extra field"
        )
    if with_host and not connection.host:
        raise ClusterError(f"connection '{connection_id}' has no host")
    return connection


def remote_of(connection_id: str) -> Remote:
    """How to reach the host of an Airflow connection, or a run's rented one (``RENTED`` and its name)."""
    if connection_id.startswith(RENTED):
        return _rented(connection_id.removeprefix(RENTED))
    connection = connection_of(connection_id)
    extra = connection.extra_dejson
    return Remote(
        str(connection.host),
        connection.login or None,
        connection.port,
        extra.get("key_file") or None,
        extra.get("known_hosts") or None,
    )


def _rented(name: str) -> Remote:
    """A rented machine from the ledger; the login's key comes from the connection."""
    from fastcpt.rent import ledger, machines

    try:
        rental = machines.machine_of(HOME, name)
    except machines.NoMachine as error:
        raise ClusterError(str(error)) from None
    except machines.MachineLost as error:
        raise ConnectionLost(str(error)) from None
    machine = rental.machine
    assert machine is not None
    key = connection_of(rental.connection, with_host=False).extra_dejson.get("key_file") or None
    known = str(ledger.known_hosts(HOME, rental))
    return Remote(machine.host, machine.user, machine.port, key, known)


@dataclass(frozen=True)
class RemoteJob:
    """What a task has to run, decided at run time.

    If the file ``result`` exists, the job is done; ``fetch`` names further small files for the task's
    result. ``answer`` is the part of the task's result that is known beforehand. A wait for GPUs longer than
    ``waiting_hours`` is reported. ``bring`` has the fields of ``bringing.Bring``.
    """

    connection: str
    root: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    result: str | None = None
    fetch: dict[str, str] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    alone: jobs.Alone = "root"
    slurm: dict[str, Any] | None = None
    waiting_hours: float | None = None
    bring: dict[str, Any] | None = None
    live: dict[str, str] | None = None  # the fields of live.Live, for the run's page


class RemoteJobOperator(BaseOperator):
    """Run the job that ``job(context)`` describes; if it returns a mapping, that is the task's result.

    ``secrets(context)`` returns environment variables that reach the job only through a 0600 file.
    ``then(context, files, answer)`` makes the task's result from the fetched files (name -> text or None)
    and the job's ``answer``; without it, ``answer`` is the result. With ``in_turn`` the job waits until its
    run has the cluster's GPUs.
    """

    def __init__(
        self,
        *,
        job: Callable[[Context], RemoteJob | Mapping[str, Any]],
        then: Callable[[Context, dict[str, str | None], Any], object] | None = None,
        secrets: Callable[[Context], Mapping[str, str]] | None = None,
        in_turn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.then = then
        self.secrets = secrets
        self.in_turn = in_turn

    def execute(self, context: Context) -> Any:
        return self._begin(context, time.time())

    def execute_in_turn(
        self, context: Context, event: dict[str, Any], since: float | None = None
    ) -> Any:
        """Resume when the run has the GPUs, or when the wait has to be reported."""
        if "waiting" in event:
            _tell_of_waiting(context, event)
            since = None
        return self._begin(context, since)

    def _begin(self, context: Context, since: float | None) -> Any:
        """``since``: when the wait for GPUs began, in seconds since the epoch; None if it was reported."""
        wanted = self.job(context)
        if isinstance(wanted, Mapping):
            return dict(wanted)
        # Slurm allocates GPUs itself, so its jobs go straight into its queue
        if self.in_turn and not wanted.slurm:
            self._wait_for_turn(context, wanted, since)
        self._run(context, wanted, since)
        return self._answer(context, wanted)

    def _wait_for_turn(self, context: Context, wanted: RemoteJob, since: float | None) -> None:
        """Return if the run has the GPUs; otherwise defer until it has them."""
        task = context["task_instance"]
        asked = (gpu_turns.cluster_of(remote_of(wanted.connection)), task.dag_id, task.run_id)
        if gpu_turns.take(*asked):
            self.defer(
                trigger=gpu_turns.TurnTrigger(*asked, _tell_at(wanted, since)),
                method_name="execute_in_turn",
                kwargs={"since": since},
            )

    def _run(self, context: Context, wanted: RemoteJob, since: float | None = None) -> None:
        """Start or find the job; return if it is complete, otherwise defer until it has ended."""
        name, owner = _name(context), str(context["task_instance"].id)
        job = jobs.Job(
            name,
            wanted.commands,
            wanted.environment,
            wanted.folder,
            wanted.result,
            self.secrets(context) if self.secrets else {},
            wanted.alone,
            jobs.SlurmOptions(**wanted.slurm) if wanted.slurm else None,
        )
        self._stop = (wanted.connection, wanted.root, name, owner)
        found = jobs.submit(remote_of(wanted.connection), wanted.root, job, owner)
        self.log.info("job %s: %s", name, found)
        if found == "complete":
            return
        # Airflow does not apply execution_timeout while deferred, so the trigger does
        ends_by = None
        if self.execution_timeout:
            ends_by = time.time() + self.execution_timeout.total_seconds()
        self.defer(
            trigger=RemoteJobTrigger(
                wanted.connection,
                wanted.root,
                name,
                owner,
                ends_by,
                _tell_at(wanted, since),
                wanted.bring,
                wanted.live,
            ),
            method_name="execute_complete",
            kwargs={"wanted": asdict(wanted)},
        )

    def execute_complete(
        self, context: Context, event: dict[str, Any], wanted: dict[str, Any]
    ) -> Any:
        """Resume when the job has ended: raise its error, or return the task's result."""
        if "unreachable" in event:
            raise ConnectionLost(event["unreachable"])
        if "refused" in event:
            raise ClusterError(event["refused"])
        if "timeout" in event:
            raise AirflowTaskTimeout(event["timeout"])
        job = RemoteJob(**wanted)
        if "waiting" in event:
            _tell_of_waiting(context, event)
            self._run(context, job)
            return self._answer(context, job)
        status, owner = event["status"], str(context["task_instance"].id)
        if status["state"] == "cancelled" and status.get("stopped_for") not in (None, "", owner):
            # after a clear, the previous try ended the job that this one had found
            self._run(context, job)
            return self._answer(context, job)
        remote = remote_of(job.connection)
        jobs.outcome(remote, _name(context), status, event["last_lines"])
        return self._answer(context, job)

    def _answer(self, context: Context, job: RemoteJob) -> Any:
        if self.then is None and job.answer is not None:
            return job.answer
        paths = {**({"result": job.result} if job.result else {}), **job.fetch}
        remote = remote_of(job.connection)
        files = ask_through(remote, "read_files", paths=paths) if paths else {}
        if self.then:
            return self.then(context, files, job.answer or {})
        return json.loads(files["result"]) if files.get("result") else None

    def on_kill(self) -> None:
        """The task was ended while it ran: end its job too."""
        if stop := getattr(self, "_stop", None):
            connection, root, name, owner = stop
            jobs.stop(remote_of(connection), root, name, owner)


def _tell_at(job: RemoteJob, since: float | None) -> float | None:
    return since + job.waiting_hours * 3600 if since and job.waiting_hours else None


def _tell_of_waiting(context: Context, event: dict[str, Any]) -> None:
    reason = f"longer than budget.waiting_hours: {event['waiting']}"
    tell_once(context, "waiting for GPUs", reason)


def _name(context: Context) -> str:
    task = context["task_instance"]
    return jobs.job_name(task.dag_id, task.run_id, task.task_id, task.map_index)


class RemoteJobTrigger(BaseTrigger):
    """Watches a job: streams its log, and fires when it has ended or is lost.

    ``owner`` is the task's try; ``ends_by`` (seconds since the epoch) is its timeout. If the job has not
    started to run by ``tell_at``, the trigger fires with the reason as ``waiting``. ``bring``
    (``bringing.Bring``): copy checkpoints here meanwhile, and the last one if the job fails.
    """

    def __init__(
        self,
        connection: str,
        root: str,
        name: str,
        owner: str,
        ends_by: float | None = None,
        tell_at: float | None = None,
        bring: dict[str, Any] | None = None,
        live: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.connection = connection
        self.root = root
        self.name = name
        self.owner = owner
        self.ends_by = ends_by
        self.tell_at = tell_at
        self.bring = bring
        self.live = live

    def serialize(self) -> tuple[str, dict[str, Any]]:
        kwargs = {
            "connection": self.connection,
            "root": self.root,
            "name": self.name,
            "owner": self.owner,
            "ends_by": self.ends_by,
            "tell_at": self.tell_at,
            "bring": self.bring,
            "live": self.live,
        }
        return ("remote_job.RemoteJobTrigger", kwargs)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        clock = asyncio.get_running_loop().time
        bringing = Bringing(Bring(**self.bring), self.log, clock) if self.bring else None
        try:
            async for event in self._watch(clock, bringing):
                yield event
        finally:
            if bringing:
                await bringing.end()

    async def _watch(
        self, clock: Callable[[], float], bringing: Bringing | None
    ) -> AsyncIterator[TriggerEvent]:
        began = answered = clock()
        remote: Remote | None = None
        shown = Shown(self.log, clock)
        live = Live(**self.live) if self.live else None
        began_to_run = False  # a job that Slurm requeues later is not reported as waiting
        # on the monotonic clock, so that setting the wall clock does not change the timeout
        until = clock() + self.ends_by - time.time() if self.ends_by else None
        while True:
            if until is not None and clock() > until:
                await self.on_kill()
                yield TriggerEvent({"timeout": f"job {self.name} took longer than the task may"})
                return
            try:
                if remote is None:
                    # not asgiref, which loses a cancel's message, and with it Airflow's call of on_kill
                    remote = await asyncio.to_thread(remote_of, self.connection)
                answer = await _poll(remote, self.root, self.name, shown.seen)
                if "error" in answer:
                    raise ConnectionLost(f"{remote.host}: {answer['error']}")
            except (ConnectionLost, LoginRefused) as error:
                # the login worked when the job was started, so the user's home may be unmounted
                self.log.warning("%s; asking again", error)
                remote = None  # the connection may have been corrected
                if clock() - answered > UNREACHABLE_S:
                    yield TriggerEvent({"unreachable": str(error)})
                    return
                await asyncio.sleep(5 * POLL_S)
                continue
            except ClusterError as error:
                yield TriggerEvent({"refused": str(error)})
                return
            answered = clock()
            taken, over = await shown.show(answer)
            if over:
                # after success, later tasks fetch the model
                if bringing and answer["status"]["state"] != "succeeded":
                    await bringing.last(remote)
                yield TriggerEvent({"status": answer["status"], "last_lines": shown.last_lines})
                return
            if live:
                await live.leave(remote, answer["status"], shown.last_lines[-1])
            began_to_run = began_to_run or answer["status"]["state"] == "running"
            if self.tell_at and not began_to_run and time.time() > self.tell_at:
                yield TriggerEvent({"waiting": shown.why or "the job has not begun to run"})
                return
            if bringing:
                bringing.look(remote)
            if not taken:
                # after output, poll again at once: that acknowledges it, so a restart repeats little
                await asyncio.sleep(POLL_S if clock() - began < SHORT_S else LONG_POLL_S)

    async def on_kill(self) -> None:
        """The task was marked failed, cleared or deleted while deferred: end its job.

        Airflow 3.3 cancels this again every second, so the request runs in its own asyncio task.
        """
        asking = asyncio.get_running_loop().create_task(self._stop())
        _asking.add(asking)
        asking.add_done_callback(_asking.discard)
        await asyncio.shield(asking)

    async def _stop(self) -> None:
        """End the job; retry for ``OUTAGE_S`` if the host does not answer."""
        until = time.monotonic() + OUTAGE_S
        while True:
            try:
                remote = await asyncio.to_thread(remote_of, self.connection)
                answer = await ask_async(
                    remote, "stop", root=self.root, name=self.name, owner=self.owner
                )
            except (ConnectionLost, LoginRefused) as error:
                self.log.warning("%s; asking again", error)
                if time.monotonic() > until:
                    self.log.error("job %s was not ended: end it there by hand", self.name)
                    return
                await asyncio.sleep(POLL_S)
            except ClusterError as error:
                self.log.error("job %s was not ended: %s", self.name, error)
                return
            else:
                if not answer["ended"]:
                    self.log.error("job %s could not be ended: end it there by hand", self.name)
                elif answer.get("left_alone"):
                    self.log.info("job %s is another try's by now: it runs on", self.name)
                elif answer["was"] in jobs.ACTIVE:
                    self.log.info("job %s was ended", self.name)
                else:
                    self.log.info("job %s had ended before: %s", self.name, answer["was"])
                return


# One request at a time asks about all jobs of a host, so a hundred jobs need no more connections than one.
_pending: dict[tuple[int, Remote, str], list[tuple[dict[str, Any], asyncio.Future[Any]]]] = {}
_asking: set[asyncio.Task[None]] = set()


async def _poll(remote: Remote, root: str, name: str, seen: int | None) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    key = (id(loop), remote, root)
    answer = loop.create_future()
    if key in _pending:
        _pending[key].append(({"name": name, "seen": seen}, answer))
    else:
        _pending[key] = [({"name": name, "seen": seen}, answer)]
        asking = loop.create_task(_ask_about(key))
        _asking.add(asking)
        asking.add_done_callback(_asking.discard)
    found: dict[str, Any] = await answer
    return found


async def _ask_about(key: tuple[int, Remote, str]) -> None:
    """Send requests until none is pending."""
    _, remote, root = key
    try:
        while _pending[key]:
            await asyncio.sleep(0.05)
            batch, _pending[key] = _pending[key], []
            requests = [request for request, _ in batch]
            try:
                answers = (await ask_async(remote, "poll", root=root, jobs=requests))["jobs"]
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(type(error)(str(error)))
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
    finally:
        for _, future in _pending.pop(key):
            future.cancel()
