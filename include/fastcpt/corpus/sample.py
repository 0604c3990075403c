"""A synthetic legal corpus: realistic in form, invented in content, reproducible by its seed.

The whole pipeline can run on it, and every step has something to do. The acts read like those of an
official journal (recitals, definitions, articles, annexes of figures) and cite one another. Some have no
date, some are short, some are consolidated versions, near-duplicates or exact duplicates of others, and a
few records cannot be read.

An act is a list of lines drawn from a small grammar (``sample_grammar``).
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from fastcpt.corpus.sample_grammar import (
    AREAS,
    ARTICLES,
    DEFINITIONS,
    DUTIES,
    ENTRY,
    LAST_ARTICLES,
    ORIGINS,
    RECITALS,
    VARIED,
    Area,
)
from fastcpt.files import whole_file

Record = dict[str, Any]


OF_SAMPLE = ("sample", "smollm2")  # the recipes that train on it
SAMPLE_DOCUMENTS = 400
TYPE_LETTERS = {"regulation": "R", "directive": "L", "decision": "D"}
KINDS = ("regulation", "regulation", "regulation", "directive", "directive", "decision")
FIRST_DAY, LAST_DAY = date(1990, 1, 8), date(2026, 6, 30)


@dataclass(frozen=True)
class Act:
    """One act, or one version of it: its lines of text and its metadata."""

    celex: str
    kind: str
    number: str
    title: str
    day: date
    area: Area
    facts: Mapping[str, str]
    head: tuple[str, ...]
    lines: tuple[str, ...]
    duty: str
    framework: str | None  # the act of its area that it builds on, as cited
    eurovoc: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join((*self.head, *self.lines))

    def record(self, rng: random.Random) -> Record:
        """The act as a parsed document; about a tenth of the records have no date."""
        metadata: Record = {
            "celex": self.celex,
            "doc_type": self.kind,
            "subject_matter": list(self.area.subjects),
            "eurovoc": list(self.eurovoc),
            "language": "en",
            "title": self.title,
            "source": "generated sample",
            "date": self.day.isoformat(),
            "in_force": self.day.year >= 2000 or rng.random() < 0.4,
            "directory_code": self.area.code,
        }
        if rng.random() < 0.11:
            del metadata["date"]
        return {"id": self.celex, "full_text": self.text, "metadata": metadata}

    def instruction(self) -> dict[str, str]:
        """Title and summary; each sentence of the summary follows from the act."""
        facts = self.facts
        sentences = [
            f"{self.number} lays down rules on the {facts['activity']} of {facts['term']}.",
            f"{facts['Actors']} must {self.duty}.",
            f"{facts['Authority']} supervises them.",
        ]
        if self.framework:
            sentences.append(f"It builds on {self.framework}.")
        sentences.append(ENTRY[self.kind])
        return {"id": self.celex, "title": self.title, "summary": " ".join(sentences)}


class _Slots(dict[str, str]):
    """The facts of an act; any other slot is drawn anew at each use."""

    def __init__(self, facts: Mapping[str, str], earlier: Sequence[str], rng: random.Random):
        super().__init__(facts)
        self.earlier = earlier
        self.rng = rng

    def __missing__(self, slot: str) -> str:
        if slot.lower() == "cite":
            return self.rng.choice(self.earlier)
        return self.rng.choice(VARIED[slot])

    def fill(self, template: str) -> str:
        return template.format_map(self)


def sample_overrides(recipe: str, overrides: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Add the sample's paths to the overrides if a sample recipe names no documents; generates it in ``home``."""
    if recipe not in OF_SAMPLE or overrides.get("documents.path"):
        return dict(overrides)
    folder = home / "sample"
    instructions = folder / "instructions.jsonl"
    if not instructions.exists():
        generate_sample(folder, documents=SAMPLE_DOCUMENTS)
    own = {"documents.path": str(folder / "parsed"), "sft.instructions": str(instructions)}
    return {**own, **overrides}


