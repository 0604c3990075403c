"""Rented machines under randomly timed faults: is one left behind, overspent, rented twice; what is lost?

    .env/airflow/bin/python benchmarks/orphans.py --faults 200 --airflow 20 --work FOLDER

Each fault has a run, a ledger and a provider of its own (``tests/provider.py``: real SSH servers with their own
processes, billed by the second), and hits at a moment drawn from its seed. Its run is ``orphans_run.py``: a
process that does with the product's functions what the DAG does (rent, check, watch, train, bring
checkpoints, give back) and is started again when it was killed, as a retry is. The training counts, and saves
as the trainer does. ``look_after`` is the product's, asked every ``LOOK_S`` for the three minutes of a real one.
``--airflow`` of the faults hit real runs of the sample in a real Airflow (``orphans_airflow.py``); they come
first. A fault that came when its run was over does not count, and another takes its place.
The last line is one JSON object; exit code 1 where a figure is not what docs/rent.md promises.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / name) for name in ("include", "plugins", "tests", "benchmarks")]

from orphans_run import (  # noqa: E402
    BRING_S,
    SAVE_STEPS,
    STEPS,
    TRAINER,
    Run,
    quick,
)

import provider  # noqa: E402
from fastcpt.cluster import checkpoints  # noqa: E402
from fastcpt.files import read_json, write_json  # noqa: E402
from fastcpt.rent import ledger, machines  # noqa: E402

PROGRAM = Path(__file__).with_name("orphans_run.py")
# A run without a fault takes so long here (measured first): moments and money are parts of it.
ENOUGH, LITTLE = (8.0, 8.0), (0.4, 0.9)
LOOK_S = 8.0
ASLEEP_S, LIMIT_S = 120.0, 600.0
# What may be overspent: this share of the money, or so many seconds' worth.
SLACK = 0.02, 5.0


# The faults


@dataclass
class Fault:
    """What goes wrong: answers of the provider in a row, something done at a moment of ``when``, and who is
    there afterwards: the run's next try, nobody of it (``deleted``), or nobody at all for a while (``asleep``).

    ``when`` and ``money`` (what so long costs) count in the length of a run without a fault.
    """

    answers: dict[str, list[str]] | None = None
    act: str = ""
    when: tuple[float, float] = (0.0, 1.0)
    then: str = "retry"
    money: tuple[float, float] = ENOUGH


def faults_of(rng: random.Random) -> dict[str, Fault]:
    times = rng.randint(1, 3)
    return {
        "no capacity": Fault({"acquire": ["no capacity"] * times}),
        "late": Fault({"acquire": ["late"]}),
        "late, who asked is killed": Fault({"acquire": ["late"]}, "kill run", (0.0, 0.4)),
        "late, who asked is killed, run deleted": Fault(
            {"acquire": ["late"]}, "kill run", (0.0, 0.4), "deleted"
        ),
        "half started": Fault({"acquire": ["half started"]}),
        "twice": Fault({"acquire": ["twice"]}),
        "its command is killed": Fault({"acquire": ["killed"] * times}),
        "another host key": Fault({"acquire": ["another key"]}),
        "no answer of its kind": Fault({"acquire": ["garbage"]}),
        "taken away": Fault(act="take away"),
        "lies about the release": Fault({"release": ["lies"] * times}),
        "API down": Fault(act="API down"),
        "run killed": Fault(act="kill run"),
        "run killed and deleted": Fault(act="kill run", then="deleted"),
        "run killed, nobody awake": Fault(act="kill run", then="asleep"),
        "sshd killed": Fault(act="kill sshd"),
        "sshd killed, nobody awake": Fault(act="kill sshd and run", then="asleep"),
        "supervisor killed": Fault(act="kill supervisor"),
        "training killed": Fault(act="kill job"),
        "money spent": Fault(money=LITTLE),
        "money spent, nobody awake": Fault(
            act="kill run", when=(0.4, 0.8), then="asleep", money=LITTLE
        ),
    }


def act(run: Run, what: str, process: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Do it; what was hit, for the notes; empty where that is not there yet."""
    if what == "API down":
        (run.provider / "down").touch()
        time.sleep(rng.uniform(1.0, 8.0))
        (run.provider / "down").unlink()
        return "the service was down"
    found = provider.machines(run.provider, running=True)
    if not found and what != "kill run":
        return ""
    if "run" in what:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if what == "kill run":
        return what
    machine = found[-1]
    if what == "take away":
        provider.end(run.provider, machine["id"])
    elif "sshd" in what:
        for pid in provider.processes(machine):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sshd"):
                    os.kill(pid, signal.SIGKILL)
    else:
        status = Path(machine["place"]) / "home/fast_cpt/jobs/train/status.json"
        facts = read_json(status) if status.exists() else {}
        pid = facts.get("supervisor" if "supervisor" in what else "pid")
        if not pid or facts["state"] != "running":
            return ""
        with suppress(ProcessLookupError):
            (os.kill if "supervisor" in what else os.killpg)(pid, signal.SIGKILL)
    return f"{what} of {machine['id']}"


