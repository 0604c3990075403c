"""One fixed path for the champion, whatever happens and whoever changes it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastcpt.files import read_json, write_json
from fastcpt.held_out import comparison
from fastcpt.registry.champion import (
    RegistryError,
    add_model,
    champion,
    evaluation_of,
    events,
    predecessor,
    promote,
    retire,
    rollback,
    take_untold,
    untold,
)
from registry.conftest import GOOD

SCRIPT = Path(__file__).parents[2] / "include" / "scripts" / "champion.py"
BAD = {**GOOD, "value": -0.1, "met": False}


def add(home: Path, name: str, against: str | None, *conditions: dict[str, Any]) -> str:
    model = home / "models" / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "name").write_text(name)
    decision = {
        "recommended": all(one["met"] for one in conditions),
        "against": against,
        "conditions": list(conditions),
    }
    facts = {"run": f"run-{name}", "record": name, "path": str(model), "training": name}
    return add_model(
        home, "law", name, {**facts, "corpus": "c", "decision": decision}, {"of": name}
    )


def served(home: Path) -> str:
    """What a server that knows the fixed name alone would load."""
    return (home / "models" / "law" / "champion" / "name").read_text()


def test_better_models_take_the_place_and_others_are_kept_with_the_reason(home: Path) -> None:
    assert add(home, "law-1", None, BAD).startswith("law-1 kept as a candidate: missed: bits")
    assert champion(home, "law") is None
    assert not comparison(home, "law").exists()
    assert add(home, "law-2", None, GOOD) == "law-2 promoted: it meets all 1 conditions"
    assert served(home) == "law-2"
    assert comparison(home, "law").is_dir()
    assert "instead of law-2" in add(home, "law-3", "law-2", GOOD)
    assert served(home) == "law-3"
    assert "missed" in add(home, "law-4", "law-3", GOOD, BAD)
    # it was compared with one that is the champion no more
    assert "the champion changed since" in add(home, "law-5", "law-2", GOOD)
    assert served(home) == "law-3"
    assert evaluation_of(home, "law", "law-4") == {"of": "law-4"}
    # a task that is tried again changes nothing
    before = events(home, "law")
    assert add(home, "law-3", "law-2", GOOD) == "law-3 is known: the champion"
    assert events(home, "law") == before
    shown = read_json(home / "models" / "law" / "champion.json")
    assert (shown["model"], shown["run"], shown["who"]) == ("law-3", "run-law-3", "fast_cpt")


def test_promote_and_rollback_by_hand_are_noted(home: Path) -> None:
    for name, against in (("law-1", None), ("law-2", "law-1"), ("law-3", "law-2")):
        add(home, name, against, GOOD)
    assert predecessor(home, "law") == "law-2"
    assert rollback(home, "law", "ann", "wrong dates") == (
        "law-2 rolled back (instead of law-3): wrong dates"
    )
    assert served(home) == "law-2"
    rollback(home, "law", "ann", "older still")
    assert served(home) == "law-1"
    with pytest.raises(RegistryError, match="no champion before"):
        rollback(home, "law", "ann", "and again")
    promote(home, "law", "law-3", "bob", "it was right")
    assert served(home) == "law-3"
    assert predecessor(home, "law") == "law-1"
    last = events(home, "law")[-1]
    assert (last["who"], last["why"], last["instead_of"]) == ("bob", "it was right", "law-1")
    with pytest.raises(RegistryError, match="known: law-1, law-2, law-3"):
        promote(home, "law", "law-9", "bob", "a slip")
    retire(home, "law", "bob", "another tokenizer")
    assert not (home / "models" / "law" / "champion").exists()
    assert not comparison(home, "law").exists()
    with pytest.raises(RegistryError, match="has no champion"):
        retire(home, "law", "bob", "again")


def test_a_model_that_is_gone_is_not_promoted(home: Path) -> None:
    add(home, "law-1", None, GOOD)
    add(home, "law-2", "law-1", BAD)
    (home / "models" / "law-2" / "name").unlink()
    (home / "models" / "law-2").rmdir()
    with pytest.raises(RegistryError, match=r"law-2 is gone: publish it again \(run run-law-2\)"):
        promote(home, "law", "law-2", "ann", "why not")
    assert served(home) == "law-1"


def test_the_place_is_never_empty_while_it_changes(home: Path) -> None:
    names = [f"law-{n}" for n in range(12)]
    add(home, names[0], None, GOOD)
    for name in names[1:]:
        add(home, name, None, BAD)
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(promote, home, "law", name, "ann", "x") for name in names[1:]]
        while not all(one.done() for one in done):
            assert served(home) in names
    assert len([event for event in events(home, "law") if event["what"] == "promoted"]) == 12
    assert served(home) == champion(home, "law")


def test_a_corpus_that_the_ledger_does_not_know_makes_no_champion(home: Path) -> None:
    (home / "ledger" / "c" / "held_out.parquet").unlink()
    assert "run the recipe again" in add(home, "law-1", None, GOOD)
    assert champion(home, "law") is None


def test_a_process_that_died_before_the_link_was_set_is_made_good(home: Path) -> None:
    add(home, "law-1", None, GOOD)
    link = home / "models" / "law" / "champion"
    link.unlink()
    promote(home, "law", "law-1", "ann", "the link is gone")
    assert served(home) == "law-1"


def test_each_event_is_told_by_one_of_those_who_look_at_the_same_time(home: Path) -> None:
    add(home, "law-1", None, GOOD)
    for n in range(6):
        add(home, f"law-{n + 2}", "law-1", BAD)
    assert untold(home) == ["law"]
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda _: take_untold(home, "law"), range(10)))
    names = sorted(event["model"] for event in taken if event)
    assert names == [f"law-{n}" for n in range(1, 8)]
    assert untold(home) == []


def test_what_an_earlier_version_noted_is_not_told_anew(home: Path) -> None:
    add(home, "law-1", None, GOOD)
    file = home / "models" / "law" / "models.json"
    state = read_json(file)
    del state["events"][0]["told"]
    write_json(file, state)
    assert untold(home) == []
    retire(home, "law", "ann", "another tokenizer")
    event = take_untold(home, "law")
    assert event is not None
    assert event["what"] == "retired"


def test_the_command(home: Path) -> None:
    for name, against in (("law-1", None), ("law-2", "law-1")):
        add(home, name, against, GOOD)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, "--recipe", "law", *words],
            env={**os.environ, "FASTCPT_HOME": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("rollback", "--why", "wrong dates").returncode == 0
    assert served(home) == "law-1"
    shown = run("show").stdout
    assert shown.startswith("champion of law: law-1; rollback goes to: none\n")
    assert "rolled back  law-1" in shown
    assert "wrong dates" in shown
    refused = run("promote", "law-9", "--why", "a slip")
    assert refused.returncode == 1
    assert refused.stderr.startswith("recipe 'law' has no model 'law-9'")
