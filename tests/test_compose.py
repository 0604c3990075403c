"""The compose file, as far as it can be checked without an engine: names, mounts, secrets, settings.

`make deployment` runs it in one (tests/deployment).
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastcpt.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-services.yaml"
TEXT = COMPOSE.read_text()
VALUE = re.compile(r"\$\{(\w+)([^}]*)\}")
SECRET = re.compile(r"\w*(?:PASSWORD|KEY|SECRET)\w*")
SCRIPT = ROOT / "include" / "scripts" / "deployment.sh"


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return dict(read_yaml(COMPOSE)["services"])


def test_airflow_knows_every_option_that_is_set(services: dict[str, dict[str, Any]]) -> None:
    from airflow.configuration import conf

    known = conf.configuration_description
    named = {name for service in services.values() for name in service.get("environment", {})}
    options = [name.split("__", 2)[1:] for name in named if name.startswith("AIRFLOW__")]
    assert len(options) > 5
    for section, option in options:
        assert option.lower() in known[section.lower()]["options"], (section, option)


def test_no_secret_has_a_default() -> None:
    found = [(name, rest) for name, rest in VALUE.findall(TEXT) if SECRET.fullmatch(name)]
    assert {name for name, _ in found} >= {"POSTGRES_PASSWORD", "FERNET_KEY", "JWT_SECRET"}
    assert all(rest.startswith(":?") for _, rest in found)


def test_what_is_mounted_is_made_by_the_settings_and_what_is_copied_is_there(
    services: dict[str, dict[str, Any]],
) -> None:
    mounted = [volume.split(":")[0] for volume in services["scheduler"]["volumes"]]
    assert [path for path in mounted if path.startswith("./")] == [
        "./deployment/data",
        "./deployment/ssh",
    ]
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    files = " ".join(copied).split()
    assert {"dags", "include", "plugins", "requirements.txt"} <= set(files)
    assert all(list(ROOT.glob(path)) for path in files)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {f"!{path}" for path in files if "." not in path} <= set(ignored)


def test_all_that_goes_on_running_has_a_health_check_and_bounded_logs(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
        assert ("healthcheck" in service) == (name != "init"), name
        assert service["restart"] == ("no" if name == "init" else "unless-stopped")


def run_script(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = checkout / "include" / "scripts" / "deployment.sh"
    return subprocess.run([script, *words], capture_output=True, text=True, cwd="/")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but the script, on a path with a blank."""
    folder = tmp_path / "a checkout"
    (folder / "include" / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "include" / "scripts")
    return folder


def test_settings_hold_every_value_without_a_default_and_are_their_owners_alone(
    checkout: Path,
) -> None:
    documents = checkout / "my documents"
    documents.mkdir()
    assert run_script(checkout, "settings", str(documents)).returncode == 0
    file = checkout / "deployment" / "settings.env"
    lines = file.read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert set(values) == {name for name, rest in VALUE.findall(TEXT) if rest.startswith(":?")}
    assert values["DOCUMENTS"] == str(documents)
    assert len(base64.urlsafe_b64decode(values["FERNET_KEY"])) == 32
    secrets = [value for name, value in values.items() if SECRET.fullmatch(name)]
    assert len(secrets) == len(set(secrets)) == 5
    assert all(len(secret) >= 30 for secret in secrets)
    # root's containers run as a user of the image, who owns what they write
    owner = os.getuid() or 50000
    assert values["AIRFLOW_UID"] == str(owner)
    assert file.stat().st_mode & 0o777 == 0o600
    for name in ("data", "ssh"):
        assert (checkout / "deployment" / name).stat().st_uid == owner
        assert (checkout / "deployment" / name).stat().st_mode & 0o777 == 0o700


