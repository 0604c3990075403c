"""Lets a person promote a model, roll back to the previous champion, or retire the champion.

Changes made in a shell (``champion.py``) are only recorded there: ``tell_untold`` sends their messages.
"""

from __future__ import annotations

from airflow.sdk import get_current_context

from fastcpt.files import HOME
from fastcpt.registry import champion
from notifications import tell_changes
from tracking import follow


def change() -> str:
    """Do what the form says, and record who triggered it and why. Returns what happened."""
    context = get_current_context()
    values, who = context["params"], context["dag_run"].triggering_user_name or "unknown"
    recipe, action, why = values["recipe"], values["action"], values["why"]
    if action == "promote":
        model = values["model"] or ""
        done = champion.promote(HOME, recipe, model, who, why)
    elif action == "rollback":
        done = champion.rollback(HOME, recipe, who, why)
    else:
        done = champion.retire(HOME, recipe, who, why)
    print(done)
    tell_changes(context, recipe)
    follow(patience=10.0)
    return done


def tell_untold() -> None:
    """Send what no message was sent of: changes from a shell, or of a task that was killed before it sent it."""
    context = get_current_context()
    for recipe in champion.untold(HOME):
        print(f"{recipe}: its history has changes of which no message was sent")
        tell_changes(context, recipe)
    follow(patience=10.0)
