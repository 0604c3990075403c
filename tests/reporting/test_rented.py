"""The cost of a run that rents its host: its machines, each from the request to its release."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastcpt.recipe import load_recipe
from fastcpt.reporting.progress import progress
from fastcpt.reporting.record import add, add_cost, add_text, open_record, rented, took
from fastcpt.reporting.summary import summary


def machine(asked: float, released: float | None, price: float) -> dict[str, object]:
    return {"asked": asked, "released": released, "price_per_hour": price}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    record = open_record(tmp_path, "run", "fast_cpt", load_recipe("sample"))
    now = time.time()
    # half an hour of a machine of 20 USD that was taken away, and one of 24 that is there for a quarter
    machines = [machine(now - 4000, now - 2200, 20.0), machine(now - 900, None, 24.0)]
    add(record, "rent.json", {"machines": machines, "money": 50.0})
    return record


def test_money_is_what_was_rented_over_all_machines(record: Path) -> None:
    assert rented(record, time.time()) == pytest.approx(10.0 + 6.0, abs=0.1)
    add(record, "train_cpt/training.json", {"steps": 5, "job_seconds": 600.0, "seconds": 500.0})
    add(record, "evaluation.json", {"job_seconds": 60.0})
    # the jobs' eleven minutes at a table's price are not what was paid
    assert add_cost(record, 2, 3.0)["cost"] == pytest.approx(16.0, abs=0.1)
    assert summary(record)["cost"] == pytest.approx(16.0, abs=0.1)
    assert took(record, 2)["cost"] == pytest.approx(16.0, abs=0.1)


def test_a_host_that_was_there_costs_its_jobs_hours(tmp_path: Path) -> None:
    record = open_record(tmp_path, "run", "fast_cpt", load_recipe("cpt_config"))
    add(record, "train_cpt/training.json", {"job_seconds": 1800.0, "seconds": 1700.0})
    add(record, "evaluation.json", {"job_seconds": 1800.0})
    assert rented(record, time.time()) is None
    assert add_cost(record, 4, 3.0)["cost"] == pytest.approx(12.0)
    assert took(record, 4)["cost"] == pytest.approx(12.0)


def test_the_page_shows_it_while_a_training_goes_on(record: Path) -> None:
    add_text(record, "train_cpt/metrics.jsonl", '{"step": 5, "loss": 2.0}\n')
    found = progress(record)
    assert found is not None
    words = dict(found.facts)["rented so far, the whole run"]
    assert words.startswith("$16.0")
    assert words.endswith(" of $50.00 (budget.money)")