def test_settings_that_are_there_are_never_replaced(checkout: Path) -> None:
    run_script(checkout, "settings", str(checkout))
    file = checkout / "deployment" / "settings.env"
    before = file.read_text()
    again = run_script(checkout, "settings", str(checkout))
    assert again.returncode == 2
    assert "deployment/settings.env is there already" in again.stderr
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["settings", "/nowhere"], "there is no folder /nowhere"),
        (["backup"], "nothing is deployed here"),
        (["upgrade"], "nothing is deployed here"),
        (["restore", "/nowhere"], "is no backup: there is no database.dump"),
        ([], "deployment.sh settings DOCUMENTS"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    checkout: Path, words: list[str], says: str
) -> None:
    done = run_script(checkout, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (checkout / "deployment").exists()


# In place of an engine: notes what it is called with, and does in deployment/data what a container does in /data.
DOCKER = """#!/bin/bash
echo "$*" >> "$NOTES"
case "$*" in
  *pg_dump*) [ -z "${NO_DUMP:-}" ] && printf 'the database' ;;
  *pg_restore*) cat > "$NOTES.restored" ;;
  *" scheduler -c"*) exec bash -c "${@: -1:1}" 'x' ;;
esac
"""


@pytest.fixture
def deployed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment that has made something, and a stand-in for its engine."""
    programs = checkout / "bin"
    programs.mkdir()
    data = checkout / "deployment" / "data"
    inside = DOCKER.replace(
        '"${@: -1:1}"', f'"$(printf %s "${{@: -1:1}}" | sed "s#/data#\'{data}\'#")"'
    )
    (programs / "docker").write_text(inside)
    (programs / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(checkout / "notes"))
    assert run_script(checkout, "settings", str(checkout)).returncode == 0
    for name in ("models/one/weights", "runs/one/report.html", "scores/one", "tokens/one"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    return checkout


def test_a_backup_holds_what_cannot_be_made_again(deployed: Path) -> None:
    done = run_script(deployed, "backup")
    assert done.returncode == 0, done.stderr
    (backup,) = (deployed / "deployment" / "backups").iterdir()
    assert (backup / "database.dump").read_text() == "the database"
    assert (backup / "settings.env").read_text() == (
        deployed / "deployment" / "settings.env"
    ).read_text()
    with tarfile.open(backup / "data.tar") as data:
        names = {member.name for member in data if member.isfile()}
    assert names == {"./models/one/weights", "./runs/one/report.html"}
    assert backup.stat().st_mode & 0o777 == 0o700


def test_a_backup_that_fails_leaves_none(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_DUMP", "1")
    assert run_script(deployed, "backup").returncode != 0
    assert list((deployed / "deployment" / "backups").iterdir()) == []


def test_a_restore_puts_all_of_it_back_while_nothing_runs(deployed: Path) -> None:
    run_script(deployed, "backup")
    (backup,) = (deployed / "deployment" / "backups").iterdir()
    shutil.rmtree(deployed / "deployment" / "data" / "models")
    (deployed / "deployment" / "settings.env").unlink()
    (deployed / "notes").unlink()
    done = run_script(deployed, "restore", str(backup))
    assert done.returncode == 0, done.stderr
    assert (deployed / "deployment/data/models/one/weights").read_text() == "models/one/weights"
    assert (deployed / "notes.restored").read_text() == "the database"
    assert "FERNET_KEY=" in (deployed / "deployment" / "settings.env").read_text()
    order = (deployed / "notes").read_text()
    steps = [
        "build",
        "down",
        "--wait postgres",
        "dropdb",
        "pg_restore",
        "scheduler -c",
        "up -d\n",
    ]
    places = [order.index(step) for step in steps]
    assert places == sorted(places)


def test_an_upgrade_builds_and_backs_up_before_anything_is_ended(deployed: Path) -> None:
    settings = deployed / "deployment" / "settings.env"
    settings.write_text(settings.read_text() + "EXECUTOR=CeleryExecutor\n")
    done = run_script(deployed, "upgrade")
    assert done.returncode == 0, done.stderr
    order = (deployed / "notes").read_text()
    places = [order.index(step) for step in ("build", "pg_dump", "down", "up -d\n")]
    assert places == sorted(places)
    assert len(list((deployed / "deployment" / "backups").iterdir())) == 1


def test_nothing_of_a_deployment_can_be_committed() -> None:
    names = ["deployment/settings.env", "deployment/ssh/key", "deployment/data/models/x"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names


def test_every_port_is_the_loopbacks_and_every_image_has_a_version(
    services: dict[str, dict[str, Any]],
) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert all(":" in service["image"] for service in services.values())


@pytest.mark.slow
def test_the_pinned_packages_go_together() -> None:
    """As the image installs them; pip asks the registry, and installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    named = ["requirements.txt", "requirements-compose.txt", "requirements-celery.txt"]
    files = [word for name in named for word in ("-r", name)]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
