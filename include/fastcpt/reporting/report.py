"""The report of a run: ``report.md`` and ``report.html``, from its record.

A report is a list of sections (text, tables, pictures), built once and written in both formats. The
page needs no other file and no network: its pictures are inline SVG. All text from users or the
corpus is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fastcpt.files import whole_file
from fastcpt.gate import words
from fastcpt.reporting import pictures
from fastcpt.reporting.pages import page
from fastcpt.reporting.record import TRAININGS, read, read_last, recipe_of
from fastcpt.reporting.summary import duration, interval, span, summary, summary_text

COUNTS = ("documents", "characters", "tokens")  # of a row of the funnel
# An answer's texts and what stands above each.
ANSWERS = {
    "prompt": "prompt",
    "base": "base model",
    "answer": "fine-tuned model",
    "reference": "reference",
}
SETS = ("random", "newest", "general")  # validation sets


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers: a page aligns them right."""
        columns = zip(*self.rows, strict=True)
        return [all(not cell.strip("-0123456789,. %") for cell in column) for column in columns]


@dataclass(frozen=True)
class Picture:
    name: str  # of its file beside report.md
    svg: str
    words: str  # alternative text


@dataclass(frozen=True)
class Listing:
    """Preformatted text; if ``folded`` is given, a page folds it under that heading."""

    text: str
    folded: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Texts to compare, each under its name."""

    columns: Sequence[tuple[str, str]]


Part = str | Table | Picture | Listing | SideBySide


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Part]


def write_report(record: Path) -> Path:
    """Write ``report.html`` and ``report.md`` (with its pictures) into the record. Returns the page.

    Missing files are left out: the report of a run that failed early is short.
    """
    title = f"Fast CPT run {read(record, 'run.json').get('run', record.name)}"
    report = sections(record)
    for section in report:
        for part in section.parts:
            if isinstance(part, Picture):
                _write(record / f"{part.name}.svg", part.svg)
    _write(record / "report.md", _markdown(title, report))
    _write(record / "report.html", page("report.html", title=title, sections=report))
    return record / "report.html"


def sections(record: Path) -> list[Section]:
    """The report's sections so far. Raises ``RecordError`` or another ``ValueError`` if the record is damaged."""
    every = [
        Section("Summary", [Listing(summary_text(record))]),
        Section("Perplexity and the gate", _perplexity(record)),
        Section("Questions from held-out documents", _questions(record)),
        Section("Champion or candidate", _decision(record)),
        Section("Training", _training(record)),
        Section("Fine-tuning", _fine_tuning(record)),
        Section("Corpus", _corpus(record)),
        Section("Best and worst documents taken", _documents(record)),
        Section("Plan and actual figures", _plan(record)),
        Section("Published claim and this run", _claim(record)),
        Section("Outputs", _outputs(record)),
        Section("Versions", _versions(record)),
        Section("Recipe", _recipe(record)),
    ]
    return [section for section in every if section.parts]


def _perplexity(record: Path) -> list[Part]:
    first, second = read(record, "evaluation.json"), read(record, "evaluation_stage2.json")
    rows, bars = [], {}
    for name in SETS:
        for label, evaluation, who in (
            ("base model", first, "base"),
            ("after stage 1", first, "model"),
            ("after stage 2", second, "model"),
        ):
            figures = _of_set(evaluation, name).get(who)
            if figures:
                perplexity = figures.get("perplexity")
                bits, tokens = figures.get("bits_per_byte"), figures.get("tokens")
                rows.append(
                    (name, label, _number(perplexity, 2), _number(bits, 3), _number(tokens))
                )
                bars[f"{name}: {label}"] = perplexity
    if not rows:
        return []
    parts: list[Part] = []
    for file, stage in (("gate.json", "stage 1"), ("gate_stage2.json", "stage 2")):
        gate = read(record, file)
        if gate:
            parts.append(f"After {stage}: {words(gate)}.")
    threshold = read(record, "gate.json").get("threshold")
    picture = pictures.perplexities(bars, threshold) if threshold else None
    if picture:
        parts.append(
            Picture("perplexity", picture, "Perplexities as bars; the table has the values")
        )
    header = ("validation set", "model", "perplexity", "bits per byte", "tokens counted")
    return [*parts, Table(header, rows), *_kinds(first, second)]


def _kinds(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Part]:
    """Perplexity of base and trained model by legal area and year, and of each area's adapter."""
    last = second or first
    rows = []
    for name in SETS:
        base, model = _of_set(first, name).get("base") or {}, _of_set(last, name).get("model") or {}
        adapters = _of_set(last, name).get("adapters") or {}
        for kind in ("area", "year"):
            for key, figures in sorted((model.get(f"by_{kind}") or {}).items()):
                untrained = (base.get(f"by_{kind}") or {}).get(key) or {}
                rows.append(
                    (
                        name,
                        f"{kind} {key}",
                        _number(untrained.get("perplexity"), 2),
                        _number(figures.get("perplexity"), 2),
                        _number(figures.get("tokens")),
                    )
                )
        for key, by in sorted(adapters.items()):
            rows.append(
                (
                    name,
                    f"adapter {key}, on its area",
                    _number((by.get("base") or {}).get("perplexity"), 2),
                    _number(by["adapter"]["perplexity"], 2),
                    _number(by["adapter"]["tokens"]),
                )
            )
    header = ("validation set", "documents", "base model", "trained", "tokens counted")
    return [Table(header, rows)] if rows else []