def start_run(run: Run) -> subprocess.Popen[bytes]:
    with (run.folder / "log").open("ab") as log:
        words = [sys.executable, str(PROGRAM), str(run.folder)]
        env = {**os.environ, "FASTCPT_HOME": str(run.home)}
        return subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)


def one_of_all(number: int, seed: int, work: Path, length: float) -> dict[str, Any]:
    rng = random.Random(seed)
    kinds = faults_of(rng)
    kind = list(kinds)[number % len(kinds)]
    return {"kind": kind, "seed": seed, **trial(work / f"run-{number}", kinds[kind], rng, length)}


def trial(folder: Path, fault: Fault, rng: random.Random, length: float) -> dict[str, Any]:
    """One fault, from the run's beginning to the moment when nothing of it is left, or ``LIMIT_S`` over."""
    folder.mkdir(parents=True)
    (folder / "trainer.py").write_text(TRAINER)
    money = rng.uniform(*fault.money) * length * provider.PRICE / 3600
    write_json(folder / "facts.json", {"money": round(money, 4)})
    run = Run(folder)
    provider.create(run.provider)
    if fault.answers:
        provider.fail(run.provider, **fault.answers)
    process, hit, awake_at, look_at = start_run(run), "", 0.0, 0.0
    hit_time = math.inf
    while not (folder / "begun").exists():
        time.sleep(0.05)
    began = time.monotonic()
    hit_at = began + rng.uniform(*fault.when) * length if fault.act else None
    try:
        while time.monotonic() - began < LIMIT_S:
            time.sleep(0.4)
            now = time.monotonic()
            if hit_at is not None and now >= hit_at:
                began_at = time.time()
                hit = act(run, fault.act, process, rng)
                hit_at = None if hit else now + 0.5
                hit_time = began_at if hit else math.inf
                awake_at = time.monotonic() + ASLEEP_S if hit and fault.then == "asleep" else 0.0
            over = process.poll() == 0
            dead = not over and process.poll() is not None
            if now < awake_at and provider.machines(run.provider, running=True):
                continue
            if dead and fault.then == "retry":
                process = start_run(run)
            ended = over or (dead and fault.then != "retry")
            if now >= look_at or (ended and now >= look_at - LOOK_S + 1.5):
                look_at = now + LOOK_S
                for news in machines.look_after(run.home, lambda dag, name, ended=ended: not ended):
                    _say(run, f"{news.what}: {news.reason}")
            if ended and not _left(run) and not ledger.not_released(run.home):
                break
        seconds, wanted = time.monotonic() - began, fault.then != "deleted"
        missed = bool(fault.act) and not hit
        return {"missed": missed, **judge(run, hit, seconds), **lost(run, hit_time, wanted)}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for machine in provider.machines(run.provider):
            provider.end(run.provider, machine["id"])


def _say(run: Run, line: str) -> None:
    with (run.folder / "log").open("a") as log:
        log.write(f"{time.time():.1f} {line}\n")


def _left(run: Run) -> list[str]:
    """Machines that still cost money, and those of which something runs although they ended."""
    found = provider.machines(run.provider)
    return [one["id"] for one in found if one["ended"] is None or provider.processes(one)]


