"""The compose file in a real Docker engine: docs/deployment.md's own commands, by an ordinary user.

One test, since each part builds on what the one before it left; `make deployment` runs it, as root.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import local_sshd
import pytest
from airflow_api import Api, follow_run

from deployment.engine import Engine, call, engine
from deployment.images import provide
from fastcpt.cluster.agent.jobs import stop
from fastcpt.corpus.sample import generate_sample

REPOSITORY = Path(__file__).resolve().parents[2]
# no account of this machine, as in a container
USER = 12345
PAGE = (REPOSITORY / "docs" / "deployment.md").read_text()
START, CARE, CELERY = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
BACKUP, RESTORE, UPGRADE = CARE.splitlines()
WAIT_S = 1800


def said(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Deployment:
    """A clone of the repository, and its commands as an ordinary user types them."""

    def __init__(self, folder: Path, one: Engine) -> None:
        self.folder, self.engine = folder, one
        self.clone = folder / "fast_cpt"
        self.data = self.clone / "deployment" / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.environment = {**one.environment, "HOME": str(folder), "PORT": str(self.port)}
        # beside a deployment of whoever runs this, where the engine is the machine's own
        self.environment["COMPOSE_PROJECT_NAME"] = f"fast_cpt_test_{self.port}"

    def type(self, commands: str) -> str:
        """Run commands of the page in the clone, as the user, and say how long they took."""
        said(commands.strip().replace("\n", "; "))
        began = time.monotonic()
        answer = self.ask(commands)
        said(f"  took {time.monotonic() - began:.0f} s")
        return answer

    def ask(self, commands: str) -> str:
        user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--groups", str(USER)]
        return call([*user, "bash", "-euc", commands], cwd=self.clone, env=self.environment)

    def own(self, *paths: Path) -> None:
        for path in paths:
            for below in [path, *path.rglob("*")]:
                os.chown(below, USER, USER, follow_symlinks=False)

    def settings(self) -> dict[str, str]:
        lines = (self.clone / "deployment" / "settings.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    @contextmanager
    def api(self) -> Iterator[Api]:
        """The REST API, logged in as the first user, once all containers are well."""
        home = self.folder / "login"
        home.mkdir(exist_ok=True)
        (home / "passwords.json").write_text(
            json.dumps({"admin": self.settings()["ADMIN_PASSWORD"]})
        )
        self.wait_until_healthy()
        with Api(f"http://127.0.0.1:{self.port}", home) as api:
            api.wait_until_ready(WAIT_S)
            yield api

    def containers(self) -> dict[str, str]:
        """Each container's name and state, as plain `docker compose ps` tells them."""
        lines = self.ask("docker compose ps --format '{{.Name}} {{.Status}}'").splitlines()
        return dict(line.split(" ", 1) for line in lines)

    def wait_until_healthy(self) -> None:
        until = time.monotonic() + WAIT_S
        while not (states := self.containers()) or not all(
            "(healthy)" in s for s in states.values()
        ):
            assert time.monotonic() < until, states
            time.sleep(10)
        said(f"healthy: {', '.join(sorted(states))}")


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    # an overlay's files cannot lie on an overlay or in memory, where /tmp may be
    folder = Path("/var/tmp/fast_cpt-deployment")
    folder.mkdir(exist_ok=True)
    with engine(folder / "engine") as one:
        said(f"engine: {'of this test' if one.own else 'of this machine'}")
        said(provide(one, REPOSITORY))
        made = Deployment(folder, one)
        shutil.rmtree(made.clone, ignore_errors=True)
        call(["git", "clone", "-q", REPOSITORY, made.clone])
        if one.own:
            shutil.chown(one.folder / "docker.sock", USER)
        made.own(made.clone, one.folder / "config")
        try:
            yield made
        finally:
            left = ["--profile", "celery", "down", "--volumes", "--timeout", "5"]
            call(["docker", "compose", *left], cwd=made.clone, env=made.environment)


@pytest.fixture
def cluster(deployment: Deployment) -> Iterator[dict[str, Any]]:
    """A plain sshd on the engine's bridge plays the GPU host; yields Airflow's connection to it."""
    folder = deployment.folder / "cluster"
    shutil.rmtree(folder, ignore_errors=True)
    bridge = json.loads(deployment.engine.docker("network", "inspect", "bridge"))[0]
    server = local_sshd.start_server(
        folder / "sshd", address=bridge["IPAM"]["Config"][0]["Gateway"]
    )
    shutil.copy(server["key_file"], deployment.clone / "my_key")  # 0600, as ssh wants it
    shutil.copy(server["known_hosts"], deployment.clone / "my_known_hosts")
    python = REPOSITORY / ".env/cluster/bin/python"
    places = {"key_file": "/ssh/key", "known_hosts": "/ssh/known_hosts"}
    extra = {**places, "python": str(python), "root": str(folder / "root")}
    yield {
        "connection_id": "gpu_cluster",
        "conn_type": "gpuhost",
        "host": server["host"],
        "port": server["port"],
        "login": server["user"],
        "extra": json.dumps(extra),
    }
    # jobs outlive their connection, but not this test
    for job in (folder / "root" / "jobs").glob("*"):
        stop(str(folder / "root"), job.name)
    os.killpg(server["pid"], signal.SIGTERM)


