"""A comparison of two to five runs: their figures, recipes, curves and corpora."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcpt.reporting import pictures
from fastcpt.reporting.record import TRAININGS, read, recipe_of
from fastcpt.reporting.report import Part, Picture, Section, Table
from fastcpt.reporting.summary import duration, interval, summary

FEWEST, MOST = 2, 5


def compare(records: Sequence[Path]) -> list[Section]:
    """The sections of a comparison of ``FEWEST`` to ``MOST`` records; each table has one column per run."""
    facts = [summary(record) for record in records]
    names = [str(fact["run"] or record.name) for fact, record in zip(facts, records, strict=True)]
    recipes = [dict(_flat(recipe_of(record))) for record in records]
    sections = [
        Section("Figures", [_table(names, _figures(facts))]),
        Section("Where the recipes differ", _differences(names, recipes)),
        Section("Curves", _curves(names, records)),
        Section("Corpora", _corpora(names, records)),
    ]
    return [section for section in sections if section.parts]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(("", *names), [row for row in rows if any(row[1:])])


def _figures(facts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def row(name: str, words: Any) -> list[str]:
        return [name, *(words(fact) for fact in facts)]

    def number(key: str, digits: int, prefix: str = "") -> Any:
        return lambda fact: "" if fact[key] is None else f"{prefix}{fact[key]:,.{digits}f}"

    def figure(key: str, percent: bool = False) -> Any:
        return lambda fact: interval(fact[key], percent) if fact[key] else ""

    return [
        row("recipe", lambda fact: str(fact["recipe"] or "")),
        row("state", lambda fact: str(fact["state"] or "not ended")),
        row("perplexity", number("perplexity", 2)),
        row("of the base model", number("base_perplexity", 2)),
        row("validation set", lambda fact: str(fact["validation_set"] or "")),
        row("gate", number("threshold", 2)),
        row("outcome", lambda fact: fact["branch"] or ""),
        row("ROUGE-L", figure("rouge_l")),
        row("citations right", figure("citation_accuracy", percent=True)),
        row("total time", lambda f: "" if f["seconds"] is None else duration(f["seconds"])),
        row("GPU hours", number("gpu_hours", 2)),
        row("cost", number("cost", 2, "$")),
    ]


def _differences(names: Sequence[str], recipes: Sequence[Mapping[str, str]]) -> list[Part]:
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [
        [key, *(recipe.get(key, "not set") for recipe in recipes)]
        for key in keys
        if len({recipe.get(key) for recipe in recipes}) > 1
    ]
    return [_table(names, rows)] if rows else ["The recipes are the same."]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """A recipe as dotted keys and their values as text."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        elif value is None:
            yield f"{before}{key}", "none"
        else:
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{before}{key}", words


def _curves(names: Sequence[str], records: Sequence[Path]) -> list[Part]:
    parts: list[Part] = []
    for training in TRAININGS:
        files = {
            name: record / training / "metrics.jsonl"
            for name, record in zip(names, records, strict=True)
            if (record / training / "metrics.jsonl").is_file()
        }
        if files and (picture := pictures.curves_together(files)):
            words = f"Losses of {training} over the steps, one line per run"
            parts += [training, Picture(f"compared-{training}", picture, words)]
    return parts


def _corpora(names: Sequence[str], records: Sequence[Path]) -> list[Part]:
    manifests = [read(record, "corpus_manifest.json") for record in records]
    if not any(manifests):
        return []

    def row(name: str, key: str) -> list[str]:
        values = (manifest.get(key) for manifest in manifests)
        words = ("" if v is None else f"{v:,}" if isinstance(v, int) else str(v) for v in values)
        return [name, *words]

    rows = [row("digest", "digest"), row("documents", "documents"), row("tokens", "tokens")]
    rows.append(row("tokens per sequence", "max_seq_length"))
    out: dict[str, list[str]] = {}
    for number, manifest in enumerate(manifests):
        for one in manifest.get("funnel") or []:
            what = f"{one['stage']}: {one['reason'] or 'all'}, tokens"
            out.setdefault(what, [""] * len(records))[number] = f"{one['tokens']:,}"
    rows += [[what, *values] for what, values in out.items()]
    return [_table(names, rows)]