def _stays(run: Run) -> list[str]:
    """What is left of them, and is still left after a while: a process may be in the middle of its end."""
    left = _left(run)
    time.sleep(3.0 if left else 0.0)
    return [one for one in _left(run) if one in left]


# The figures


def judge(run: Run, hit: str, seconds: float) -> dict[str, Any]:
    found, now = provider.machines(run.provider), time.time()
    money, bill = run.facts["money"], provider.bill(run.provider, now)
    spans = [(one["began"], one["ended"] or now) for one in found]
    together = [
        min(first[1], second[1]) - max(first[0], second[0])
        for number, first in enumerate(spans)
        for second in spans[number + 1 :]
    ]
    states = [rental.state for rental in run.rentals()]
    return {
        "hit": hit,
        "seconds": round(seconds, 1),
        "machines": len(found),
        "left": _stays(run),
        "not_released": sum(state != "released" for state in states),
        "money": money,
        "bill": round(bill, 4),
        "over_s": round(max(0.0, bill - money) / provider.PRICE * 3600, 2),
        "together_s": round(max([0.0, *together]), 2),
        "whole": whole(run),
        "trainings_at_once": len(run.step_of("twice")),
    }


def lost(run: Run, hit_time: float, wanted: bool) -> dict[str, float]:
    """What was trained when the fault came and has to be trained again, in intervals.

    ``lost_here``: after a restart on the same machine, in intervals of saving. ``lost_moved``: with a machine
    that is gone, in the interval of bringing; seconds since the step that the next machine begins with, or
    would begin with where nobody rents one (``wanted``: the run was not deleted).
    """
    starts, steps = run.step_of("start"), run.step_of("step")
    if wanted and starts and max((number for number, _, _ in steps), default=0) < STEPS:
        starts.append((step_here(run), time.time(), ""))
    own = moved = 0.0
    for (_, before, old), (step, at, new) in pairwise(starts):
        until = min(at, hit_time)
        again = [(number, when) for number, when, _ in steps if before <= when <= until]
        again = [one for one in again if one[0] > step]
        if not again:
            continue
        number, last = max(again)
        if old == new:
            own = max(own, (number - step) / SAVE_STEPS)
        else:
            known = [when for number, when, _ in steps if number == step and when <= until]
            moved = max(moved, last - max(known, default=before))
    lost_moved = round(moved / BRING_S, 3)
    return {"lost_here": round(own, 3), "lost_moved": lost_moved, "lost_moved_s": round(moved, 2)}


def step_here(run: Run) -> int:
    newest = checkpoints.newest_here(run.home / "checkpoints")
    return int(newest.name.removeprefix("step_")) if newest else 0


def whole(run: Run) -> bool:
    """Whether what was brought here is a whole checkpoint, or nothing."""
    newest = checkpoints.newest_here(run.home / "checkpoints")
    if newest is None:
        return True
    return not checkpoints.differing_files(newest, read_json(newest / checkpoints.FILES))


