"""The project's steps that send messages, called as Airflow calls them, and the messages that arrive.

Messages go through Airflow's notifiers to a real mail server and a real web server. Each step is called
twice, as if its worker was killed after the work and the task was retried. Airflow calls
``on_failure_callback`` once, after a task's last try; so does ``failed``.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from airflow.sdk import DAG
from airflow.sdk.execution_time.context import set_current_context

REPOSITORY = Path(__file__).resolve().parents[1]
for folder in ("plugins", "tests"):
    sys.path.insert(0, str(REPOSITORY / folder))

import notifications  # noqa: E402
import steps.champion  # noqa: E402
import steps.gate  # noqa: E402
import steps.publish  # noqa: E402
import steps.training  # noqa: E402
from fastcpt.files import write_json  # noqa: E402
from fastcpt.recipe import Recipe  # noqa: E402
from receivers import receivers, settings_of  # noqa: E402

SUBJECT = re.compile(r"Fast CPT: (.+): \w+ of \w+, (\S+?)\*?$")


class Incident(NamedTuple):
    event: str
    run: str


class Run:
    """The steps of a run of ``fast_cpt`` after its corpus was built; ``record`` is its record."""

    def __init__(self, name: str, record: Path, recipe: Recipe) -> None:
        self.name, self.record, self.recipe = name, record, recipe
        self.results: dict[str, Any] = {
            "plan": {"record": str(record), "recipe": str(record / "recipe.yaml")}
        }

    def context(self, task: str, **more: Any) -> Any:
        ti = SimpleNamespace(
            task_id=task,
            dag_id="fast_cpt",
            run_id=self.name,
            map_index=-1,
            log_url="http://airflow.example/log",
            xcom_pull=lambda task_ids: self.results.get(task_ids),
        )
        run = SimpleNamespace(clear_number=0)
        return {"ti": ti, "run_id": self.name, "dag": DAG("fast_cpt"), "dag_run": run, **more}

    def train(self, training: str, hours: float, planned: float) -> None:
        """A training that took ``hours``; its plan's high end is ``planned`` hours."""
        self.results["train_cpt"] = self.results["train_sft"] = {
            "model": f"/root/models/{training}/final"
        }
        price = (self.recipe.budget.price_per_gpu_hour or 0.0) * self.recipe.cluster.gpus
        write_json(self.record / "plan.json", {"cost": {"low": 0.0, "high": planned * price}})
        files: dict[str, str | None] = {
            "status": f'{{"seconds": {hours * 3600}}}',
            "result": "{}",
        }
        context = self.context("train_cpt")
        twice(lambda: steps.training.keep_training(context, files, {"model": ""}))

    def gates(self) -> bool:
        """Whether the model passes the gate; if not, it misses stage 2's gate too."""
        if self._step("gate", steps.gate.gate) == "train_sft":
            return True
        self.results["train_cpt_stage2"] = self.results["train_cpt"]
        evaluation = (self.record / "evaluation.json").read_bytes()
        (self.record / "evaluation_stage2.json").write_bytes(evaluation)
        for _ in range(2):
            try:
                self._step("gate_stage2", steps.gate.gate_stage2)
            except steps.gate.GateMissed as error:
                missed = error
        self.failed("gate_stage2", missed)
        return False

    def _step(self, task: str, step: Callable[[], Any]) -> Any:
        with set_current_context(self.context(task)):
            return twice(step)

    def publish(self, training: str, path: Path) -> str:
        """Publish; returns what the model becomes, in words."""
        steps.publish._decide(self.record, self.recipe, training)
        context = self.context("publish")
        return twice(
            lambda: steps.publish._take_in(context, self.recipe, self.record, str(path), str(path))
        )

    def failed(self, task: str, error: Exception) -> None:
        notifications.tell_failure(self.context(task, exception=error))

    def roll_back(self, why: str) -> None:
        """Roll back by the DAG ``fast_cpt_champion``, whose task has one try."""
        form = {"recipe": self.recipe.name, "action": "rollback", "model": None, "why": why}
        context = self.context("change", params=form)
        context["dag_run"].triggering_user_name = "ann"
        with set_current_context(context), redirect_stdout(StringIO()):
            steps.champion.change()

    def look_for_untold(self) -> None:
        """What the DAG ``fast_cpt_messages`` does after a change in a shell."""
        with set_current_context(self.context("tell_untold")):
            twice(steps.champion.tell_untold)


def twice(step: Callable[[], Any]) -> Any:
    with redirect_stdout(StringIO()):
        first = step()
        step()
    return first


class Told:
    """The messages that arrive by mail and by webhook while it is open, and those that should."""

    def __init__(self, home: Path) -> None:
        for module in (notifications, steps.publish, steps.champion):
            module.HOME = home  # type: ignore[attr-defined]
        self.due: Counter[Incident] = Counter()
        self._open = ExitStack()
        self._mail, self._web = self._open.enter_context(receivers())
        os.environ |= settings_of(self._mail, self._web)

    def expect(self, event: str, run: str, times: int = 1) -> None:
        self.due[Incident(event, run)] += times

    def close(self) -> None:
        self._open.close()

    def wrong(self) -> list[str]:
        """Messages that came too often, too seldom or without cause, by either way."""
        found = []
        subjects = [str(mail["Subject"]).replace("\n", "") for _, mail in self._mail.received]
        heads = [post["text"].partition("\n")[0].strip("*") for post in self._web.received]
        for way, lines in (("mail", subjects), ("webhook", heads)):
            came = Counter(Incident(*SUBJECT.search(line).groups()) for line in lines)  # type: ignore[union-attr]
            for incident in sorted(came.keys() | self.due.keys()):
                if came[incident] != self.due[incident]:
                    times = f"{came[incident]} times in place of {self.due[incident]}"
                    found.append(f"{incident.run}: {incident.event}: {times} by {way}")
        return found
