"""Notifications by e-mail and webhook, if set up, when a run needs a person.

E-mail uses Airflow's ``SmtpNotifier`` and its connection ``smtp_default``, with the addresses in the Airflow
variable ``fast_cpt_mail_to``. The webhook is the connection ``fast_cpt_webhook``. A message that cannot be
sent is logged as an error but fails no task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import httpx
from airflow.sdk import BaseHook, BaseNotifier, Context, Variable
from airflow.sdk.definitions.template import literal
from airflow.sdk.exceptions import AirflowNotFoundException

from fastcpt.files import HOME
from fastcpt.reporting.record import RecordError, add_failure, record_folder

MAIL_TO = "fast_cpt_mail_to"
WEBHOOK = "fast_cpt_webhook"
LONGEST_REASON = 2000
TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class AlreadyTold(Exception):
    """Mixed into an error about which a more specific message was already sent."""


def tell(context: Context, event: str, reason: str, link: str | None = None) -> None:
    """Send a message about a run: the ``event``, the reason, and a link to the task, or ``link``."""
    task = context["ti"]
    subject = " ".join(f"Fast CPT: {event}: {task.task_id} of {task.dag_id}, {task.run_id}".split())
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + " ..."
    for notifier in _notifiers(subject, reason, link or task.log_url):
        try:
            # a copy, as Airflow adds the notifier's fields to the context
            notifier({**context})
        except Exception:
            log.exception("%s could not tell: %s", type(notifier).__name__, subject)


def tell_once(context: Context, event: str, reason: str) -> None:
    """``tell``, but only once for all tries of a task."""
    task = context["ti"]
    clears = getattr(context.get("dag_run"), "clear_number", 0)
    what = f"{event}-{task.task_id}-{clears}".replace(" ", "-")
    if first_time(record_folder(HOME, task.run_id), what):
        tell(context, event, reason)


def tell_changes(context: Context, recipe: str) -> None:
    """Send a message about each new model of a recipe and each change of its champion that has none yet."""
    # not above: the DAG file imports this module, and the registry reads with pyarrow
    from fastcpt.registry.champion import AT_ONCE, event_kind, event_words, take_untold

    while event := take_untold(HOME, recipe):
        by = "" if event["who"] == AT_ONCE else f" ({event['who']})"
        tell(context, event_kind(event), event_words(event) + by)


def tell_failure(context: Context) -> None:
    """A task's ``on_failure_callback``, after its last try failed: record the reason and send a message; for
    mapped tasks only the first one does.
    """
    error, task = context.get("exception"), context["ti"]
    # there is no exception if the task's process or machine disappeared
    reason = str(error or "The task was ended from outside, or its machine went away.")
    try:
        add_failure(HOME, task.run_id, task.dag_id, task.task_id, reason)
    except (OSError, RecordError):  # a full disk or damaged record must not prevent the message
        log.exception("why %s failed could not be kept", task.task_id)
    if isinstance(error, AlreadyTold):
        return
    if task.map_index is not None and task.map_index >= 0:
        tell_once(context, "failed", reason)
    else:
        tell(context, "failed", reason)


def first_time(record: Path, what: str) -> bool:
    """Whether a message ``what`` is sent for the first time for this run; marks it as sent."""
    if not record.is_dir():
        return True
    try:
        (record / "told").mkdir(exist_ok=True)
        (record / "told" / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError as error:  # a full disk: sending twice is better than never
        log.warning("%s: %s", record, error)
    return True


def _notifiers(subject: str, reason: str, link: str) -> Iterator[BaseNotifier]:
    """The notifiers that are set up. Texts are literal, as a reason may look like a template."""
    from airflow.providers.smtp.notifications.smtp import SmtpNotifier

    if to := Variable.get(MAIL_TO, default=None):
        body = f'<pre>{escape(reason)}</pre><p><a href="{escape(link)}">{escape(link)}</a></p>'
        yield SmtpNotifier(to=to, subject=literal(subject), html_content=literal(body))
    try:
        url = BaseHook.get_connection(WEBHOOK).password
    except AirflowNotFoundException:
        return
    yield WebhookNotifier(url, f"*{_slack(subject)}*\n{_slack(reason)}\n<{_slack(link)}|Open>")


def _slack(text: str) -> str:
    return escape(text, quote=False)


class WebhookNotifier(BaseNotifier):
    """Posts ``{"text": ...}``, the format of Slack's incoming webhooks, which others also accept."""

    def __init__(self, url: str | None, text: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.url = url
        self.text = text

    def notify(self, context: Context) -> None:
        if not self.url:
            raise ValueError(f"the connection {WEBHOOK} has no URL (its password)")
        answer = httpx.post(self.url, json={"text": self.text}, timeout=TIMEOUT_S)
        # not httpx's own error, which contains the URL: that is the secret
        if not answer.is_success:
            raise ConnectionError(f"the webhook answered {answer.status_code}: {answer.text[:200]}")


class WebhookHook(BaseHook):
    """The connection type of a webhook; its Test button sends a message."""

    conn_name_attr = "webhook_conn_id"
    default_conn_name = WEBHOOK
    conn_type = "webhook"
    hook_name = "Webhook"

    def __init__(self, webhook_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.connection = webhook_conn_id

    def test_connection(self) -> tuple[bool, str]:
        """Whether a message went through, or why not."""
        url = self.get_connection(self.connection).password
        try:
            WebhookNotifier(url, "Fast CPT: a test of this webhook.").notify({})
        except (ValueError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
            return False, str(error)
        return True, "a message was sent"
