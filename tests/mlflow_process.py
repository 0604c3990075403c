"""A real MLflow server on the loopback, in an environment of its own that is made once."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

VERSION = "3.17.2"
ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".env"
USER, PASSWORD = "ann", "a pass phrase: of some signs"


def environment() -> Path:
    """The folder of the environment, built where it is missing: minutes."""
    folder = ENVIRONMENTS / f"mlflow-{VERSION}"
    with (ENVIRONMENTS / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
            subprocess.run([*pip, f"mlflow[auth]=={VERSION}"], check=True)
            (folder / "complete").touch()
    return folder


class MlflowServer:
    """It keeps all in ``folder``: it can be stopped and started again. ``login``: it asks for one."""

    def __init__(self, folder: Path, login: bool = False) -> None:
        self.folder, self.login = folder, login
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        config = (
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{folder}/users.db\n"
            f"admin_username = {USER}\n"
            f"admin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        (folder / "auth.ini").write_text(config)

    def start(self) -> None:
        # not bin/mlflow, which has the path at which the environment was made
        python = environment() / "bin" / "python"
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": str(self.folder / "artifacts"),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
            **({"--app-name": "basic-auth"} if self.login else {}),
        }
        words = [word for pair in options.items() for word in pair]
        variables = {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "log").open("ab") as output:
            self.process = subprocess.Popen(
                [python, "-m", "mlflow", "server", *words],
                env={**os.environ, **variables},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        until = time.monotonic() + 300
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                said = (self.folder / "log").read_text()[-3000:]
                raise TimeoutError(f"MLflow did not start: {said}")
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """Its whole group, as it has workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ask(self, method: str, path: str, **values: Any) -> dict[str, Any]:
        """What a person's own request to its REST API answers."""
        answer = httpx.request(
            method,
            f"{self.url}/api/2.0/mlflow/{path}",
            timeout=60,
            **({"params": values} if method == "GET" else {"json": values}),
        )
        answer.raise_for_status()
        return dict(answer.json())
