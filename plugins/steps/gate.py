"""The gate on validation perplexity: fine-tuning, a second stage, or the end."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import Context, get_current_context

from fastcpt.files import read_json
from fastcpt.gate import Decision, decide, words
from fastcpt.recipe import RecipeError
from notifications import AlreadyTold, tell_once
from steps.results import result_of, trained_by
from steps.run import planned_recipe


def _decide(context: Context, evaluation: str, gate: str, missed: str) -> Decision:
    """The gate's decision, also written to the record; ``missed`` says what happens after a miss."""
    from fastcpt.reporting.record import add

    plan = result_of(context, "plan")
    settings, record = planned_recipe(plan).gate, Path(plan["record"])
    decision = decide(
        read_json(record / evaluation), settings.perplexity_threshold, settings.validation_set
    )
    add(record, gate, decision)
    found = f"validation perplexity {words(decision)}"
    print(found)
    if not decision["passed"]:
        tell_once(context, "gate missed", f"{found}. {missed}")
    return decision


class GateMissed(RecipeError, AlreadyTold):
    """The gate was missed and there is no further stage."""


def gate() -> str:
    """Continue with fine-tuning if perplexity is below the recipe's threshold, else with stage 2."""
    context = get_current_context()
    decision = _decide(context, "evaluation.json", "gate.json", "Stage 2 begins.")
    return "train_sft" if decision["passed"] else "train_cpt_stage2"


def gate_stage2() -> Decision:
    """The same rule after stage 2; the run fails if the model still misses it."""
    context = get_current_context()
    decision = _decide(
        context,
        "evaluation_stage2.json",
        "gate_stage2.json",
        "That was stage 2: the run ends here.",
    )
    if not decision["passed"]:
        raise GateMissed(
            f"validation perplexity is {decision['value']:.2f} after stage 2, not below "
            f"{decision['threshold']:g} (gate.perplexity_threshold). Try more steps "
            "(stage2.max_steps) or a higher stage2.learning_rate, more documents "
            "(selection.target_tokens, a lower quality_threshold), a stronger base model, or another "
            f"threshold. The model is kept: {trained_by(context, 'train_cpt_stage2')['model']} on the "
            "cluster"
        )
    return decision
