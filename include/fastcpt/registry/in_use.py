"""Which folders of FASTCPT_HOME and of a GPU host are still needed, and which a policy removes.

A folder is needed if a recipe's champion, its predecessor or another kept model was made from it, if an
unfinished run may use it, or if it is younger than the policy says. Everything else can be made again
from recipe and documents. The ledger, the comparison sets, and models that no recipe's ``models.json``
lists are never removed.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fastcpt.files import read_json
from fastcpt.registry.champion import champion, models, predecessor


class InUseError(ValueError):
    """A file that says what is needed is unreadable: nothing may be removed until it is repaired."""


class Policy(NamedTuple):
    """``days``: folders used in the last so many days stay. ``candidates``: how many of each recipe's newest
    candidates stay; if None, all models and records stay, and checkpoints of trainings without a model."""

    days: float
    candidates: int | None


def unused(home: Path, policy: Policy) -> list[Path]:
    """The folders that may be removed, each before those that it refers to."""
    records = _records(home)
    before = _before(policy, records)

    def old(kind: str, needed: Container[str]) -> list[Path]:
        return [
            folder
            for folder in folders(home, kind)
            if folder.name not in needed and last_used(folder) < before
        ]

    known, wanted = _models(home, policy.candidates)
    unknown = {folder.name for folder in folders(home, "models")} - known.keys()
    models = old("models", wanted | unknown)
    left = known.keys() - {folder.name for folder in models}
    needed = {known[name]["record"] for name in left} | _last_of_schedules(records)
    needed |= {record.name for record, facts in records.items() if "ended" not in facts}
    runs: list[Path] = []
    checkpoints: list[Path] = []
    if policy.candidates is not None:
        # checkpoints of a training that produced a model were removed at that time
        runs, checkpoints = old("runs", needed), old("checkpoints", ())
    corpora = {known[name]["corpus"] for name in left}
    corpora |= _corpora_of(record for record in records if record not in runs)
    gone = old("corpora", corpora)
    selections = {
        str(_read(corpus / "corpus_manifest.json").get("selection"))
        for corpus in folders(home, "corpora")
        if corpus not in gone
    }
    gone_selections = old("selections", selections)
    scores = {
        part["digest"]
        for selection in folders(home, "selections")
        if selection not in gone_selections
        for part in _read(selection / "manifest.json").get("parts", [])
    }
    before_sft = {str(known[name].get("before_sft")) for name in left}
    others = [*old("scores", scores), *old("tokens", ()), *old("before_sft", before_sft)]
    return [*models, *runs, *gone, *gone_selections, *others, *checkpoints]


def on_host(home: Path, policy: Policy) -> dict[str, Any]:
    """The same policy for a GPU host, as the arguments of ``cluster.agent.cleaning.clean``.

    Old folders that can be sent or built again are removed, except corpora of models that stay. With
    ``candidates``, trainings, published models and records are removed too, except those of models that stay.
    """
    records = _records(home)
    idle_s = time.time() - _before(policy, records)
    known, wanted = _models(home, policy.candidates)
    removed = unused(home, policy)
    here = {folder.name for folder in folders(home, "models") if folder not in removed}
    stay = {name: facts for name, facts in known.items() if name in wanted | here}
    keep: dict[str, list[str]] = {
        **{kind: [] for kind in ("jobs", "code", "environments", "instructions", "base_models")},
        "corpora": sorted({facts["corpus"] for facts in stay.values()}),
    }
    if policy.candidates is not None:
        # only models that are on the host alone: of one that was fetched the host has a second copy
        keep["published"] = sorted(
            name for name, facts in stay.items() if not Path(facts["path"]).is_absolute()
        )
        keep["runs"] = [folder.name for folder in folders(home, "runs") if folder not in removed]
        # a model of an earlier version does not name its training: then all trainings stay
        if all("before_sft" in facts for facts in stay.values()):
            trained = {
                facts[name] for facts in stay.values() for name in ("training", "before_sft")
            }
            keep["models"] = sorted(trained | _begun_with(records))
    return {"idle_s": idle_s, "keep": keep, "only": {"published": sorted(known)}}


def _begun_with(records: Mapping[Path, Mapping[str, Any]]) -> set[str]:
    """The trainings from whose weights unfinished runs start."""
    starts = [_read(record / "start.json") for record, its in records.items() if "ended" not in its]
    return {start["training"] for start in starts if start}


def _records(home: Path) -> dict[Path, dict[str, Any]]:
    return {file.parent: _read(file) for file in sorted(home.glob("runs/*/run.json"))}


def _before(policy: Policy, records: Mapping[Path, Mapping[str, Any]]) -> float:
    """Folders that were last used before this moment are old; seconds since 1970."""
    # no file lists yet what an unfinished run uses, so everything since its start counts as used
    begun = [_started(facts) for facts in records.values() if "ended" not in facts]
    return min([time.time() - policy.days * 86_400, *begun])


def _models(home: Path, candidates: int | None) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """All models of all recipes, and the names of those that stay at any age."""
    known: dict[str, dict[str, Any]] = {}
    wanted: set[str] = set()
    for file in sorted(home.glob("models/*/models.json")):
        recipe = file.parent.name
        its = models(home, recipe)
        best = {champion(home, recipe), predecessor(home, recipe)} - {None}
        others = [name for name in its if name not in best]
        kept = len(others) if candidates is None else candidates
        known |= its
        wanted |= {str(name) for name in best} | set(others[max(0, len(others) - kept) :])
    return known, wanted


def _last_of_schedules(records: Mapping[Path, Mapping[str, Any]]) -> set[str]:
    """The newest successful record of each schedule, by which the next run finds new documents."""
    last: dict[str, tuple[float, str]] = {}
    for record, facts in records.items():
        schedule, scheduled, _ = str(facts.get("run", "")).partition("__")
        if scheduled and facts.get("state") == "success":
            last[schedule] = max(last.get(schedule, (0.0, "")), (_started(facts), record.name))
    return {name for _, name in last.values()}


def _corpora_of(records: Iterable[Path]) -> set[str]:
    """The digests of the records' corpora; not their paths, as FASTCPT_HOME may have been moved since."""
    named = (record / "outputs" / "build.json" for record in records)
    return {Path(_read(file)["path"]).name for file in named if file.is_file()}


def folders(home: Path, kind: str) -> list[Path]:
    """The folders of a kind, except those being written or removed, and ``models/<recipe>``."""
    found = sorted(path for path in (home / kind).glob("[!.]*") if path.is_dir())
    return [path for path in found if kind != "models" or not (path / "models.json").is_file()]


def last_used(folder: Path) -> float:
    """Seconds since 1970; a run touches the folders that it reuses."""
    return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])


def _started(facts: Mapping[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(facts["started"])).timestamp()
    except (KeyError, ValueError) as error:
        why = f"run.json of run '{facts.get('run')}' does not say when it began"
        raise InUseError(f"{why}, so nothing is removed: repair or remove the record") from error


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file yet. Raises ``InUseError`` if it is damaged."""
    try:
        content = read_json(file)
        if isinstance(content, dict):
            return content
        why = "it is not a JSON object"
    except FileNotFoundError:
        return {}
    except ValueError as error:
        why = str(error)
    raise InUseError(f"{file} cannot be read ({why}), so nothing is removed: repair or remove it")
