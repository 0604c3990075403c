"""A plan as tables, for pages and for approval: each figure, its limit, and its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastcpt.reporting.summary import span

Plan = Mapping[str, Any]  # as planning's ``Plan.to_json`` writes it

FIGURES = ("figure", "planned", "limit", "how it is known")
COUNTED = "counted in the corpus"
ALTERNATIVES = ("instead", "tokens", "hours", "cost", "memory per GPU")


def figures(plan: Plan, corpus: str) -> list[tuple[str, str, str, str]]:
    """Rows under ``FIGURES``; ``corpus`` is the source of its token count: ``COUNTED`` once it is built."""
    return list(_figures(plan, corpus))


def _figures(plan: Plan, corpus: str) -> Iterator[tuple[str, str, str, str]]:
    rate, price = plan["rate_source"], plan["price_source"] or ""
    price_known = f"the hours, at {price}" if price else "no price is known"
    yield (
        "hours",
        _range(plan["hours"], " h"),
        _limit(plan["budget_hours"], plan["fits_time"], "{:g} h"),
        f"range by {rate}",
    )
    yield (
        "money",
        _range(plan["cost"], prefix="$", digits=0),
        _limit(plan["budget_money"], plan["fits_money"], "${:,.0f}"),
        price_known,
    )
    if plan["stage2_hours"]:
        money = (
            f", {_range(plan['stage2_cost'], prefix='$', digits=0)}" if plan["stage2_cost"] else ""
        )
        yield (
            "stage 2, if the gate is missed",
            _range(plan["stage2_hours"], " h") + money,
            "",
            "as above",
        )
    if plan["memory_gb"]:
        yield (
            "memory per GPU",
            f"{plan['memory_gb']['total']:,.1f} GB",
            _limit(plan["available_gb"], plan["fits_memory"], "{:,.1f} GB"),
            f"computed: micro-batch {plan['micro_batch']} x {plan['accumulation']}",
        )
    yield (
        "tokens trained on",
        f"{plan['tokens']:,} in {plan['steps']:,} steps",
        "",
        "set by the recipe",
    )
    if plan["corpus_tokens"]:
        yield "tokens of the corpus", f"{plan['corpus_tokens']:,}", "", corpus
    if plan["passes"]:
        yield (
            "passes over the corpus",
            f"{plan['passes']:,.1f}",
            _limit(plan["max_passes"], plan["fits_passes"], "{:g}"),
            "from the two above",
        )
    yield "tokens per second", _range(plan["tokens_per_s"], digits=0), "", rate
    if plan["checkpoint_disk_gb"] is not None:
        free = "" if plan["fits_disk"] else "more than is free"
        yield "disk on the GPU host", f"{plan['checkpoint_disk_gb']:,.0f} GB", free, "computed"


def alternative_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Rows under ``ALTERNATIVES``, best first; empty if the plan fits."""
    return [
        (
            f"{one['what']}, on {one['cluster']}{'' if one['fits'] else ' (does not fit either)'}",
            f"{one['tokens']:,}",
            _range(one["hours"], " h"),
            _range(one["cost"], prefix="$", digits=0),
            f"{one['memory_gb']:,.0f} GB",
        )
        for one in plan["alternatives"]
    ]


def verdict(plan: Plan) -> str:
    """Whether the plan fits, as a sentence."""
    if plan["fits"]:
        return "The plan fits."
    return "The plan cannot run." if plan["problems"] else "The plan does not fit."


def markdown(plan: Plan, corpus: str) -> str:
    """The tables as Markdown, for Airflow's approval page. Text from users is escaped."""
    what = f"{plan['model']}, {plan['method']}, {plan['precision']}, on {plan['cluster']}"
    parts = [f"**{_plain(plan['recipe'])}**: {_plain(what)}. {verdict(plan)}"]
    rows = figures(plan, corpus)
    # three columns, with long texts and alternatives below, so that the table fits a phone
    parts.append(_table(FIGURES[:3], [row[:3] for row in rows]))
    parts.append("How each is known:")
    parts.append("\n".join(f"- **{name}**: {_plain(source)}" for name, _, _, source in rows))
    parts += [f"- {_plain(line)}" for line in (*plan["problems"], *plan["notes"])]
    if plan["alternatives"]:
        parts += ["What would fit:", "\n".join(map(_alternative, alternative_rows(plan)))]
    return "\n\n".join(parts)


def _alternative(row: tuple[str, ...]) -> str:
    pairs = zip(ALTERNATIVES[1:], row[1:], strict=True)
    return f"- **{_plain(row[0])}**: {_plain(', '.join(f'{head} {cell}' for head, cell in pairs))}"


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text escaped for Markdown: special characters become character references."""
    signs = "\\`*_{}[]<>&|#~!$:"
    words = " ".join(text.split())
    return words if words == "---" else "".join(f"&#{ord(c)};" if c in signs else c for c in words)


def _range(
    ends: Mapping[str, float] | None, unit: str = "", prefix: str = "", digits: int = 1
) -> str:
    return span((ends["low"], ends["high"]), unit, prefix, digits) if ends else "unknown"


def _limit(limit: float | None, fits: bool, words: str) -> str:
    if limit is None:
        return "none"
    return words.format(limit) + (": fits" if fits else ": DOES NOT FIT")