def generate_sample(folder: Path, documents: int = 400, seed: int = 0) -> None:
    """Write ``folder/parsed/`` (documents) and ``folder/instructions.jsonl`` (for fine-tuning).

    ``documents`` readable records, versions and duplicates included, plus one unreadable record for every
    80 of them (at least one, at most five). A record has about 5,000 characters. The same arguments give
    the same files, byte for byte.
    """
    if documents < 20:
        raise ValueError(f"a sample needs at least 20 documents, not {documents}")
    rng = random.Random(seed)
    versions, reprints, copies = documents * 12 // 100, documents * 5 // 100, documents // 100 + 1
    works = _works(documents - versions - reprints - copies, rng)
    older = works[: len(works) * 3 // 4]
    long_works = [act for act in older if len(act.lines) > 20]
    consolidated = _consolidated(long_works, versions, rng)
    reprinted = [_reprint(act, rng) for act in rng.choices(long_works, k=reprints)]
    records = [act.record(rng) for act in (*works, *consolidated, *reprinted)]
    records += [_copy(record, rng) for record in rng.sample(records, copies)]
    rng.shuffle(records)
    _write_parts(folder / "parsed", records, unreadable=max(1, min(5, documents // 80)))
    with whole_file(folder / "instructions.jsonl") as aside:
        aside.write_text(
            "".join(_line(act.instruction()) for act in works if len(act.lines) > 1),
            encoding="utf-8",
        )


def _works(count: int, rng: random.Random) -> list[Act]:
    """Different acts in order of their dates; each cites only earlier ones of its area."""
    span = (LAST_DAY - FIRST_DAY).days
    # the square root makes recent years more frequent, as in reality
    days = sorted(FIRST_DAY + timedelta(round(span * rng.random() ** 0.5)) for _ in range(count))
    matters = [
        (area, origin, adjective, thing)
        for area in AREAS
        for origin in ORIGINS
        for adjective in area.adjectives
        for thing in area.objects
    ]
    earlier: dict[Area, list[str]] = {area: [] for area in AREAS}
    acts = []
    serials = rng.sample(range(100, 5000), count)
    for serial, day, matter in zip(serials, days, rng.sample(matters, count), strict=True):
        cited = earlier[matter[0]]
        act = _write_act(serial, day, matter, cited, rng)
        # only one act in three becomes citable, so an area's early acts are cited most
        if len(cited) < 2 or rng.random() < 0.33:
            cited.append(act.number)
        acts.append(act)
    return acts


def _write_act(
    serial: int,
    day: date,
    matter: tuple[Area, str, str, str],
    earlier: Sequence[str],
    rng: random.Random,
) -> Act:
    area, origin, adjective, thing = matter
    kind, activity = rng.choice(KINDS), rng.choice(list(DUTIES))
    number = _number(kind, day.year, serial)
    term = f"{origin} {adjective} {thing}"
    facts = {
        "activity": activity,
        "term": term,
        "objects": thing,
        "adjective": adjective,
        "actors": area.actors,
        "Actors": area.actors.capitalize(),
        "authority": area.authority,
        "Authority": area.authority[0].upper() + area.authority[1:],
        "kind": kind.capitalize(),
        "duty": DUTIES[activity].format(term=term),
    }
    if not earlier:  # the first act of an area has nothing to cite but the Treaty
        facts["cite"] = facts["Cite"] = "the Treaty"
    slots = _Slots(facts, earlier, rng)
    title = f"{number} of {_long(day)} on the {activity} of {term}"
    head = (
        f"{day.day}.{day.month}.{day.year}",
        "EN",
        "Official Journal (generated sample)",
        f"L {rng.randint(1, 40)}/{rng.randint(1, 40)}",
        title,
    )
    size = rng.choices((-1, 0, 1, 2, 4), weights=(3, 8, 22, 35, 32))[0]
    return Act(
        celex=f"3{day.year}{TYPE_LETTERS[kind]}{serial:04}",
        kind=kind,
        number=number,
        title=title,
        day=day,
        area=area,
        facts=facts,
        head=head,
        lines=tuple(_body(kind, size, slots, earlier, rng)),
        duty=facts["duty"],
        framework=earlier[0] if earlier else None,
        eurovoc=(activity, thing, *rng.sample(ORIGINS, 1)),
    )


def _body(
    kind: str, size: int, slots: _Slots, earlier: Sequence[str], rng: random.Random
) -> list[str]:
    """The lines below the title. ``size`` -1 is a notice, 0 a short act, 4 a long one."""
    if size < 0:
        return [slots.fill("See {cite}.")]
    name = kind.capitalize()
    lines = ["Having regard to the Treaty,"]
    if earlier:
        lines.append(f"Having regard to {earlier[0]},")
    lines.append("Whereas:")
    recitals = _some(RECITALS, 2 + 4 * size, rng)
    lines += [f"({n}) {slots.fill(recital)}" for n, recital in enumerate(recitals, 1)]
    lines.append(f"HAS ADOPTED THIS {name.upper()}:")
    articles: list[tuple[str, list[str]]] = [
        (
            "Subject matter and scope",
            [slots.fill(f"This {name} lays down rules on the {{activity}} of {{term}}.")],
        )
    ]
    if size:
        chosen = _some(DEFINITIONS, 2 + size, rng)
        definitions = [f"({n}) {slots.fill(item)}" for n, item in enumerate(chosen, 1)]
        opening = f"For the purposes of this {name}, the following definitions apply:"
        articles.append(("Definitions", [opening, *definitions]))
    topics = list(ARTICLES)
    for topic in [topics[0], *_some(topics[1:], 2 * size, rng)]:
        templates = ARTICLES[topic]
        # always keep the first paragraph: a summary may refer to it
        chosen = [templates[0], *_some(templates[1:], len(templates) if size > 1 else 1, rng)]
        paragraphs = [f"{n}. {slots.fill(item)}" for n, item in enumerate(chosen, 1)]
        articles.append((slots.fill(topic), paragraphs))
    last_title, *last = LAST_ARTICLES[kind]
    articles.append((last_title, [slots.fill(item) for item in last]))
    for n, (title, paragraphs) in enumerate(articles, 1):
        lines += [f"Article {n}", title, *paragraphs]
    lines.append("Done at Brussels. For the Council, the President.")
    if size and rng.random() < 0.3:
        lines += _annex(rng.choice((4, 12, 20, 80)), slots, rng)
    return lines


def _some(items: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """At most ``count`` of the items, in their own order."""
    chosen = sorted(rng.sample(range(len(items)), min(count, len(items))))
    return [items[n] for n in chosen]


def _annex(rows: int, slots: _Slots, rng: random.Random) -> list[str]:
    """A table of figures, as in an annex; it has more tokens per character than running text."""
    table = [
        f"{row} | 0.{rng.randint(1, 9)} | {10 * rng.randint(1, 9)} | {slots['share']}"
        for row in range(1, rows + 1)
    ]
    header = slots.fill("Limit values for the {activity} of {term}")
    return ["ANNEX", header, "No | limit | reference | tolerance", *table]


def _consolidated(works: Sequence[Act], count: int, rng: random.Random) -> list[Act]:
    """``count`` later versions of some acts, up to six of one, each amended a little more."""
    versions: list[Act] = []
    for act in rng.sample(works, len(works)):
        for _ in range(rng.randint(1, 6)):
            if len(versions) == count:
                return versions
            day = min(act.day + timedelta(rng.randint(120, 900)), LAST_DAY)
            act = replace(
                _amended(act, rng),
                celex=f"0{act.celex[1:10]}-{day:%Y%m%d}",
                day=day,
                head=(f"Consolidated text: {act.title}", f"Version of {_long(day)}"),
            )
            versions.append(act)
    return versions


def _amended(act: Act, rng: random.Random) -> Act:
    """The act with one of its paragraphs replaced."""
    lines = list(act.lines)
    numbered = [n for n, line in enumerate(lines) if re.match(r"\d+\. ", line)]
    at = rng.choice(numbered)
    added = _Slots(act.facts, [act.number], rng).fill(
        "{Actors} shall inform {authority} of changes to {term} within {days}."
    )
    lines[at] = lines[at].split(" ", 1)[0] + " " + added
    return replace(act, lines=tuple(lines))


def _reprint(act: Act, rng: random.Random) -> Act:
    """A near-duplicate under a number of its own: published again with one paragraph changed."""
    serial = 5000 + rng.randint(0, 4000)
    number = _number(act.kind, act.day.year, serial)
    title = act.title.replace(act.number, number)
    day = act.day + timedelta(rng.randint(5, 60))
    return replace(
        _amended(act, rng),
        celex=f"3{act.day.year}{TYPE_LETTERS[act.kind]}{serial:04}",
        number=number,
        title=title,
        day=day,
        head=(*act.head[:-1], title),
    )


def _copy(record: Record, rng: random.Random) -> Record:
    """An exact duplicate: the record delivered twice, or its text under another id."""
    if rng.random() < 0.5:
        return record
    metadata = {key: value for key, value in record["metadata"].items() if key != "celex"}
    return {**record, "id": f"copy-of-{record['id']}", "metadata": metadata}


def _number(kind: str, year: int, serial: int) -> str:
    """The number as cited: its form changed with the Union's name, and in 2015."""
    name = kind.capitalize()
    if year >= 2015:
        return f"{name} (EU) {year}/{serial}"
    short_year = year if year >= 1999 else year % 100
    body = "EU" if year >= 2010 else "EC" if year >= 1994 else "EEC"
    if kind == "regulation":
        return f"{name} ({body}) No {serial}/{short_year}"
    return f"{name} {short_year}/{serial}/{body}"


def _long(day: date) -> str:
    return f"{day.day} {day:%B} {day.year}"


def _write_parts(parsed: Path, records: Sequence[Record], unreadable: int) -> None:
    """Write the records to files of every format, with ``unreadable`` broken ones among them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    single, *rest = records
    fourth = len(rest) // 4
    lines = [
        [_line(record).encode() for record in rest[n * fourth : (n + 1) * fourth]] for n in range(3)
    ]
    table = rest[3 * fourth :]

    broken = _line(single)
    damage = (
        (0, broken[: len(broken) // 2].encode() + b"\n"),  # a line cut short
        (0, _line({**single, "id": "32099R0001", "full_text": ""}).encode()),
        (1, _line({**single, "id": "32099R0002", "full_text": 17}).encode()),
        (2, broken.encode("utf-16-le").replace(b"\n\x00", b"\n")),  # not UTF-8
        (1, b'["not", "an", "object"]\n'),
    )
    for part, line in damage[:unreadable]:
        lines[part].insert(len(lines[part]) // 2, line)

    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream:
        stream.write(b"".join(lines[1]))
    contents = {
        "part-00.jsonl": b"".join(lines[0]),
        "part-01.jsonl.gz": packed.getvalue(),
        "part-02.jsonl.zst": zstandard.ZstdCompressor(level=3).compress(b"".join(lines[2])),
        "act-000.json": json.dumps(single, indent=1, ensure_ascii=False).encode(),
    }
    for name, content in contents.items():
        with whole_file(parsed / name) as aside:
            aside.write_bytes(content)
    with whole_file(parsed / "part-03.parquet") as aside:
        pq.write_table(pa.Table.from_pylist(table), aside, compression="zstd")


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
