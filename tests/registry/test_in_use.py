"""A policy removes what nothing needs, in a tangle of models, runs and what they were made from."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fastcpt.files import write_json
from fastcpt.registry.in_use import InUseError, Policy, unused

DAY = 86_400.0
NOW = time.time()


def moment(days_ago: float) -> str:
    return datetime.fromtimestamp(NOW - days_ago * DAY, UTC).isoformat(timespec="seconds")


def aged(home: Path, name: str, days_ago: float) -> None:
    for path in [*(home / name).rglob("*"), home / name]:
        os.utime(path, (NOW - days_ago * DAY,) * 2)


def run(home: Path, name: str, corpus: str, days_ago: float, **facts: Any) -> None:
    """A record, the corpus it names, and what that was made from."""
    record = home / "runs" / name
    ended = {"ended": moment(days_ago), "state": "success"}
    write_json(record / "run.json", {"run": name, "started": moment(days_ago), **ended, **facts})
    write_json(record / "outputs" / "build.json", {"path": f"/moved/corpora/{corpus}"})
    aged(home, f"runs/{name}", days_ago)


def corpus(home: Path, name: str, selection: str, *scores: str, days_ago: float) -> None:
    write_json(home / "corpora" / name / "corpus_manifest.json", {"selection": selection})
    parts = [{"digest": score} for score in scores]
    write_json(home / "selections" / selection / "manifest.json", {"parts": parts})
    for kind, names in (("corpora", [name]), ("selections", [selection]), ("scores", scores)):
        for one in names:
            (home / kind / one).mkdir(parents=True, exist_ok=True)
            aged(home, f"{kind}/{one}", days_ago)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Six models of a recipe, law-4 the champion and law-2 before it, all 40 days old or more.

    What c2 and c3 were selected from is one selection; the scores "all" are of every selection.
    """
    selections = {"1": "s1", "2": "s23", "3": "s23", "4": "s4", "5": "s5", "6": "s6"}
    known = {}
    for number, selection in selections.items():
        days_ago = 100 - float(number) * 10
        corpus(tmp_path, f"c{number}", selection, "all", f"of-{selection}", days_ago=days_ago)
        run(tmp_path, f"r{number}", f"c{number}", days_ago)
        (tmp_path / "models" / f"law-{number}").mkdir(parents=True)
        aged(tmp_path, f"models/law-{number}", days_ago)
        (tmp_path / "before_sft" / f"t{number}").mkdir(parents=True)
        aged(tmp_path, f"before_sft/t{number}", days_ago)
        made_from = {"record": f"r{number}", "corpus": f"c{number}", "before_sft": f"t{number}"}
        known[f"law-{number}"] = made_from
    promoted = (("law-1", None), ("law-2", "law-1"), ("law-4", "law-2"))
    events = [{"what": "promoted", "model": one, "instead_of": of} for one, of in promoted]
    write_json(tmp_path / "models" / "law" / "models.json", {"models": known, "events": events})
    for name in (
        "ledger/c1",
        "models/law/comparison",
        "models/from-before-0",
        "tokens/t",
        "checkpoints/x",
    ):
        (tmp_path / name).mkdir(parents=True)
        aged(tmp_path, name, 90)
    return tmp_path


def gone(home: Path, days: float = 30.0, candidates: int | None = None) -> set[str]:
    return {str(path.relative_to(home)) for path in unused(home, Policy(days, candidates))}


def test_champion_predecessor_and_the_newest_candidate_keep_all_they_were_made_from(
    home: Path,
) -> None:
    assert gone(home, candidates=1) == {
        *("models/law-1", "models/law-3", "models/law-5"),
        *("runs/r1", "runs/r3", "runs/r5"),
        *("corpora/c1", "corpora/c3", "corpora/c5"),
        *("selections/s1", "selections/s5"),  # of c3 is that of c2, which stays
        *("scores/of-s1", "scores/of-s5"),
        *("before_sft/t1", "before_sft/t3", "before_sft/t5"),
        *("tokens/t", "checkpoints/x"),
    }
    assert gone(home, candidates=0) >= {"models/law-6", "runs/r6", "corpora/c6", "selections/s6"}
    # a corpus whose record is gone by hand is still the champion's
    for record in ("r2", "r4"):
        (home / "runs" / record / "outputs" / "build.json").unlink()
    assert gone(home, candidates=0).isdisjoint({"corpora/c2", "corpora/c4", "scores/of-s4"})


def test_without_candidates_models_and_records_stay(home: Path) -> None:
    assert gone(home) == {"tokens/t"}


def test_what_is_younger_stays(home: Path) -> None:
    assert gone(home, days=75, candidates=0) == {
        *("models/law-1", "runs/r1", "corpora/c1", "selections/s1", "scores/of-s1", "tokens/t"),
        *("checkpoints/x", "before_sft/t1"),
    }


def test_what_a_run_that_goes_on_may_use_stays(home: Path) -> None:
    # it began 65 days ago and waits for GPUs since: law-3 is older, law-5's corpus is younger
    run(home, "going-on", "c3", 65)
    facts = {"run": "going-on", "started": moment(65)}
    write_json(home / "runs" / "going-on" / "run.json", facts)
    found = gone(home, candidates=0)
    assert {"models/law-1", "corpora/c1", "models/law-3", "runs/r3"} <= found
    assert found.isdisjoint({"runs/going-on", "corpora/c3", "corpora/c5", "models/law-5"})


def test_the_last_success_of_a_schedule_stays(home: Path) -> None:
    for days_ago, state in ((60, "success"), (50, "success"), (45, "failed")):
        run(home, f"weekly__{days_ago}", "c1", days_ago, state=state)
    found = gone(home, candidates=0)
    assert {"runs/weekly__60", "runs/weekly__45"} <= found
    assert "runs/weekly__50" not in found
    assert "corpora/c1" not in found


def test_a_damaged_file_that_says_what_is_needed_keeps_everything(home: Path) -> None:
    (home / "runs" / "r1" / "run.json").write_text('{"run": ')
    with pytest.raises(InUseError, match=r"r1.run\.json cannot be read .*nothing is removed"):
        gone(home, candidates=0)
    write_json(home / "runs" / "r1" / "run.json", {"run": "r1"})
    with pytest.raises(InUseError, match="does not say when it began"):
        gone(home, candidates=0)
