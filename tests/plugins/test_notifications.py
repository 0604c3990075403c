"""Notifications of a run, as they arrive at a mail server and at a webhook."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from airflow.providers.standard.operators.hitl import ApprovalOperator

import notifications
import steps.report
import steps.training
from approval import ApprovePlan
from fastcpt.files import write_json
from fastcpt.recipe import load_recipe
from fastcpt.reporting.record import add_text, failures, record_folder
from receivers import MailServer, WebServer, receivers, settings_of

if TYPE_CHECKING:
    from conftest import Run

LINK = "http://airflow.example/dags/fast_cpt/runs/a%3Arun/tasks/train_cpt?try_number=2"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(notifications, "HOME", tmp_path / "told")
    return tmp_path / "told"


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MailServer, WebServer]]:
    with receivers() as (mail, web):
        for name, value in settings_of(mail, web, "ann@example.org, bob@example.org").items():
            monkeypatch.setenv(name, value)
        yield mail, web


def context(error: Exception | None = None, map_index: int = -1, clears: int = 0) -> Any:
    names = {"dag_id": "fast_cpt", "run_id": "a:run", "task_id": "train_cpt"}
    task = SimpleNamespace(**names, map_index=map_index, log_url=LINK)
    return {"ti": task, "dag_run": SimpleNamespace(clear_number=clears), "exception": error}


HOSTILE = "loss is {{ var.value.hf_token }} <b>nan</b> & {% raw %}\nat step 7"


def test_a_failure_arrives_by_mail_with_reason_and_link(received: Any) -> None:
    mail, _ = received
    notifications.tell_failure(context(ValueError(HOSTILE)))
    ((recipients, message),) = mail.received
    assert recipients == ["ann@example.org", "bob@example.org"]
    assert message["From"] == "airflow@example.org"
    assert message["Subject"] == "Fast CPT: failed: train_cpt of fast_cpt, a:run"
    body = message.get_body(("html",))
    assert body is not None
    assert body.get_content().strip() == (
        "<pre>loss is {{ var.value.hf_token }} &lt;b&gt;nan&lt;/b&gt; &amp; {% raw %}\nat step 7</pre>"
        f'<p><a href="{LINK}">{LINK}</a></p>'
    )


def test_a_failure_arrives_at_the_webhook_in_slacks_form(received: Any) -> None:
    _, web = received
    notifications.tell_failure(context(ValueError(HOSTILE)))
    assert web.received == [
        {
            "text": "*Fast CPT: failed: train_cpt of fast_cpt, a:run*\n"
            "loss is {{ var.value.hf_token }} &lt;b&gt;nan&lt;/b&gt; &amp; {% raw %}\nat step 7\n"
            f"<{LINK}|Open>"
        }
    ]


def test_nobody_is_told_where_nothing_is_set_up() -> None:
    notifications.tell_failure(context(ValueError("x")))


@pytest.mark.parametrize("way", ["mail", "webhook"])
def test_a_way_that_fails_raises_nothing_and_the_other_one_is_taken(
    received: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    mail, web = received
    if way == "mail":
        refused = '{"conn_type": "smtp", "host": "127.0.0.1", "port": 1}'
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", refused)
    else:
        web.answer = 404
    with caplog.at_level(logging.ERROR, "notifications"):
        notifications.tell_failure(context(ValueError("the disk is full")))
    assert "could not tell: Fast CPT: failed: train_cpt" in caplog.text
    # the webhook's address is its secret
    assert "/services/" not in caplog.text
    assert len(web.received) == 1
    assert len(mail.received) == (way == "webhook")


def test_a_task_that_was_ended_from_outside_is_told_too(received: Any, home: Path) -> None:
    notifications.tell_failure(context())
    told = failures(record_folder(home, "a:run"))
    assert told == {"train_cpt": "The task was ended from outside, or its machine went away."}
    assert "its machine went away" in received[1].received[0]["text"]


def test_of_mapped_tasks_one_is_told_and_again_after_a_clear(
    received: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "HOME", tmp_path)
    write_json(record_folder(tmp_path, "a:run") / "run.json", {})
    for clears in (0, 1):
        for index in range(3):
            notifications.tell_failure(context(ValueError(f"{index}"), index, clears))
    assert [post["text"].split("\n")[1] for post in received[1].received] == ["0", "0"]


@pytest.mark.parametrize(
    ("step", "evaluation", "then"),
    [
        ("gate", "evaluation.json", "Stage 2 begins."),
        ("gate_stage2", "evaluation_stage2.json", "the run ends here."),
    ],
)
def test_a_missed_gate_is_told_once_with_its_figures_however_often_it_is_tried(
    received: Any,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    evaluation: str,
    then: str,
) -> None:
    run.params["recipe"] = "sample"
    record = Path(run.step("plan")["record"])
    monkeypatch.setattr(notifications, "HOME", record.parents[1])
    write_json(record / evaluation, {"random": {"model": {"perplexity": 20.0}}})
    run.results["train_cpt_stage2"] = {"model": "/m/final"}
    for _ in range(2):  # its worker was killed after it had told
        try:
            run.step(step)
        except ValueError as error:
            notifications.tell_failure(context(error))
    ((_, message),) = received[0].received
    assert message["Subject"] == f"Fast CPT: gate missed: {step} of fast_cpt, a:run"
    (post,) = received[1].received
    assert "validation perplexity 20.00; not below" in post["text"]
    assert "not below the gate's 18" in post["text"]
    assert then in post["text"]


def test_spending_above_the_plan_is_told_once_and_stage_2_has_a_plan_of_its_own(
    received: Any, run: Run
) -> None:
    run.params["recipe"] = "sample"
    record = Path(run.step("plan")["record"])
    recipe = load_recipe("sample", {"cluster.cpu_only": False, "budget.price_per_gpu_hour": 30.0})
    add_text(record, "recipe.yaml", recipe.to_yaml())
    plan = {"cost": {"low": 40.0, "high": 60.0}, "stage2_cost": {"low": 10.0, "high": 20.0}}
    write_json(record / "plan.json", plan)

    def train(task: str, hours: float) -> None:
        run.task_id = task
        files: dict[str, str | None] = {"status": f'{{"seconds": {hours * 3600}}}', "result": "{}"}
        steps.training.keep_training(run.context, files, {})

    train("train_cpt", 1.0)  # on 2 GPUs: 60 USD
    train("train_cpt_stage2", 0.25)  # 75 of 80
    assert received[1].received == []
    train("train_sft", 0.25)
    train("train_sft", 0.5)
    ((_, message),) = received[0].received
    assert message["Subject"].startswith("Fast CPT: spent more than planned: train_sft of fast_cpt")
    assert "90.00 USD so far; planned were 80.00 at most" in received[1].received[0]["text"]


def test_a_plan_that_waits_for_approval_is_told_with_a_link_to_the_page_that_asks(
    received: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.params |= {"recipe": "sample", "require_approval": True}
    run.step("plan")
    run.task_id, run.results["build"] = "approve_plan", {"corpus": {"tokens": 20_000}}
    host = {"gpus": [], "memory_gb": 16.0, "disk_free_gb": 90.0}
    run.results["check_cluster"] = host
    # what follows is Airflow's: it stores the question and waits
    monkeypatch.setattr(ApprovalOperator, "execute", lambda *_: None)
    ApprovePlan(task_id="approve_plan").execute(run.context)
    ((_, message),) = received[0].received
    assert message["Subject"] == "Fast CPT: waiting for approval: approve_plan of fast_cpt, a:run"
    (post,) = received[1].received
    assert "plan of 'sample'" in post["text"]
    assert "<http://airflow.example/dags/fast_cpt/required_actions|Open>" in post["text"]


def test_a_run_that_failed_is_told_by_the_task_that_did(received: Any) -> None:
    notifications.tell_failure(
        context(steps.report.RunFailed("the run did not succeed: plan failed"))
    )
    assert received[0].received == received[1].received == []


def test_the_test_button_of_the_webhook_sends_a_message(received: Any) -> None:
    hook = notifications.WebhookHook()
    assert hook.test_connection() == (True, "a message was sent")
    received[1].answer = 403
    assert hook.test_connection() == (False, "the webhook answered 403: ")
