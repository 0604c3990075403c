"""How much slower a training is while its checkpoints are brought to another machine.

    .env/airflow/bin/python benchmarks/bringing_slowdown.py [--interval 60] [--windows 3]

The real trainer trains a small Llama on one core, and saves as always. In every second window of two intervals
the trigger's own rounds (``plugins/bringing.py``) fetch its newest checkpoint over SSH from an OpenSSH server on
the loopback, so that the copy is never older than the interval. Trainer, SSH server and receiver share this
machine's cores, so it is more than a GPU host's share. ``slowdown`` compares the steps per second of the
windows with and without; exit code 1 where it is over 3 %. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(REPOSITORY / name) for name in ("include", "include/scripts", "plugins", "benchmarks")
]

import local_sshd  # noqa: E402
import yaml  # noqa: E402
from same_results import Tree, make_corpus  # noqa: E402

import bringing  # noqa: E402
from fastcpt.cluster.remote import Remote  # noqa: E402
from fastcpt.corpus.sample import generate_sample  # noqa: E402

MOST_SLOWDOWN = 0.03
WARM_STEPS = 20  # the first steps are slower
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}


class Training:
    """The trainer as a process; ``steps`` has when each step was done."""

    def __init__(self, work: Path) -> None:
        tree = Tree(REPOSITORY, work)
        generate_sample(work / "documents", documents=120)
        recipe = write_recipe(work)
        corpus, _ = make_corpus(tree, recipe, work / "documents")
        base, self.folder = work / "base", work / "training"
        own = ("--config", recipe)
        tokenizer = ("--tokenizer", corpus / "tokenizer")
        tree.script("cluster", "initialise_model.py", *own, *tokenizer, "--output_dir", base)
        options = {
            "--deepspeed": REPOSITORY / "include/configs/ds_config_zero3.json",
            "--data_dir": corpus,
            "--output_dir": self.folder,
            "--stage": "stage1",
            "--model": base,
        }
        words = [str(word) for pair in options.items() for word in pair]
        self.command = [str(REPOSITORY / "include/scripts/train_cpt.py"), *map(str, own), *words]
        self.steps: list[float] = []

    def start(self) -> None:
        programs = REPOSITORY / ".env/cluster/bin"
        self.process = subprocess.Popen(
            [programs / "deepspeed", "--num_gpus", "1", "--master_port", "29871", *self.command],
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY / "include"),
                **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if re.match(r"step \d+/", line):
                self.steps.append(time.monotonic())

    def rate(self, begin: float, end: float) -> float:
        """Steps per second between the first and the last step of a window."""
        done = [moment for moment in self.steps if begin <= moment <= end]
        return (len(done) - 1) / (done[-1] - done[0])

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def write_recipe(work: Path) -> Path:
    recipe: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / "include/configs/sample.yaml").read_text()
    )
    recipe["documents"] = {"path": str(work / "documents/parsed")}
    recipe["sft"]["instructions"] = str(work / "documents/instructions.jsonl")
    recipe["model"]["config"] |= SHAPE
    recipe["cluster"]["gpus"] = 1
    steps = {"max_steps": 1_000_000, "logging_steps": 1, "save_steps": 20}
    recipe["training"] |= {**steps, "per_device_train_batch_size": 1}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return work / "recipe.yaml"


class Told:
    """What the rounds log: bytes (10^9) and seconds of each, and what went wrong."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float]] = []
        self.warnings: list[str] = []

    def info(self, _: str, step: int, home: str, size: float, seconds: float) -> None:
        self.rounds.append((size, seconds))

    def warning(self, line: str, *values: object) -> None:
        self.warnings.append(line % values)


async def windows(
    training: Training, rounds: bringing.Bringing, remote: Remote, seconds: float, count: int
) -> dict[str, list[float]]:
    """Steps per second of each window, without and with rounds in turn."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(2 * count):
        name, begin = ("without", "with")[number % 2], time.monotonic()
        while time.monotonic() < begin + seconds:
            if name == "with":
                rounds.look(remote)
            await asyncio.sleep(2.0)  # as the trigger asks
        rates[name].append(round(training.rate(begin, time.monotonic()), 3))
        print(f"{name}: {rates[name][-1]} steps/s", flush=True)
        # a round that has begun ends before the next window
        if rounds.round:
            await rounds.round
    return rates


def wait_until_warm(training: Training) -> None:
    until = time.monotonic() + 600
    while len(training.steps) < WARM_STEPS:
        if training.process.poll() is not None or time.monotonic() > until:
            sys.exit("the training did not begin:\n" + "".join(training.said[-20:]))
        time.sleep(1.0)


async def measure(
    training: Training, remote: Remote, work: Path, given: argparse.Namespace
) -> dict[str, Any]:
    told, home = Told(), str(work / "brought")
    wanted = bringing.Bring("loopback", str(training.folder), home, given.interval / 60)
    rounds = bringing.Bringing(wanted, told, asyncio.get_running_loop().time)
    rates = await windows(training, rounds, remote, 2 * given.interval, given.windows)
    if told.warnings or not told.rounds:
        sys.exit(f"nothing was brought, or not all: {told.warnings}")
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    return {
        "slowdown": round(1 - means["with"] / means["without"], 4),
        "steps_per_s": rates,
        "rounds": len(told.rounds),
        "rounds_an_interval": round(len(told.rounds) / (2 * given.windows), 2),
        "megabytes": round(1000 * max(size for size, _ in told.rounds), 1),
        "transfer_s": round(sum(seconds for _, seconds in told.rounds) / len(told.rounds), 1),
        "interval_s": given.interval,
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interval", type=float, default=60.0, help="seconds")
    parser.add_argument("--windows", type=int, default=3, help="of each kind")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fast_cpt-bringing-") as folder:
        work = Path(folder)
        bringing.HOME = work / "home"
        training, server = Training(work), local_sshd.start_server(work / "sshd")
        training.start()
        try:
            wait_until_warm(training)
            names = ("host", "user", "port", "key_file", "known_hosts")
            remote = Remote(*(server[name] for name in names))
            found = asyncio.run(measure(training, remote, work, given))
        finally:
            training.end()
            os.killpg(server["pid"], signal.SIGTERM)
    print(json.dumps(found))
    return 1 if found["slowdown"] > MOST_SLOWDOWN else 0


if __name__ == "__main__":
    sys.exit(main())
