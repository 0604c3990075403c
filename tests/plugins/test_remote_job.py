"""How the operator and its trigger handle a log, and that no user input reaches a shell."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import job_log
import live
import remote_job
from fastcpt.cluster import jobs
from fastcpt.cluster.remote import ClusterError, ConnectionLost
from fastcpt.recipe import RecipeError, load_recipe
from fastcpt.recipe_form import FORM, form_overrides
from fastcpt.training import commands

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned #",
    "' && touch pwned && '",
    '" ; touch pwned ; "',
    "a\ntouch pwned\n",
    "-oProxyCommand=touch pwned",
    "${IFS}touch${IFS}pwned",
    "|| touch pwned",
    "> pwned",
    "$'\\x0atouch pwned'",
]
text = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=60),
)


@given(words=st.lists(text, min_size=1, max_size=4), value=text, folder=text)
@example(words=HOSTILE, value=HOSTILE[0], folder=HOSTILE[3])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_words_and_values_of_a_job_are_never_interpreted(
    tmp_path: Path, words: list[str], value: str, folder: str
) -> None:
    place = tmp_path / "here"
    place.mkdir(exist_ok=True)
    program = (
        "import os, sys; sys.stdout.buffer.write(repr((sys.argv[1:], os.environ['V'])).encode())"
    )
    job = jobs.Job("j", [["python3", "-c", program, *words]], {"V": value})
    done = subprocess.run(
        ["bash", "-c", job.script],
        cwd=place,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == repr((words, value))
    assert not list(place.iterdir())
    # the folder to start in is a name too
    entered = jobs.Job("k", [["true"]], folder=folder or "/").script
    subprocess.run(["bash", "-c", entered], cwd=place, capture_output=True)
    assert not list(place.iterdir())


TEXT_FIELDS = ["documents", "base_model", "instructions", "tokenizer", "connection"]


def test_every_text_field_of_the_form_is_thrown_at() -> None:
    from fastcpt.recipe_form import form_schema

    schemas = {name: form_schema(name) for name in FORM}
    typed = [name for name, one in schemas.items() if "string" in one["type"] and "enum" not in one]
    assert sorted(typed) == sorted(TEXT_FIELDS)


@given(field=st.sampled_from(TEXT_FIELDS), value=text)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_typed_into_the_form_is_data_or_refused(
    tmp_path: Path, field: str, value: str
) -> None:
    overrides = form_overrides({field: value})
    try:
        recipe = load_recipe("sample", overrides)
    except RecipeError:
        return
    host = commands.Host("/e/bin/python", "/code", "/run/recipe.yaml")
    train = commands.train_cpt_command(
        recipe, host, 29500, corpus="/c", model="/m", output="/o", stage="stage1"
    )
    initialise = commands.initialise(recipe, host, "/c", "/m")
    script = jobs.Job("j", [*initialise, train], commands.environment(recipe, host)).script
    # the commands are the same whatever is typed there: it travels in the recipe's file
    plain = load_recipe("sample")
    expected = commands.train_cpt_command(
        plain, host, 29500, corpus="/c", model="/m", output="/o", stage="stage1"
    )
    assert train == expected
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    if field == "connection":
        # Airflow's name of a connection: letters, digits and a few signs
        assert set(value) <= set("_.-") | {c for c in value if c.isalnum() and c.isascii()}


@pytest.mark.parametrize("name", ["../../etc", "a/b", "$(id)", "a b\n"])
def test_a_job_is_a_folder_of_its_own_whatever_the_run_is_called(name: str) -> None:
    folder = jobs.job_name("fast_cpt", name, "train_cpt", -1)
    assert "/" not in folder
    assert ".." not in folder
    assert folder.isprintable()
    assert " " not in folder


def test_a_line_is_shown_when_it_is_whole_and_counted_then() -> None:
    assert job_log.lines_of(b"one\ntwo\nthr", whole=False) == (["one", "two"], 8)
    assert job_log.lines_of(b"thr", whole=False) == ([], 0)
    assert job_log.lines_of(b"three", whole=True) == (["three"], 5)
    assert job_log.lines_of(b"", whole=True) == ([], 0)


def test_a_progress_bar_is_its_last_state() -> None:
    assert job_log.lines_of(b"10 %\r20 %\r30 %\n", whole=False)[0] == ["30 %"]
    assert job_log.lines_of(b"dos\r\n", whole=False)[0] == ["dos"]


def test_bytes_that_are_no_text_are_marked_and_lose_nothing_else() -> None:
    assert job_log.lines_of(b"\xff ok\n", whole=False)[0] == ["\ufffd ok"]


@pytest.mark.parametrize("end", [0, 1, 2, 3])
def test_a_line_without_end_is_cut_between_characters(end: int) -> None:
    endless = ("€" * 50_000).encode()
    piece = endless[: len(endless) - end]
    lines, taken = job_log.lines_of(piece, whole=False)
    assert len(piece) - taken in (0, 1, 2, 3)
    assert "".join(lines) == "€" * (taken // 3)
    assert max(map(len, lines)) <= job_log.LONGEST_LINE


@given(
    st.binary(max_size=2000),
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_however_a_log_arrives_each_line_comes_once(log: bytes, pieces: list[int]) -> None:
    """What is not taken is read again, as the trigger does it, by pieces of any size."""
    seen, size, shown = 0, 0, []
    for step in range(10_000):
        size = min(len(log), size + pieces[step % len(pieces)])
        piece = log[seen:size]
        whole = size == len(log)
        lines, taken = job_log.lines_of(piece, whole=whole)
        shown += lines
        seen += taken
        if whole and seen == len(log):
            break
    everything, _ = job_log.lines_of(log, whole=True)
    assert shown == everything


def test_the_trigger_tells_how_it_is_made_again() -> None:
    trigger = remote_job.RemoteJobTrigger(
        "c", "/r", "n", "o", 12.5, 13.5, None, {"record": "/r", "task": "t"}
    )
    path, values = trigger.serialize()
    assert path == "remote_job.RemoteJobTrigger"
    assert remote_job.RemoteJobTrigger(**values).serialize() == trigger.serialize()


@pytest.mark.parametrize(
    ("states", "event"),
    [
        (["waiting", "waiting"], {"waiting": "Slurm: PENDING, Resources"}),
        # put back by Slurm: it had its GPUs in time
        (["running", "waiting", "succeeded"], "succeeded"),
    ],
)
def test_a_job_that_does_not_get_its_gpus_is_told_and_one_that_had_them_is_not(
    monkeypatch: pytest.MonkeyPatch, states: list[str], event: Any
) -> None:
    left = iter(states)

    async def poll(*_: object) -> dict[str, Any]:
        status = {"state": next(left), "why": "Slurm: PENDING, Resources"}
        return {"status": status, "log": "", "seen": 0, "size": 0}

    monkeypatch.setattr(remote_job, "remote_of", lambda _: None)
    monkeypatch.setattr(remote_job, "_poll", poll)
    monkeypatch.setattr(remote_job, "POLL_S", 0.2)
    soon = time.time() + 0.1 if event != "succeeded" else time.time() - 1
    trigger = remote_job.RemoteJobTrigger("c", "/r", "n", "o", None, soon)

    async def first() -> dict[str, Any]:
        return dict((await anext(trigger.run())).payload)

    found = asyncio.run(first())
    assert found.get("status", {}).get("state", found) == event


def test_a_job_leaves_its_state_and_its_curve_so_far_in_the_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def read_files(*_: object, **asked: Any) -> dict[str, Any]:
        assert asked == {"paths": {"metrics": "/o/metrics.jsonl"}}
        return {"metrics": '{"step": 10}\n{"step": 20}\n{"ste'}  # the last line is being written

    monkeypatch.setattr(live, "ask_async", read_files)
    news = live.Live(str(tmp_path), "train_cpt", "/o/metrics.jsonl")
    asyncio.run(news.leave(None, {"state": "running"}, "step 20/40"))  # type: ignore[arg-type]
    left = json.loads((tmp_path / "live/train_cpt.json").read_text())
    assert (left["state"], left["line"]) == ("running", "step 20/40")
    assert (tmp_path / "train_cpt/metrics.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


def test_a_host_that_gives_no_curve_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise ConnectionLost("no route to host")

    monkeypatch.setattr(live, "ask_async", away)
    news = live.Live(str(tmp_path), "train_cpt", "/o/metrics.jsonl")
    asyncio.run(news.leave(None, {"state": "running"}, ""))  # type: ignore[arg-type]
    assert not (tmp_path / "train_cpt").exists()


def test_a_cancel_keeps_its_word_while_the_connection_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Airflow calls ``on_kill`` for a user's action alone, which the cancel's message tells it."""
    looking = threading.Event()

    def look_up(connection: str) -> None:
        looking.set()
        time.sleep(0.5)

    monkeypatch.setattr(remote_job, "remote_of", look_up)

    async def cancelled() -> tuple[object, ...]:
        trigger = remote_job.RemoteJobTrigger("c", "/r", "n", "o")
        watching = asyncio.ensure_future(anext(trigger.run()))
        await asyncio.to_thread(looking.wait)
        watching.cancel("the user's word")
        try:
            await watching
        except asyncio.CancelledError as error:
            return error.args
        return ()

    assert asyncio.run(cancelled()) == ("the user's word",)


def test_secrets_are_in_no_script_and_no_text_of_a_job() -> None:
    job = jobs.Job("j", [["true"]], secrets={"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in job.script
    assert "hf_secret" not in repr(job)
    assert base64.b64encode(b"hf_secret").decode() not in job.script


def test_a_private_key_inside_a_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = {"conn_type": "ssh", "host": "h", "extra": {"private_key": "-----BEGIN"}}
    monkeypatch.setenv("AIRFLOW_CONN_WITH_KEY", json.dumps(connection))
    with pytest.raises(ClusterError, match="keep the private key in a file") as refused:
        remote_job.connection_of("with_key")
    assert "BEGIN" not in str(refused.value)
