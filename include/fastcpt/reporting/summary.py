"""The results of a run: as figures, and as the lines printed at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastcpt.gate import words
from fastcpt.reporting.record import TRAININGS, read, read_last, recipe_of, times


def summary(record: Path) -> dict[str, Any]:
    """The results of a run, for a person or a program; None for steps it did not reach.

    ``seconds`` are from its start to its end, including waiting; ``times`` are those of ``times()``.
    Times are in seconds, cost in USD, ``citation_accuracy`` and ``rouge_l`` as in the evaluation
    (value, low, high). ``perplexity`` is that of the last evaluation.
    """
    run, manifest = read(record, "run.json"), read(record, "corpus_manifest.json")
    seen: Mapping[str, Any] = next(
        (row for row in manifest.get("funnel", []) if row["stage"] == "read" and not row["reason"]),
        {},
    )
    cost = read(record, "cost.json")
    gate = read_last(record, "gate")
    sft = read(record, "evaluation_sft.json")
    return {
        "run": run.get("run"),
        "dag": run.get("dag"),
        "recipe": recipe_of(record).get("name"),
        "state": run.get("state"),
        "seconds": _seconds(run),
        "times": times(record),
        "code": run.get("code"),
        "documents_seen": seen.get("documents"),
        "documents_kept": manifest.get("documents"),
        "tokens_seen": seen.get("tokens"),
        "tokens_kept": manifest.get("tokens"),
        "steps": {
            training: totals["steps"]
            for training in TRAININGS
            if (totals := read(record, f"{training}/training.json"))
        },
        "perplexity": gate.get("value"),
        "base_perplexity": gate.get("base_value"),
        "threshold": gate.get("threshold"),
        "validation_set": gate.get("validation_set"),
        "gate": gate.get("decision"),
        "branch": _branch(record),
        "rouge_l": sft.get("rouge_l"),
        "citation_accuracy": sft.get("citation_accuracy"),
        "training_seconds": read(record, "train_cpt/training.json").get("seconds"),
        "gpu_hours": cost.get("gpu_hours"),
        "cost": cost.get("cost"),
        "planned": planned(record),
        "model": read(record, "outputs/publish.json").get("path"),
        "record": str(record),
    }


def planned(record: Path) -> dict[str, Any] | None:
    """The plan's hours and cost, each ``[low, high]``; None without a plan.

    ``training`` are only the hours of train_cpt's steps.
    """
    plan = read(record, "plan.json")
    if not plan:
        return None
    return {
        "hours": _bounds(plan.get("hours")),
        "training": _bounds(plan.get("training_hours")),
        "cost": _bounds(plan.get("cost")),
    }


def summary_text(record: Path) -> str:
    """The summary printed at the end of a run: one line per subject, without empty ones."""
    facts = summary(record)
    lines = [("recipe", f"{facts['recipe']}, code {facts['code']}")]
    if facts["tokens_kept"] is not None:
        seen, kept = facts["tokens_seen"], facts["tokens_kept"]
        of_seen = f" of {seen:,}" if seen is not None else ""
        documents = f"{facts['documents_kept']:,}"
        if facts["documents_seen"] is not None:
            documents += f" of {facts['documents_seen']:,}"
        lines.append(("corpus", f"{kept:,}{of_seen} tokens kept, {documents} documents"))
    if facts["steps"]:
        steps = [f"{name} {count:,}" for name, count in facts["steps"].items()]
        lines.append(("steps", ", ".join(steps)))
    if gate := read_last(record, "gate"):
        lines.append(("perplexity", words(gate)))
    if better := _bits_line(record):
        lines.append(("bits/byte", better))
    if answers := _questions_line(record):
        lines.append(("questions", answers))
    if facts["branch"]:
        lines.append(("branch", facts["branch"]))
    if facts["rouge_l"]:
        lines.append(("ROUGE-L", interval(facts["rouge_l"])))
    if cited := facts["citation_accuracy"]:
        right = f"{interval(cited, percent=True)} right"
        lines.append(("citations", "none in the answers" if cited["value"] is None else right))
    if facts["seconds"] is not None:
        lines.append(("time", _time_line(facts)))
    if facts["gpu_hours"]:
        lines.append(("GPUs", _cost_line(facts)))
    if facts["model"]:
        lines.append(("model", facts["model"]))
    lines.append(("record", facts["record"]))
    title = f"Fast CPT run {facts['run']}: {facts['state'] or 'not ended'}"
    return "\n".join([title, *(f"  {name:<11}{value}" for name, value in lines)])


def interval(figure: Mapping[str, Any], percent: bool = False) -> str:
    """``0.612 (0.587 to 0.640)``: a figure with its confidence interval, if it has one."""

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    low, high = figure.get("low"), figure.get("high")
    if figure.get("value") is None:
        return "none counted"
    between = "" if low is None or high is None else f" ({text(low)} to {text(high)})"
    return text(figure["value"]) + between


def duration(seconds: float) -> str:
    """``3 h 05 min``, ``4 min 09 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def span(ends: Sequence[float], unit: str = "", prefix: str = "", digits: int = 2) -> str:
    """``4.20 to 5.10 h``; one number where low and high read the same."""
    low, high = (f"{prefix}{value:,.{digits}f}" for value in ends)
    return (low if low == high else f"{low} to {high}") + unit


