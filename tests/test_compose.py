"""docker-compose.yaml as far as it can be read without an engine: names, mounts, secrets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcpt.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yaml"
TEXT = COMPOSE.read_text()
SECRET = re.compile(r"\$\{(\w*(?:PASSWORD|KEY|SECRET)\w*)([^}]*)\}")


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
    found = SECRET.findall(TEXT)
    assert {name for name, _ in found} >= {"POSTGRES_PASSWORD", "FERNET_KEY", "JWT_SECRET"}
    assert all(rest.startswith(":?") for _, rest in found)


def test_what_is_mounted_and_built_from_is_there(services: dict[str, dict[str, Any]]) -> None:
    mounted = [volume.split(":")[0] for volume in services["scheduler"]["volumes"]]
    ours = [path for path in mounted if path.startswith("./")]
    assert len(ours) >= 5
    copied = re.search(r"^COPY (.+) /$", (ROOT / "Dockerfile").read_text(), re.M)
    assert copied
    assert all((ROOT / path).exists() for path in [*ours, *copied[1].split()])


def test_every_port_is_the_loopbacks_and_every_image_has_a_version(
    services: dict[str, dict[str, Any]],
) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert all(":" in service["image"] for service in services.values())


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["requirements-compose.txt", "requirements-celery.txt"])
def test_the_pinned_packages_go_together(beside: str) -> None:
    """As the image and a Celery worker install them; pip asks the registry, and installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    files = ["-r", "requirements.txt", "-r", beside]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