def fault_figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is promised, over all faults."""
    hit = [one for one in results if not one.get("missed")]
    twice = [one for one in results if one["kind"] == "twice"]
    others = [one for one in results if one["kind"] != "twice"]
    return {
        "faults": len(hit),
        "in_airflow": sum("Airflow" in one["kind"] for one in hit),
        "missed": len(results) - len(hit),
        "left_behind": sum(bool(one["left"]) for one in results),
        "not_released": sum(one["not_released"] for one in results),
        "over_s": max(one["over_s"] for one in results),
        "overspent": sum(
            one["bill"]
            > max(one["money"] * (1 + SLACK[0]), one["money"] + SLACK[1] * provider.PRICE / 3600)
            for one in results
        ),
        "two_where_one_was_asked_for": sum(one["together_s"] > 0 for one in others),
        "second_of_two_s": max([0.0, *(one["together_s"] for one in twice)]),
        "took_trained_work": sum(one["lost_moved"] > 0 for one in results),
        "lost_moved_s": max(one["lost_moved_s"] for one in results),
        "lost_moved_intervals": max(one["lost_moved"] for one in results),
        "lost_here_intervals": max(one["lost_here"] for one in results),
        "not_whole": sum(not one["whole"] for one in results),
        "trainings_at_once": sum(one["trainings_at_once"] for one in results),
        "did_not_go_on": [one["wrong"] for one in results if one.get("wrong")],
    }


def failed(found: dict[str, Any]) -> list[str]:
    none = ("left_behind", "not_released", "overspent", "two_where_one_was_asked_for", "not_whole")
    wrong = [name for name in (*none, "trainings_at_once", "did_not_go_on") if found[name]]
    return wrong + [name for name in found if name.endswith("_intervals") and found[name] > 1]


def fault_table(results: list[dict[str, Any]]) -> str:
    """A row a kind of fault: how many, and the worst of each figure."""
    rows = [
        "| fault | runs | machines | left | over (s) | two at once (s) | lost here, moved (intervals) |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(one["kind"] for one in results):
        of = [one for one in results if one["kind"] == kind]
        worst = {
            name: max(one[name] for one in of)
            for name in ("over_s", "together_s", "lost_here", "lost_moved")
        }
        left, rented = sum(len(one["left"]) for one in of), sum(one["machines"] for one in of)
        rows.append(
            f"| {kind} | {len(of)} | {rented} | {left} | {worst['over_s']:g} | {worst['together_s']:g} | "
            f"{worst['lost_here']:g}, {worst['lost_moved']:g} |"
        )
    return "\n".join(rows)


def quiet(work: Path, beside: int) -> float:
    """Seconds that a run without a fault takes here, beside as many others."""
    with ThreadPoolExecutor(beside) as pool:
        folders = [work / f"quiet-{number}" for number in range(beside)]
        runs = pool.map(lambda folder: trial(folder, Fault(), random.Random(0), 600.0), folders)
        found = [one["seconds"] for one in runs]
    print(f"a run without a fault takes {min(found):.0f} to {max(found):.0f} s here", flush=True)
    return float(sum(found) / len(found))


def until_hit(
    one: Callable[[int], dict[str, Any]], wanted: int, beside: int, until: float
) -> list[dict[str, Any]]:
    """Results of faults, ``beside`` at a time, until so many have hit; after ``until`` none begins."""
    results: list[dict[str, Any]] = []
    numbers, lock = itertools.count(), threading.Lock()
    going_on = 0

    def go_on(_: int) -> None:
        nonlocal going_on
        while time.monotonic() < until:
            with lock:
                if sum(not one["missed"] for one in results) + going_on >= wanted:
                    return
                going_on += 1
                number = next(numbers)
            result = one(number)
            with lock:
                going_on -= 1
                results.append(result)
                print(json.dumps(result), flush=True)

    with ThreadPoolExecutor(beside) as pool:
        list(pool.map(go_on, range(beside)))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--airflow", type=int, default=20, help="so many of them in a real Airflow")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", type=int, default=4, help="runs beside one another")
    parser.add_argument("--minutes", type=float, default=85, help="later no fault begins")
    parser.add_argument("--work", type=Path, help="kept; a folder of its own otherwise")
    given = parser.parse_args()
    quick()
    work, began = given.work or Path(tempfile.mkdtemp(prefix="orphans-")), time.monotonic()
    results: list[dict[str, Any]] = []
    if given.airflow:
        from orphans_airflow import trials

        results += trials(given.airflow, given.seed * 100_000 + 50_000, work)
    wanted, until = given.faults - given.airflow, began + given.minutes * 60
    if wanted > 0:
        length = quiet(work, given.beside)

        def one(number: int) -> dict[str, Any]:
            return one_of_all(number, given.seed * 100_000 + number, work, length)

        results += until_hit(one, wanted, given.beside, until)
    found = fault_figures(results)
    found |= {"seed": given.seed, "minutes": round((time.monotonic() - began) / 60, 1)}
    print(fault_table(results))
    wrong = failed(found)
    print(f"not as promised: {', '.join(wrong)}" if wrong else "as promised")
    print(json.dumps(found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