def _questions(record: Path) -> list[Part]:
    """The answers of base and trained model, and whether the difference is more than chance."""
    last = read_last(record, "evaluation")
    asked = last.get("questions")
    if not asked:
        return []
    base = (asked.get("base") or {}).get("table", {})
    rows = [
        (
            "all kinds" if kind == "all" else kind,
            _number(row["asked"]),
            interval(base[kind], percent=True) if kind in base else "",
            interval(row, percent=True),
            interval(row["gain"], percent=True) if "gain" in row else "",
        )
        for kind, row in asked["model"]["table"].items()
    ]
    header = ("kind", "asked", "base model, right", "trained, right", "gain")
    return [
        "Which act, date or number comes next, which title belongs to this text, which sentence comes "
        "next: four answers each, so a guess is right in 25 %. 95 % intervals in brackets; a gain with "
        "0 in its interval is no gain.",
        Table(header, rows),
    ]


def _decision(record: Path) -> list[Part]:
    """Whether the model is recommended, condition by condition, and its status."""
    decision = read(record, "decision.json")
    if not decision:
        return []
    standing = read(record, "outputs/publish.json").get("standing")
    rows = [
        (
            condition["what"],
            f"{condition['bound']:g}",
            _number(condition["value"], 4) or f"not measured: {condition.get('why')}",
            _span(condition["low"], condition["high"]) if condition["low"] is not None else "",
            "yes" if condition["met"] else "no",
        )
        for condition in decision["conditions"]
    ]
    of = decision["against"] or "the base model"
    header = ("condition", "bound", "value", "95 % interval", "met")
    first = f"{standing}." if standing else f"Compared with {of}."
    return [first, Table(header, rows)]


