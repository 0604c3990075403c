"""A Docker engine for a test: the machine's if one runs, otherwise one that is started and ended here.

An engine of its own needs root and a Debian. Its data lies in a folder of the test; it is ended by
its process id, and the kernel's network rules are then what they were before it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
SOURCES = (
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian"
)


def call(command: Sequence[str | Path], **options: object) -> str:
    """What a command prints; ``RuntimeError`` with the end of its output where it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(str(word) for word in command)}: {done.returncode}\n{said}")
    return str(done.stdout)


def answers(environment: Mapping[str, str]) -> bool:
    """Whether ``docker`` is here and finds an engine."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], env=environment, capture_output=True).returncode == 0


class Engine:
    """A Docker engine; ``environment`` makes ``docker`` talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = dict(os.environ)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.own = not answers(self.environment)

    def start(self) -> None:
        """Start the daemon where it is this test's own; returns when it answers."""
        if not self.own:
            return
        self.environment["DOCKER_HOST"] = f"unix://{self.folder}/docker.sock"
        command = ["dockerd", "--host", self.environment["DOCKER_HOST"]]
        for option, name in {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}.items():
            command += [f"--{option}", str(self.folder / name)]
        with (self.folder / "dockerd.log").open("ab") as log:
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 120
        while not answers(self.environment):
            if time.monotonic() > until or self.daemon.poll() is not None:
                log_end = (self.folder / "dockerd.log").read_text()[-2000:]
                raise RuntimeError(f"dockerd did not start:\n{log_end}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End the daemon, and with it its containers: as a shutdown of the machine does."""
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait(180)

    def docker(self, *words: str | Path, timeout: float | None = None) -> str:
        return call(["docker", *words], env=self.environment, timeout=timeout)


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """An engine with Compose; what was started for it is ended, its network rules taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    if not answers(os.environ):
        # on a machine with systemd this starts one
        _install(["docker.io", "iptables", "mmdebstrap"])
    one = Engine(folder)
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        one.environment["DOCKER_CONFIG"] = str(_plugins(folder))
    forwarding = FORWARDING.read_text()
    rules = call(["iptables-save"]) if one.own else ""
    try:
        one.start()
        yield one
    finally:
        one.stop()
        if one.own:
            _restore_network(rules, forwarding)


def _install(packages: Sequence[str]) -> None:
    found = subprocess.run(["dpkg", "-s", *packages], capture_output=True).returncode == 0
    if not found:
        if os.getuid() != 0 or shutil.which("apt-get") is None:
            raise RuntimeError("no Docker engine runs, and starting one here needs root on Debian")
        call(["apt-get", "-qq", "update"])
        options = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        call(["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages], env=options)


def _plugins(folder: Path) -> Path:
    """Compose and buildx of Debian 13, unpacked: Debian 12 has neither in version 2."""
    plugins = folder / "config" / "cli-plugins"
    if not plugins.is_dir():
        apt = folder / "apt"
        for part in ("lists/partial", "cache/archives/partial", "root"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        (apt / "sources.list").write_text(f"{SOURCES} trixie main\n")
        places = {"Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "-"}
        places |= {"Dir::State::lists": apt / "lists", "Dir::Cache": apt / "cache"}
        options = [word for pair in places.items() for word in ("-o", f"{pair[0]}={pair[1]}")]
        options += ["-qq", "-o", "APT::Sandbox::User=root"]
        call(["apt-get", *options, "update"], cwd=apt)
        call(["apt-get", *options, "download", "docker-compose", "docker-buildx"], cwd=apt)
        for package in apt.glob("*.deb"):
            call(["dpkg-deb", "-x", package, apt / "root"])
        plugins.parent.mkdir(parents=True, exist_ok=True)
        (found,) = (apt / "root").glob("usr/*/docker/cli-plugins")
        found.rename(plugins)
    return plugins.parent


def _restore_network(rules: str, forwarding: str) -> None:
    """The bridges deleted, the packet filter and forwarding as they were."""
    for line in call(["ip", "-o", "link", "show", "type", "bridge"]).splitlines():
        name = line.split(": ")[1]
        if name == "docker0" or name.startswith("br-"):
            call(["ip", "link", "delete", name])
    for table in ("nat", "filter"):
        call(["iptables", "-t", table, "-F"])
        call(["iptables", "-t", table, "-X"])
    call(["iptables", "-P", "FORWARD", "ACCEPT"])
    subprocess.run(["iptables-restore"], input=rules, text=True, check=True)
    FORWARDING.write_text(forwarding)
