"""Lets a person promote a model, roll back to the previous champion, or retire the champion."""

from __future__ import annotations

from airflow.sdk import get_current_context

from fastcpt.files import HOME
from fastcpt.registry import champion
from notifications import tell
from tracking import follow


def change() -> str:
    """Do what the form says, and record who triggered it and why. Returns what happened."""
    context = get_current_context()
    values, who = context["params"], context["dag_run"].triggering_user_name or "unknown"
    recipe, action, why = values["recipe"], values["action"], values["why"]
    if action == "promote":
        model = values["model"] or ""
        done, event = champion.promote(HOME, recipe, model, who, why), champion.PROMOTED
    elif action == "rollback":
        done, event = champion.rollback(HOME, recipe, who, why), champion.ROLLED_BACK
    else:
        done, event = champion.retire(HOME, recipe, who, why), champion.RETIRED
    print(done)
    follow(patience=10.0)
    tell(context, event, f"{done} ({who})")
    return done
