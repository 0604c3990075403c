"""Three weeks of a schedule in a running Airflow: from the base model, with a broken file, on from the champion.

What is told arrives at real receivers, each incident once; then a person rolls back, and promotes in a shell.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from corpus.made import act, text_of
from fastcpt.files import read_json, write_json
from fastcpt.registry.champion import champion, models
from fastcpt.reporting.record import read
from receivers import MailServer, WebServer, receivers
from stack_module import SCRIPTS

if TYPE_CHECKING:
    from conftest import Run, Stack

pytestmark = pytest.mark.faults

RECIPE, SCHEDULE = "year", "fast_cpt_weekly"
WORDS = text_of(0, 400).split()


class Weeks:
    def __init__(self, stack: Stack, mail: MailServer, web: WebServer) -> None:
        self.stack, self.mail, self.web = stack, mail, web
        self.documents = stack.home / "law"
        self.documents.mkdir()
        smtp = json.loads(mail.connection)
        self.post("connections", connection_id="smtp_default", **_with_text_extra(smtp))
        hook = json.loads(web.connection)
        self.post("connections", connection_id="fast_cpt_webhook", **hook)
        self.post("variables", key="fast_cpt_mail_to", value="ann@example.org")
        overrides = {
            "name": RECIPE,
            "documents.path": str(self.documents),
            "corpus.num_shards": 2,
            "corpus.validation_share": 0.15,
            "selection.top_share": None,
            "training.max_steps": 10,
            "gate.perplexity_threshold": 90_000.0,
            "recurring.start": "champion",
        }
        schedule = {"time": "0 3 1 1 *", "recipe": "sample", "overrides": overrides}
        write_json(stack.home / "schedules.yaml", {"weekly": schedule})
        self.until(lambda: self.get(f"dags/{SCHEDULE}").status_code == 200)

    def get(self, path: str) -> Any:
        return self.stack.api.client.get(f"/api/v2/{path}")

    def post(self, path: str, **content: Any) -> Any:
        answer = self.stack.api.client.post(f"/api/v2/{path}", json=content)
        answer.raise_for_status()
        return answer.json()

    def until(self, holds: Callable[[], bool], seconds: float = 1200) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end
            time.sleep(1)

    def deliver(self, name: str, first: int, count: int, more: str = "") -> None:
        numbers = range(first, first + count)
        records = [act(n, year=2000 + n % 20) | {"full_text": _text(n)} for n in numbers]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.documents / name).write_text(lines + more)

    def begin(self) -> str:
        return str(self.post(f"dags/{SCHEDULE}/dagRuns", logical_date=None)["dag_run_id"])

    def state(self, run: str) -> str:
        return str(self.get(f"dags/{SCHEDULE}/dagRuns/{run}").json()["state"])

    def end(self, run: str) -> None:
        self.until(lambda: self.state(run) in ("success", "failed"))

    def runs(self) -> list[Run]:
        """The runs of ``fast_cpt`` that the schedule began, the oldest first."""
        found = self.stack.api.get("dagRuns", limit=100)["dag_runs"]
        ids = sorted(run["dag_run_id"] for run in found if "weekly__" in run["dag_run_id"])
        return [self.stack.look(run) for run in ids]

    def told(self) -> list[str]:
        """What was told so far, by webhook; the mails say the same."""
        heads = [post["text"].partition(": ")[2].partition(":")[0] for post in self.web.received]
        subjects = [str(mail["Subject"]).split(": ")[1] for _, mail in self.mail.received]
        assert sorted(subjects) == sorted(heads)
        return heads

    def host(self, sign: signal.Signals) -> None:
        """Stop the SSH server of the GPU host, or let it go on."""
        (server,) = [one for one in self.stack.state["processes"] if one["command"] == "sshd"]
        os.kill(server["pid"], sign)


def _text(number: int) -> str:
    """Words as often as in a language: there is more to learn than ten steps do."""
    shares = [1 / place for place in range(1, len(WORDS) + 1)]
    return " ".join(random.Random(number).choices(WORDS, shares, k=300))


def _with_text_extra(connection: dict[str, Any]) -> dict[str, Any]:
    return {**connection, "extra": json.dumps(connection["extra"])}


def test_three_weeks_and_a_rollback(stack: Stack) -> None:
    with receivers() as (mail, web):
        weeks = Weeks(stack, mail, web)
        weeks.deliver("week-1.jsonl", 0, 60)
        weeks.end(weeks.begin())
        first = weeks.runs()[0]
        assert first.outcome == "success", first.states()
        assert read_json(first.record / "start.json") == {}
        best = champion(stack.home, RECIPE)
        assert best is not None
        assert weeks.told() == ["promoted"]

        weeks.deliver("week-2.jsonl", 100, 30, more="{broken\n" * 20)
        weeks.end(weeks.begin())
        assert weeks.runs()[1].outcome == "failed"
        assert weeks.told() == ["promoted", "failed"]

        # mended; and the host is away for the run's first try of it
        weeks.deliver("week-2.jsonl", 100, 30)
        weeks.deliver("week-3.jsonl", 200, 30)
        weeks.host(signal.SIGSTOP)
        try:
            third = weeks.begin()
            weeks.until(lambda: len(weeks.runs()) == 3)
            weeks.until(lambda: weeks.runs()[2].states().get("check_cluster") == "up_for_retry")
        finally:
            weeks.host(signal.SIGCONT)
        weeks.end(third)
        last = weeks.runs()[2]
        assert last.outcome == "success", last.states()
        _went_on_from(stack, last, best)
        assert weeks.told() == ["promoted", "failed", "promoted"]

        began = time.monotonic()
        weeks.end(weeks.begin())
        assert time.monotonic() - began < 60
        assert len(weeks.runs()) == 3

        # a file with nothing new in it: the run ends before it needs a GPU, and has taken it
        weeks.deliver("again.jsonl", 200, 30)
        weeks.end(weeks.begin())
        states = weeks.runs()[3].states()
        assert (weeks.runs()[3].outcome, states["build"]) == ("success", "skipped"), states
        assert states["train_cpt"] == states["publish"] == "skipped"
        weeks.end(weeks.begin())
        assert len(weeks.runs()) == 4

        again = champion(stack.home, RECIPE)
        form = {"recipe": RECIPE, "action": "rollback", "model": None, "why": "wrong dates"}
        weeks.post("dags/fast_cpt_champion/dagRuns", logical_date=None, conf=form)
        weeks.until(lambda: champion(stack.home, RECIPE) == best, 120)
        weeks.until(lambda: len(weeks.web.received) == len(weeks.mail.received) == 4, 60)
        assert weeks.told()[3:] == ["rolled back"]
        assert (stack.home / "models" / RECIPE / "champion").resolve().name == best

        # in a shell, which knows nothing of Airflow's connections
        words = ["--recipe", RECIPE, "promote", str(again), "--why", "the dates are right"]
        subprocess.run([sys.executable, SCRIPTS / "champion.py", *words], check=True)
        weeks.until(lambda: len(weeks.web.received) == len(weeks.mail.received) == 5, 300)
        assert weeks.told()[4:] == ["promoted"]
    (stack.home / "schedules.yaml").unlink()


def _went_on_from(stack: Stack, run: Run, best: str) -> None:
    """The run trained the champion further, on all that had come since, and a replay."""
    gone_on = read(run.record, "corpus_manifest.json")["gone_on"]
    assert gone_on["model"] == best
    # of the 60 acts of two weeks some are held out by their hash or as the newest
    assert 40 <= gone_on["new_documents"] <= 60
    assert 0 < gone_on["replayed_tokens"] <= gone_on["new_tokens"] / 3
    share = (gone_on["new_tokens"] + gone_on["replayed_tokens"]) / gone_on["all_tokens"]
    assert read(run.record, "train_cpt/training.json")["steps"] == -(-10 * share // 1)
    facts = models(stack.home, RECIPE)[str(champion(stack.home, RECIPE))]
    assert (facts["gone_on_from"], len(facts["corpora"])) == (best, 2)
