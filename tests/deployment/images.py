"""The public images that the compose file builds on, or stand-ins for them from Debian's packages.

Where the public ones cannot be pulled, two Debian roots are imported under their names and tags. What a
stand-in does is what the public image documents: its user, its entrypoint, its variables.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from deployment.engine import Engine, call

MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
AIRFLOW = """#!/bin/sh
# As apache/airflow's: a name for whoever runs it, and Airflow's subcommands without the word airflow.
set -e
whoami >/dev/null 2>&1 || echo "default:x:$(id -u):0:default user:/home/airflow:/sbin/nologin" >> /etc/passwd
export HOME=/home/airflow
umask 0002
case "$1" in bash|python|airflow) exec "$@" ;; *) exec airflow "$@" ;; esac
"""
POSTGRES = """#!/bin/sh
# As postgres': makes the database at its first start, from the three variables, then runs as postgres.
set -e
cd /
PGDATA=/var/lib/postgresql/data
bin=$(ls -d /usr/lib/postgresql/*/bin)
mkdir -p /run/postgresql "$PGDATA" && chown -R postgres /run/postgresql "$PGDATA"
as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  printf '%s' "$POSTGRES_PASSWORD" > /tmp/password && chown postgres /tmp/password
  as "$bin/initdb" -D "$PGDATA" -U "$POSTGRES_USER" --pwfile /tmp/password --auth-local trust --auth-host scram-sha-256
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  as "$bin/pg_ctl" -D "$PGDATA" -w -o "-c listen_addresses=''" start
  [ "$POSTGRES_DB" = postgres ] || as "$bin/createdb" -U "$POSTGRES_USER" "$POSTGRES_DB"
  as "$bin/pg_ctl" -D "$PGDATA" -w -m fast stop
fi
# the image ends it with SIGINT, a fast shutdown
exec setpriv --reuid postgres --regid postgres --init-groups "$bin/postgres" -D "$PGDATA" -c listen_addresses='*'
"""


def provide(engine: Engine, repository: Path) -> str:
    """Pull the images that the files name, or import stand-ins; says which it was."""
    base = re.findall(r"^FROM (\S+)", (repository / "Dockerfile").read_text(), re.M)
    services = (repository / "docker-services.yaml").read_text()
    images = base + re.findall(r"^    image: (\S+:\S+)", services, re.M)
    try:
        for image in images:
            engine.docker("pull", "--quiet", image, timeout=600)
        return "the public images"
    except (RuntimeError, subprocess.TimeoutExpired):
        airflow, postgres, broker = images
    if not engine.docker("images", "--quiet", airflow):
        _import_airflow(engine, airflow)
    if not (
        engine.docker("images", "--quiet", postgres) and engine.docker("images", "--quiet", broker)
    ):
        _import_services(engine, postgres, broker)
    return "stand-ins from Debian's packages"


def _root(engine: Engine, suite: str, packages: str) -> Path:
    """A Debian with some packages, which trusts the certificates that this machine trusts."""
    root = engine.folder / suite
    shutil.rmtree(root, ignore_errors=True)
    include = f"--include=ca-certificates,{packages}"
    call(
        ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", include, suite, root, MIRROR]
    )
    shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    return root


def _import(engine: Engine, root: Path, image: str, lines: list[str]) -> None:
    """An image of a root, and of the lines that its Dockerfile would have."""
    archive = engine.folder / "root.tar"
    call(["tar", "-C", root, "-cf", archive, "."])
    engine.docker("import", archive, "fast-cpt-root:local")
    archive.unlink()
    context = engine.folder / "context"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text("\n".join(["FROM fast-cpt-root:local", *lines]) + "\n")
    engine.docker("build", "--quiet", "--tag", image, context)


def _entrypoint(root: Path, text: str) -> None:
    (root / "entrypoint").write_text(text)
    (root / "entrypoint").chmod(0o755)


def _import_airflow(engine: Engine, image: str) -> None:
    root = _root(engine, "bookworm", "python3,python3-pip")
    (root / "usr/bin/python").symlink_to("python3")
    call(["chroot", root, "useradd", "--uid", "50000", "--gid", "0", "--create-home", "airflow"])
    call(["chroot", root, "chmod", "g+w", "/etc/passwd"])
    call(
        [
            "chroot",
            root,
            "sh",
            "-c",
            "mkdir -p /opt/airflow/logs && chmod -R g=u /opt/airflow /home/airflow",
        ]
    )
    call(["chroot", root, "chown", "-R", "airflow:root", "/opt/airflow"])
    _entrypoint(root, AIRFLOW)
    variables = {
        "PATH": "/home/airflow/.local/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "AIRFLOW_HOME": "/opt/airflow",
        "PYTHONUSERBASE": "/home/airflow/.local",
        "PIP_USER": "true",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "SSL_CERT_FILE": str(CERTIFICATES),
    }
    lines = [f"ENV {name}={value}" for name, value in variables.items()]
    lines += ["USER airflow", "WORKDIR /opt/airflow", 'ENTRYPOINT ["/entrypoint"]']
    _import(engine, root, image, lines)
    shutil.rmtree(root)


def _import_services(engine: Engine, postgres: str, broker: str) -> None:
    root = _root(engine, "trixie", "postgresql,valkey-server,valkey-tools")
    _entrypoint(root, POSTGRES)
    (path,) = (root / "usr/lib/postgresql").glob("*/bin")
    inside = f"/{path.relative_to(root)}"
    environment = f"ENV PATH={inside}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    started = ["VOLUME /var/lib/postgresql/data", "STOPSIGNAL SIGINT", 'ENTRYPOINT ["/entrypoint"]']
    _import(engine, root, postgres, [environment, *started, 'CMD ["postgres"]'])
    _import(engine, root, broker, ["WORKDIR /tmp"])
    shutil.rmtree(root)