@pytest.mark.faults
@pytest.mark.linux("a Docker engine of its own")
def test_the_documented_commands_take_a_deployment_through_its_life(
    deployment: Deployment, cluster: dict[str, Any]
) -> None:
    sample = deployment.folder / "sample"
    shutil.rmtree(sample, ignore_errors=True)
    generate_sample(sample, documents=400)
    deployment.own(sample, deployment.clone / "my_key", deployment.clone / "my_known_hosts")
    deployment.type(START.replace("/path/to/documents", str(sample)))
    nothing_of_the_settings_can_be_committed(deployment)
    run = trained_over_a_restart_of_the_engine(deployment, cluster)
    everything_is_the_users(deployment, run)
    deployment.type(BACKUP)
    (backup,) = (deployment.clone / "deployment" / "backups").glob("2*")
    upgraded(deployment, run)
    restored(deployment, backup, run)
    trained_again_by_workers(deployment)


def nothing_of_the_settings_can_be_committed(deployment: Deployment) -> None:
    seen = deployment.type("git add --all --dry-run")
    assert "deployment/" not in seen
    assert (deployment.clone / "deployment/settings.env").stat().st_mode & 0o777 == 0o600
    passwords = [value for key, value in deployment.settings().items() if key.endswith("PASSWORD")]
    assert len(set(passwords)) == 3
    assert all(len(password) > 30 for password in passwords)


def sample_conf() -> dict[str, Any]:
    at = "/documents"
    return {
        "recipe": "sample",
        "documents": f"{at}/parsed",
        "instructions": f"{at}/instructions.jsonl",
        "connection": "gpu_cluster",
    }


def trained_over_a_restart_of_the_engine(deployment: Deployment, cluster: dict[str, Any]) -> str:
    with deployment.api() as api:
        api.client.post("/api/v2/connections", json=cluster).raise_for_status()
        run = api.trigger(sample_conf())
        until = time.monotonic() + 2 * WAIT_S
        while state_of(api, run, "train_cpt") != "deferred":
            assert time.monotonic() < until
            assert api.get(f"dagRuns/{run}")["state"] != "failed", follow_run(
                api, run, time.monotonic()
            )
            time.sleep(2)
    said("train_cpt is at work: the engine is restarted")
    if deployment.engine.own:
        deployment.engine.stop()
        deployment.engine.start()
        shutil.chown(deployment.engine.folder / "docker.sock", USER)
    else:
        deployment.type("docker compose restart")
    with deployment.api() as api:
        assert follow_run(api, run, time.monotonic()) == "success"
    return run


def state_of(api: Api, run: str, task: str) -> str | None:
    state = api.get(f"dagRuns/{run}/taskInstances/{task}")["state"]
    return None if state is None else str(state)


def everything_is_the_users(deployment: Deployment, run: str) -> None:
    """Models and reports are files that the user can open; logs are bounded; health is told."""
    (model,) = (deployment.data / "models").glob("sample-*")
    (report,) = (deployment.data / "runs").glob("*/report.html")
    for file in (model / "model.safetensors", model / "README.md", report):
        assert file.stat().st_uid == USER
        assert file.stat().st_mode & 0o400
    assert run in report.read_text()
    for name in deployment.containers():
        facts = json.loads(deployment.engine.docker("inspect", name))[0]
        assert facts["State"]["Health"]["Status"] == "healthy", name
        assert facts["HostConfig"]["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}
        assert facts["Config"]["User"] == ("" if "postgres" in name else f"{USER}:0")


def upgraded(deployment: Deployment, run: str) -> None:
    """A newer version of the code comes by git and runs; what was there still is."""
    origin = deployment.folder / "newer"
    shutil.rmtree(origin, ignore_errors=True)
    call(["git", "clone", "-q", REPOSITORY, origin])
    version = origin / "include" / "fastcpt" / "__init__.py"
    version.write_text(re.sub(r'"[\d.]+"', '"99.0.0"', version.read_text(), count=1))
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    call(["git", "-C", origin, *identity, "commit", "-qam", "A newer version"])
    deployment.own(origin)
    deployment.type(f"git remote set-url origin {origin}")
    deployment.type(UPGRADE)
    ask = "python -c 'import fastcpt; print(fastcpt.__version__)'"
    assert "99.0.0" in deployment.type(f"docker compose exec -T scheduler {ask}")
    with deployment.api() as api:
        assert api.get(f"dagRuns/{run}")["state"] == "success"


def restored(deployment: Deployment, backup: Path, run: str) -> None:
    """What is lost after a backup is back: a connection, a run, its report, a model."""
    with deployment.api() as api:
        api.client.delete("/api/v2/connections/gpu_cluster").raise_for_status()
        api.client.delete(f"/api/v2/dags/fast_cpt/dagRuns/{run}").raise_for_status()
    for name in ("runs", "models"):
        shutil.rmtree(deployment.data / name)
    deployment.type(RESTORE.replace("deployment/backups/TIME", str(backup)))
    with deployment.api() as api:
        assert api.get(f"dagRuns/{run}")["state"] == "success"
        api.client.get("/api/v2/connections/gpu_cluster").raise_for_status()
    everything_is_the_users(deployment, run)


def trained_again_by_workers(deployment: Deployment) -> None:
    """With Celery: all that was made is found again, by two workers."""
    settings = deployment.clone / "deployment" / "settings.env"
    settings.write_text(settings.read_text() + "EXECUTOR=CeleryExecutor\n")
    deployment.type(CELERY)
    with deployment.api() as api:
        names = deployment.containers()
        assert sum("-worker-" in name for name in names) == 2
        run = api.trigger(sample_conf())
        assert follow_run(api, run, time.monotonic()) == "success"
        tasks = api.get(f"dagRuns/{run}/taskInstances", limit=1000)["task_instances"]
    hosts = {task["hostname"] for task in tasks if task["hostname"]}
    scheduler = deployment.type("docker compose exec -T scheduler hostname").strip()
    assert hosts
    assert scheduler not in hosts