def _branch(record: Path) -> str | None:
    """What actually followed the gates, in words, whatever they decided."""
    gate, second = read(record, "gate.json"), read(record, "gate_stage2.json")
    if not gate:
        return None
    if not gate["passed"] and not second:
        begun = read(record, "train_cpt_stage2/training.json")
        return "stage 2" if begun else "gate missed after stage 1"
    stage = "stage 2" if second else "stage 1"
    if not (second or gate)["passed"]:
        return f"ended at the gate after {stage}"
    if read(record, "train_sft/training.json"):
        return f"fine-tuning after {stage}"
    if (recipe_of(record).get("sft") or {}).get("instructions") is None:
        return f"no fine-tuning after {stage}: no instructions"
    return f"gate passed after {stage}"


def _questions_line(record: Path) -> str:
    """The share of right answers, and the gain over the base model."""
    evaluation = read_last(record, "evaluation")
    if not evaluation.get("questions"):
        return ""
    row = evaluation["questions"]["model"]["table"]["all"]
    gain = f", gain over the base {interval(row['gain'], percent=True)}" if "gain" in row else ""
    return f"{interval(row, percent=True)} right of {row['asked']:,}{gain}; a guess 25 %"


def _bits_line(record: Path) -> str:
    """Bits per byte of the base model and of the trained one, on each held-out set that has both."""
    evaluation = read_last(record, "evaluation")
    parts = []
    for name, figures in evaluation.items():
        both = figures if isinstance(figures, dict) and {"base", "model"} <= set(figures) else {}
        base, own = (both.get(who, {}).get("bits_per_byte") for who in ("base", "model"))
        if base is not None and own is not None:
            word = "better" if own < base else "not better"
            parts.append(f"{name} {base:.3f} to {own:.3f}, {word}")
    return "; ".join(parts)


def _time_line(facts: Mapping[str, Any]) -> str:
    line, parts = duration(facts["seconds"]), facts["times"]
    if parts:
        waited = max(0.0, facts["seconds"] - parts["worked"] - parts["approval"])
        approval = f", {duration(parts['approval'])} for approval" if parts["approval"] else ""
        line += f": {duration(parts['worked'])} of work{approval}, {duration(waited)} waiting"
    promised = (facts["planned"] or {}).get("training")
    if facts["training_seconds"]:
        line += f"; train_cpt {duration(facts['training_seconds'])}"
        line += f", planned {span(promised, ' h')}" if promised else ""
    return line


def _cost_line(facts: Mapping[str, Any]) -> str:
    promised = (facts["planned"] or {}).get("cost")
    cost = "" if facts["cost"] is None else f", ${facts['cost']:,.2f}"
    planned_cost = f"; planned without stage 2 {span(promised, prefix='$')}" if promised else ""
    return f"{facts['gpu_hours']:,.2f} GPU hours{cost}{planned_cost}"


def _bounds(value: Any) -> list[float] | None:
    """A plan's figure (a number, a pair or a mapping) as ``[low, high]``."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        value = [value["low"], value["high"]]
    low, high = value if isinstance(value, list | tuple) else (value, value)
    return [float(low), float(high)] if math.isfinite(low) and math.isfinite(high) else None


def _seconds(run: Mapping[str, Any]) -> float | None:
    if not run.get("ended"):
        return None
    ended, started = (datetime.fromisoformat(run[key]) for key in ("ended", "started"))
    return (ended - started).total_seconds()
