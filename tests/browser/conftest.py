"""Airflow's own API server and a real Chromium, for the pages people see.

No scheduler runs: a DAG run that a test triggers stays queued, and nothing is ever executed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fastcpt.files import write_json

REPOSITORY = Path(__file__).parents[2]
USER, PASSWORD = "reader", "of this test alone"
AIRFLOW = Path(sys.executable).with_name("airflow")

# A DAG of somebody else's on the same Airflow.
ANOTHER_DAG = """
from airflow.sdk import dag, task

@dag(dag_id="another", schedule=None)
def another():
    @task
    def idle():
        return 0

    idle()

another()
"""


@dataclass(frozen=True)
class Airflow:
    url: str
    home: Path  # FASTCPT_HOME: the records are in home/runs

    @property
    def database(self) -> Path:
        return self.home.with_name("airflow.db")

    def token(self) -> str:
        """What a browser gets as its cookie ``_token`` when somebody logs in."""
        answer = httpx.post(f"{self.url}/auth/token", json={"username": USER, "password": PASSWORD})
        return str(answer.raise_for_status().json()["access_token"])

    def client(self) -> httpx.Client:
        """A client that is logged in, as the UI is."""
        return httpx.Client(base_url=self.url, cookies={"_token": self.token()}, timeout=30)


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    folder = tmp_path_factory.mktemp("airflow")
    (folder / "dags").mkdir()
    (folder / "dags" / "another.py").write_text(ANOTHER_DAG)
    (folder / "dags" / "fast_cpt.py").symlink_to(REPOSITORY / "dags" / "fast_cpt.py")
    write_json(folder / "passwords.json", {USER: PASSWORD})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {
        **{key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW")},
        "PYTHONPATH": str(REPOSITORY / "include"),
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": "a secret of this test alone, long enough for HS512 " * 2,
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "false",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(folder / "passwords.json"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
        "FASTCPT_HOME": str(folder / "home"),
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        subprocess.run([AIRFLOW, *command], env=settings, check=True, capture_output=True)
    with (folder / "api-server.log").open("wb") as log:
        server = subprocess.Popen(
            [AIRFLOW, "api-server"], env=settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_up(url, server, folder / "api-server.log")
        yield Airflow(url, folder / "home")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            if httpx.get(f"{url}/api/v2/version").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise RuntimeError(f"the API server did not come up:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    # Debian's Chromium. Unpacked for an ordinary user, its start script would look in /usr/lib.
    unpacked = REPOSITORY / ".env/tools/root/usr/lib/chromium/chromium"
    installed = unpacked if unpacked.exists() else "/usr/bin/chromium"
    with sync_playwright() as playwright:
        # its sandbox does not work for root
        chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page with no cookies whose script errors fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert errors == []


@pytest.fixture
def sign_in(page: Page) -> Callable[[str, str], Page]:
    """Makes the page that of somebody logged in to the Airflow at a base URL, by API token."""

    def sign_in(url: str, token: str) -> Page:
        page.context.add_cookies([{"name": "_token", "value": token, "url": url}])
        return page

    return sign_in


@pytest.fixture
def logged_in(sign_in: Callable[[str, str], Page], airflow: Airflow) -> Page:
    """A page of somebody who is logged in to the tests' own Airflow."""
    return sign_in(airflow.url, airflow.token())
