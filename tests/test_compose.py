"""The compose file as far as it can be read without an engine: names, mounts, secrets, settings.

`make deployment` runs it in one (tests/deployment).
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
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
    assert all((ROOT / path).exists() for path in files)
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