def _of_set(evaluation: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The figures on one validation set; empty if it was not evaluated."""
    figures: Mapping[str, Any] = evaluation.get(name) or {}
    return figures or (evaluation if evaluation.get("validation_set") == name else {})


def _training(record: Path) -> list[Part]:
    metrics = {
        training: record / training / "metrics.jsonl"
        for training in TRAININGS
        if (record / training / "metrics.jsonl").is_file()
    }
    rows = []
    for training in TRAININGS:
        totals = read(record, f"{training}/training.json")
        if totals:
            rows.append(
                (
                    training,
                    _number(totals.get("steps")),
                    _number(totals.get("tokens")),
                    duration(totals["seconds"]) if "seconds" in totals else "",
                    _number(totals.get("tokens_per_s_per_gpu")),
                    _number(totals.get("loss"), 3),
                    _number(totals.get("peak_memory_gb"), 1),
                    _number(totals.get("skipped_steps")),
                )
            )
    parts: list[Part] = []
    curve = pictures.curves(metrics)
    if curve:
        parts.append(Picture("training", curve, "Loss and learning rate over the steps"))
    if rows:
        header = (
            "training", "steps", "tokens", "time", "tokens/s per GPU", "final loss",
            "peak memory (GB)", "skipped steps",
        )  # fmt: skip
        parts.append(Table(header, rows))
    return parts


def _fine_tuning(record: Path) -> list[Part]:
    evaluation = read(record, "evaluation_sft.json")
    if not evaluation:
        return []
    rows = [("ROUGE-L", interval(evaluation["rouge_l"]))]
    for key in ("citation_accuracy", "citation_recall", "citation_f1", "new_citations"):
        figure = evaluation.get(key)
        if figure:
            counted = figure.get("counted")
            of_counted = f" of {counted:,}" if counted else ""
            rows.append((key.replace("_", " "), interval(figure, percent=True) + of_counted))
    rows.append(("held-out instructions", _number(evaluation.get("examples"))))
    parts: list[Part] = [Table(("figure", "value (95 % interval)"), rows)]
    for sample in evaluation.get("samples", []):
        texts = [(name, str(sample[key])) for key, name in ANSWERS.items() if key in sample]
        parts.append(SideBySide(texts))
    return parts


def _documents(record: Path) -> list[Part]:
    """Both ends of the ranking, so that a reader can judge the score."""
    ends = read(record, "selection.json")
    header = ("document", "title", "year", "score", "tokens")
    parts: list[Part] = []
    for name in ("best", "worst"):
        rows = [
            (
                row["id"],
                row["title"],
                str(row["year"] or ""),
                _number(row["score"], 2),
                _number(row["tokens"]),
            )
            for row in ends.get(name, [])
        ]
        if rows:
            parts += [f"The {name}:", Table(header, rows)]
    return parts


def _corpus(record: Path) -> list[Part]:
    manifest = read(record, "corpus_manifest.json")
    if not manifest:
        return []
    parts: list[Part] = []
    funnel = manifest.get("funnel") or []
    if funnel:
        rows = [
            (row["stage"], row["reason"] or "all", *(f"{row[key]:,}" for key in COUNTS))
            for row in funnel
        ]
        picture = pictures.funnel(funnel)
        if picture:
            parts.append(Picture("funnel", picture, "Tokens that each step left out, as bars"))
        parts.append(Table(("stage", "reason", *COUNTS), rows))
    facts = [
        ("tokens for training", _number(manifest.get("tokens"))),
        ("documents", _number(manifest.get("documents"))),
        ("tokens per sequence", _number(manifest.get("max_seq_length"))),
        ("shards", _number(len(manifest.get("shards", [])))),
        ("padding", _percent(manifest.get("padding_share"))),
        ("stored bytes per token", _number(manifest.get("bytes_per_token"), 2)),
    ]
    parts.append(Table(("corpus", ""), [fact for fact in facts if fact[1]]))
    return parts


def _plan(record: Path) -> list[Part]:
    compared = read(record, "plan_and_actual.json").get("rows", [])
    if not compared:
        return []
    rows = [
        (
            row["what"],
            "unknown" if row["low"] is None else _span(row["low"], row["high"]),
            "" if row["actual"] is None else _figure(row["actual"]),
            ""
            if row["off"] is None
            else f"{100 * row['off']:+.0f} %"
            if row["off"]
            else "as planned",
        )
        for row in compared
    ]
    source = read(record, "plan.json").get("rate_source")
    words = [f"The plan's rate: {source}."] if source else []
    return [*words, Table(("", "plan", "this run", "outside the plan by"), rows)]


def _figure(value: float) -> str:
    """Three significant digits, with separators for thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _span(low: float, high: float) -> str:
    ends = _figure(low), _figure(high)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _claim(record: Path) -> list[Part]:
    claim = recipe_of(record).get("claim")
    if not claim:
        return []
    facts = summary(record)
    promised = facts["planned"] or {}
    took = sum(read(record, "cost.json").get("seconds", {}).values())
    quality = ""
    if facts["perplexity"] is not None:
        quality = f"perplexity {facts['perplexity']:,.2f}"
        if facts["base_perplexity"] is not None:
            quality += f", base model {facts['base_perplexity']:,.2f}"
    rows = [
        (
            "time",
            f"{claim['hours']} h",
            span(promised["hours"], " h") if promised.get("hours") else "",
            f"{took / 3600:,.2f} h" if took else "",
        ),
        (
            "cost",
            claim["cost"],
            span(promised["cost"], prefix="$") if promised.get("cost") else "",
            "" if facts["cost"] is None else f"${facts['cost']:,.2f}",
        ),
        ("quality", claim["quality"], "", quality),
    ]
    words = (
        "The claim is the published guide's, with the full run's quality as 100 %. It is shown "
        "only for comparison; plan and run are this project's own figures."
    )
    return [words, Table(("", "published claim", "plan", "this run"), rows)]


def _outputs(record: Path) -> list[Part]:
    rows = []
    for file in sorted((record / "outputs").glob("*.json")):
        output = read(record, f"outputs/{file.name}")
        reused = "found again" if output.get("reused") else "made in this run"
        rows.append((file.stem, _cell(output.get("digest")), reused, _cell(output.get("path"))))
    return [Table(("task", "digest", "", "path"), rows)] if rows else []


def _versions(record: Path) -> list[Part]:
    run = read(record, "run.json")
    versions = {"Fast CPT": run.get("version"), "code": run.get("code"), **run.get("packages", {})}
    rows = [(name, _cell(version)) for name, version in versions.items() if version]
    return [Table(("", "version"), rows)] if rows else []


def _recipe(record: Path) -> list[Part]:
    file = record / "recipe.yaml"
    if not file.is_file():
        return []
    return [Listing(file.read_text("utf-8").rstrip(), folded="Every value, defaults included")]


def _number(value: Any, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}"]
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            match part:
                case Table(header, rows):
                    table = [header, ["---"] * len(header), *rows]
                    lines.append("\n".join(_markdown_row(row) for row in table))
                case SideBySide(columns):
                    text = "\n".join(f"{name}: {words}" for name, words in columns)
                    lines.append("\n".join(f"    {line}" for line in text.splitlines()))
                case Picture(name=name):
                    lines.append(f"![{section.title}]({name}.svg)")
                case Listing(text=text):
                    # indented, so that no text can end the block
                    lines.append("\n".join(f"    {line}" for line in text.splitlines()))
                case str(words):
                    lines.append(escape(words, quote=False))
    return "\n\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    texts = (escape(cell, quote=False).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
