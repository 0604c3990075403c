"""The faults of ``orphans.py`` that hit real runs of the sample, in a real Airflow on this machine.

Four runs go on beside one another, each on a machine of its own; Airflow's processes are theirs together.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

import provider
from e2e.renting import Renting, kill_and_start, renting
from fastcpt.cluster import checkpoints
from fastcpt.files import read_json

# What is done to a run. One that goes on is watched until it has a machine again, and is marked failed then.
KINDS = (
    "Airflow: run marked failed",
    "Airflow: run deleted",
    "Airflow: step marked failed",
    "Airflow: machine taken away",
    "Airflow: lies about the release",
    "Airflow: training killed",
    "Airflow: scheduler and tasks killed",
    "Airflow: triggerer killed",
    "Airflow: plan rejected",
    "Airflow: no capacity",
)
ENDS = ("run marked failed", "deleted", "step marked", "rejected")
HIT_TRAINING = ("taken away", "training killed")
BESIDE, LIMIT_S, MONEY = 4, 900.0, 50.0
# No training ends by itself.
STEPS, SAVE_STEPS, BRING_S = 50_000, 10, 90.0
SECTIONS: dict[str, dict[str, Any]] = {
    "checkpoints": {"bring_every_minutes": BRING_S / 60},
    "training": {"save_steps": SAVE_STEPS, "max_steps": STEPS, "logging_steps": 1},
    "budget": {"money": MONEY, "max_passes": 10_000},
}

# The figures of a fault that could not be made.
UNKNOWN: dict[str, Any] = {
    **{"missed": True, "hit": "", "machines": 0, "left": [], "not_released": 0, "whole": True},
    **{"money": MONEY, "bill": 0.0, "over_s": 0.0, "together_s": 0.0, "trainings_at_once": 0},
    **{"lost_here": 0.0, "lost_moved": 0.0, "lost_moved_s": 0.0},
}


def trials(count: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """So many faults, each of a kind in turn, at a moment drawn from its seed."""
    with renting(work / "airflow", **SECTIONS) as stack, ThreadPoolExecutor(BESIDE) as pool:
        return list(
            pool.map(lambda number: _one_of_all(stack, number, seed + number), range(count))
        )


def _one_of_all(stack: Renting, number: int, seed: int) -> dict[str, Any]:
    """A fault's result; one that could not be made does not end the others."""
    kind = KINDS[number % len(KINDS)]
    try:
        result = _trial(stack, number, kind, seed)
    except Exception as error:
        traceback.print_exc()
        result = {**UNKNOWN, "wrong": f"{type(error).__name__}: {error}"}
    result = {"kind": kind, "seed": seed, **result}
    print(json.dumps(result), flush=True)
    return result


