"""Mirrors runs and models on an MLflow server, if the connection ``fast_cpt_mlflow`` names one.

The run's record and ``models.json`` remain the source. At each step, and every 15 s during a training,
the server gets what it lacks of them. If it does not answer, the run goes on and a later step catches up.

    HOME/mlflow/behind/<record>   a run that may not be complete on the server
    HOME/mlflow/models/<recipe>   the digest of the models.json that the server has
    HOME/mlflow/away              exists if the server did not answer; its time is that of the last try
"""

from __future__ import annotations

import fcntl
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from airflow.configuration import conf
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from fastcpt.files import HOME, digest_of, whole_file
from fastcpt.mlflow_server import Login, Mlflow, MlflowError, Refused
from fastcpt.registry.mlflow_models import send_models
from fastcpt.reporting.mlflow_run import send_run
from fastcpt.reporting.record import read

CONNECTION = "fast_cpt_mlflow"
QUIET_S = 60.0  # after no answer, until the server is asked again

log = logging.getLogger(__name__)


def follow(record: Path | None = None, patience: float = 0.0) -> None:
    """Bring the server up to date: the run of ``record``, runs that it missed, and all models.

    Without a connection it does nothing. It never raises: the first failure is logged, further ones only
    after the server has answered again. If another process is sending, it waits ``patience`` seconds for
    that and then leaves the rest to the next step.
    """
    try:
        login = login_of(CONNECTION)
    except AirflowNotFoundException:
        return
    except Exception as error:
        log.warning("MLflow is not told: %s", error)
        return
    folder = HOME / "mlflow"
    away = folder / "away"
    try:
        (folder / "behind").mkdir(parents=True, exist_ok=True)
        if record is not None:
            (folder / "behind" / record.name).touch()
        if away.exists() and time.time() - away.stat().st_mtime < QUIET_S:
            return
        with _alone(folder / ".lock", patience) as alone:
            if alone:
                _catch_up(Mlflow(login), record)
                away.unlink(missing_ok=True)
    except Exception as error:  # the run does not depend on MLflow
        if not away.exists():
            log.warning("MLflow is behind; a later step catches up: %s", error)
        with suppress(OSError):  # a full disk
            away.touch()


def login_of(connection_id: str) -> Login:
    """The server of an Airflow connection. ``ValueError`` if its URL is not usable."""
    connection = BaseHook.get_connection(connection_id)
    url = connection.host or ""
    if not url.startswith(("https://", "http://")) or "@" in url:
        raise ValueError(
            f"connection '{connection_id}': its URL has to begin with https:// or http:// and must not "
            "contain a login, which has its own fields"
        )
    return Login(url, connection.login or None, connection.password or None)


@contextmanager
def _alone(lock: Path, patience: float) -> Iterator[bool]:
    """Yields whether this is the only sending process: two would create a run twice."""
    until = time.monotonic() + patience
    with lock.open("w") as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(0.2)
            else:
                yield True
                return


def _catch_up(server: Mlflow, record: Path | None) -> None:
    """This run first, then others that are not complete there, then the models of every recipe."""
    if record is not None:
        _send(server, record)
    for marker in sorted((HOME / "mlflow" / "behind").iterdir()):
        other = HOME / "runs" / marker.name
        if not other.is_dir():
            marker.unlink(missing_ok=True)
        elif other != record:
            _send(server, other)
    for models in sorted(HOME.glob("models/*/models.json")):
        _send_models(server, models)


def _send(server: Mlflow, record: Path) -> None:
    try:
        facts = read(record, "run.json")
        base = conf.get("api", "base_url", fallback="http://localhost:8080").rstrip("/")
        send_run(server, record, f"{base}/dags/{facts['dag']}/runs/{quote(facts['run'], safe='')}")
        complete = bool(facts.get("ended"))
    except (Refused, ValueError, LookupError, TypeError) as error:
        # one damaged or refused record must not stop the others
        log.warning("run %s is not in MLflow: %s", record.name, error)
        complete = True
    if complete:
        (HOME / "mlflow" / "behind" / record.name).unlink(missing_ok=True)


def _send_models(server: Mlflow, models: Path) -> None:
    recipe = models.parent.name
    noted = HOME / "mlflow" / "models" / recipe
    now = digest_of(server.login.url, models.read_text())
    if noted.is_file() and noted.read_text() == now:
        return
    try:
        send_models(server, HOME, recipe, _place)
    except (Refused, ValueError, LookupError, TypeError) as error:
        log.warning("the models of %s are not in MLflow: %s", recipe, error)
        return
    with whole_file(noted) as aside:
        aside.write_text(now)


def _place(path: str) -> str:
    """The URI of a published model, on this machine or on a GPU host (``connection:path``).

    MLflow refuses ``file:`` and schemes by which its server would connect to a host, such as ``sftp:``.
    """
    if path.startswith("/"):
        return f"ssh://{socket.gethostname()}{quote(path)}"
    connection, _, folder = path.partition(":")
    try:
        found = BaseHook.get_connection(connection)
    except AirflowNotFoundException:  # a rented host, or a connection that was removed
        return f"ssh://{connection}{quote(folder)}"
    return f"ssh://{found.host}{f':{found.port}' if found.port else ''}{quote(folder)}"


class MlflowHook(BaseHook):
    """The connection type of an MLflow server; its Test button lists one experiment."""

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = CONNECTION
    conn_type = "mlflow"
    hook_name = "MLflow"

    def __init__(self, mlflow_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.connection = mlflow_conn_id

    def test_connection(self) -> tuple[bool, str]:
        """Whether the server answers and takes the login, or why not."""
        try:
            server = Mlflow(login_of(self.connection))
            server.ask("POST", "experiments/search", max_results=1)
        except (MlflowError, ValueError) as error:
            return False, str(error)
        return True, f"{server.login.url} answers"