def _trial(stack: Renting, number: int, kind: str, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    began = time.monotonic()
    if "no capacity" in kind:
        provider.fail(stack.provider, acquire=["no capacity"])
    # another number of steps each: none finds the model of another
    form = {**stack.form(), "perplexity_threshold": 90_000.0, "max_steps": STEPS + number}
    run = _asked(lambda: stack.api.trigger({**form, "require_approval": "rejected" in kind}))
    wrong = _until(lambda: _comes_to_its_fault(stack, run, kind), f"{run} has not begun to rent")
    begun, moment = time.time(), rng.uniform(0.0, 120.0 if kind.endswith(HIT_TRAINING) else 60.0)
    time.sleep(moment)
    trained = _training(stack, run, begun)
    hit = _asked(lambda: _act(stack, run, kind))
    if not any(word in kind for word in ENDS):
        wrong += _until(lambda: _goes_on(stack, run, kind), f"{run} has no machine again")
        time.sleep(rng.uniform(0.0, 20.0))
        _asked(lambda: stack.mark(run, "failed"))
    marked = time.monotonic()
    wrong += _until(lambda: not _left(stack, run), f"what is left of {run}")
    result = {"hit": f"{hit} after {moment:.0f} s", "wrong": wrong}
    result["gone_after_s"] = round(time.monotonic() - marked, 1)
    result |= _judge(stack, run, time.monotonic() - began)
    return result | _lost(stack, run, kind, trained)


def _asked(ask: Callable[[], Any]) -> Any:
    """Its answer; SQLite under several runs refuses now and then."""
    for _ in range(10):
        with suppress(httpx.HTTPError):
            return ask()
        time.sleep(5.0)
    return ask()


def _comes_to_its_fault(stack: Renting, run: str, kind: str) -> bool:
    """Whether the run is about to rent, or trains, where that is what is hit; its moment counts from then."""
    if kind.endswith(HIT_TRAINING):
        return bool(_tries(stack, run))
    if "rejected" in kind:
        return bool(stack.look(run).states().get("approve_plan") == "awaiting_input")
    ready = ("running", "success", "up_for_retry")
    return stack.look(run).states().get("acquire_cluster") in ready


def _goes_on(stack: Renting, run: str, kind: str) -> bool:
    """Whether the run has the machine that it should have by now."""
    held = [one.state for one in stack.rentals(run)]
    if kind.endswith(HIT_TRAINING):
        return held[-1] == "held" and len(_tries(stack, run)) == 2
    tried = stack.look(run).task("train_cpt")
    return held == ["held"] and tried["state"] in ("running", "deferred")


def _act(stack: Renting, run: str, kind: str) -> str:
    if "run marked" in kind:
        stack.mark(run, "failed")
    elif "deleted" in kind:
        stack.delete(run)
    elif "step marked" in kind:
        path = f"/api/v2/dags/fast_cpt/dagRuns/{run}/taskInstances/train_cpt"
        stack.api.client.patch(path, json={"new_state": "failed"}).raise_for_status()
    elif "rejected" in kind:
        stack.answer(run, "Reject")
    elif "lies" in kind:
        provider.fail(stack.provider, release=["lies"])
    elif "scheduler" in kind or "triggerer" in kind:
        kill_and_start(stack, "scheduler" if "scheduler" in kind else "triggerer")
    elif "taken away" in kind or "training killed" in kind:
        return _hit_machine(stack, run, kind)
    return kind.partition(": ")[2]


def _hit_machine(stack: Renting, run: str, kind: str) -> str:
    """The run's machine, or the training on it."""
    (machine,) = stack.machines(run)
    if "taken away" in kind:
        provider.end(stack.provider, machine["id"])
        return f"{machine['id']} taken away"
    (status,) = Path(machine["place"]).glob("home/fast_cpt/jobs/*-train_cpt-*/status.json")
    os.killpg(read_json(status)["pid"], signal.SIGKILL)
    return f"training on {machine['id']} killed"


def _outcome(stack: Renting, run: str) -> str:
    try:
        return str(stack.api.get(f"dagRuns/{run}")["state"])
    except httpx.HTTPStatusError as error:
        return "gone" if error.response.status_code == 404 else "unknown"
    except httpx.HTTPError:
        return "unknown"


def _left(stack: Renting, run: str) -> list[str]:
    found = stack.machines(run)
    left = [one["id"] for one in found if one["ended"] is None or provider.processes(one)]
    return left + [one.key for one in stack.rentals(run) if one.state != "released"]


def _until(holds: Callable[[], object], what: str) -> str:
    """Wait for it; what did not come to be within ``LIMIT_S``."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if holds():
                return ""
        time.sleep(1.0)
    return what


def _judge(stack: Renting, run: str, seconds: float) -> dict[str, Any]:
    found, now = stack.machines(run), time.time()
    spans = [(one["began"], one["ended"] or now) for one in found]
    bill = provider.cost(found, now)
    together = [
        min(first[1], second[1]) - max(first[0], second[0])
        for number, first in enumerate(spans)
        for second in spans[number + 1 :]
    ]
    return {
        "seconds": round(seconds, 1),
        "ended": _outcome(stack, run),
        "machines": len(found),
        "left": _left(stack, run),
        "not_released": sum(one.state != "released" for one in stack.rentals(run)),
        "money": MONEY,
        "bill": round(bill, 4),
        "over_s": round(max(0.0, bill - MONEY) / provider.PRICE * 3600, 2),
        "together_s": round(max([0.0, *together]), 2),
        "missed": False,
        "whole": True,
        "trainings_at_once": 0,
    }


def _training(stack: Renting, run: str, begun: float) -> float:
    """Seconds of training that are not here yet: since the newest checkpoint here was saved, or it ``begun``."""
    places = [Path(machine["place"]) for machine in stack.machines(run)]
    names = [folder.name for place in places for folder in place.glob("home/fast_cpt/models/*")]
    newest = [checkpoints.newest_here(stack.home / "checkpoints" / name) for name in names]
    files = [file for one in newest if one for file in one.glob("checkpoints/*/rank_*.pt")]
    return time.time() - min([file.stat().st_mtime for file in files], default=begun)


def _lost(stack: Renting, run: str, kind: str, trained: float) -> dict[str, float]:
    """As ``orphans.lost``: ``trained`` seconds were not here when the machine was taken away."""
    tries = _tries(stack, run)
    again = max([0, *(old[-1] + 1 - new[0] for old, new in pairwise(tries))])
    moved = trained if "taken away" in kind else 0.0
    return {
        "lost_steps": again,
        "lost_here": round(again / SAVE_STEPS, 3) if "training killed" in kind else 0.0,
        "lost_moved": round(moved / BRING_S, 3),
        "lost_moved_s": round(moved, 2),
    }


def _tries(stack: Renting, run: str) -> list[list[int]]:
    """The steps that the log of each try of train_cpt has, on one machine after the other."""
    logs: list[Path] = []
    for machine in stack.machines(run):
        folder = Path(machine["place"]) / "home/fast_cpt/jobs"
        logs += [*folder.glob("*-train_cpt-*/job.log.1"), *folder.glob("*-train_cpt-*/job.log")]
    found = [re.findall(r"^step (\d+)", log.read_text(), re.MULTILINE) for log in logs]
    return [[int(step) for step in steps] for steps in found if steps]
