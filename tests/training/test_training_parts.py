"""The trainer's parts: rows and labels, loss, schedules, the guard, checks before the first step."""

from __future__ import annotations

import copy
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcpt.files import write_json
from fastcpt.recipe_sections import Training
from fastcpt.training.data import DataError, Order, Row, decode_corpus, make_batch, targets_of
from fastcpt.training.exits import TrainingError, exit_code
from fastcpt.training.guard import Guard
from fastcpt.training.model import ChunkedLoss, ModelError, base_of, load_model, packed_inputs
from fastcpt.training.preflight import TriedGpu, check_disk, what_is_wrong
from fastcpt.training.schedule import Clock, learning_rate


def row(*pieces: list[int], labels: list[int] | None = None) -> Row:
    ids = [token for piece in pieces for token in piece]
    return Row(
        np.array(ids, np.int32),
        np.array([len(piece) for piece in pieces], np.int32),
        None if labels is None else np.array(labels, np.int32),
    )


def test_no_token_is_asked_for_the_next_document() -> None:
    assert targets_of(row([5, 6, 7], [8, 9])).tolist() == [6, 7, -100, 9, -100]


def test_labels_of_fine_tuning_are_shifted_within_their_segment() -> None:
    labels = [-100, -100, 7, -100, 9]
    assert targets_of(row([5, 6, 7], [8, 9], labels=labels)).tolist() == [-100, 7, -100, 9, -100]


def test_padding_is_a_segment_of_its_own_without_loss() -> None:
    batch = make_batch([row([5, 6, 7], [8, 9]), row([1, 2])], 6)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch.targets.tolist()[1] == [2, -100, -100, -100, -100, -100]
    assert batch.lengths == [3, 2, 1, 2, 4]


def test_documents_of_a_row_do_not_see_one_another(model: Path) -> None:
    causal, attention = load_model(model, dtype="float32")
    first, second = [5, 9, 30, 7], [40, 41, 90]
    batch = make_batch([row(first, second)], 10)
    together = causal(**packed_inputs(batch, attention, torch.device("cpu"))).logits[0]
    alone = causal(input_ids=torch.tensor([second])).logits[0]
    torch.testing.assert_close(together[4:7], alone, rtol=1e-4, atol=1e-5)
    eager, _ = load_model(model, "eager", dtype="float32")
    same = eager(**packed_inputs(batch, "eager", torch.device("cpu"))).logits[0]
    torch.testing.assert_close(same[:7], together[:7], rtol=1e-4, atol=1e-5)


def test_the_chunked_loss_is_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(11, 4, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 10, 0, -100, -100, 5])
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (plain * 0.3).backward()
    expected = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    loss = ChunkedLoss.apply(hidden, weight, targets, 3)
    (loss * 0.3).backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_an_epoch_takes_every_row_once_and_the_next_another_order() -> None:
    order = Order(10, seed=3)
    first, second = [order[n] for n in range(10)], [order[n] for n in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [Order(10, seed=3)[n] for n in range(10)] == first
    assert [Order(10, seed=4)[n] for n in range(10)] != first


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        # step 0 and 9 of 100 in the warm-up of 10; then at 10, 55 and 100 % of the way
        ("constant", [0.1, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.1, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.1, 1.0, 1.0, 0.5, 0.0]),
        ("warmup_stable_decay", [0.1, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_schedules(kind: str, rates: list[float]) -> None:
    training = Training.model_validate(
        {"max_steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "lr_scheduler_type": kind}
    )
    at = [(0, 0.0), (9, 0.09), (10, 0.1), (55, 0.55), (100, 1.0)]
    assert [learning_rate(training, *place) for place in at] == pytest.approx(rates)


def test_the_last_fifth_decays() -> None:
    training = Training(max_steps=100, warmup_steps=10, lr_scheduler_type="warmup_stable_decay")
    # the clock may be ahead of the steps
    assert learning_rate(training, 20, 0.9) == pytest.approx(0.5 * training.learning_rate)


def test_the_money_of_a_rented_host_shortens_the_time_budget() -> None:
    free, rented = Clock(10.0), Clock(10.0, time.time() + 3600)
    for clock in (free, rented):
        clock.startup, clock.saving, clock.evaluated_tokens = 60.0, 40.0, 500
    # 1000 tokens took 100 s: the evaluation takes a start and 50 s
    assert free.seconds_left(100.0, 1000) == pytest.approx(0.98 * 36_000 - 160 - 40 - 110)
    assert rented.seconds_left(100.0, 1000) == pytest.approx(3600 - 40 - 110, abs=1)
    # where its money is more than the budget, the budget counts
    ample = Clock(1.0, time.time() + 7200)
    assert ample.seconds_left(0.0, 0) == pytest.approx(0.98 * 3600)


def test_the_guard_refuses_what_is_not_finite_or_far_above() -> None:
    guard = Guard(Training(max_skipped_steps=1))
    assert guard.refuses(math.nan, guard.losses)
    assert guard.refuses(math.inf, guard.losses)
    for n in range(64):  # mean 2, deviation 0.1
        assert not guard.refuses(2.1 if n % 2 else 1.9, guard.losses)
    assert not guard.refuses(2.5, copy.copy(guard.losses))
    assert guard.refuses(2.7, guard.losses)
    assert not guard.refuses(0.5, guard.losses)
    wide = Guard(Training(skip_sigmas=8.0))
    wide.losses.extend([1.9, 2.1] * 32)
    assert not wide.refuses(2.7, wide.losses)


def test_only_many_skipped_steps_close_together_end_the_training() -> None:
    guard = Guard(Training(max_skipped_steps=1))
    for step in (1, 129, 257):  # never two of 128
        guard.count(step, math.nan, 1.0)
    assert guard.skipped == 3
    with pytest.raises(TrainingError, match=r"2 of the last 128 .* the last was step 384"):
        guard.count(384, math.nan, 1.0)


def test_gpus_that_cannot_train_together_are_named() -> None:
    good = TriedGpu("one", "H100", 85 * 10**9, True, 700e12)
    assert what_is_wrong([good, good._replace(host="two", flops=600e12)]) is None
    wrong = what_is_wrong([good, good._replace(right=False)])
    assert wrong == "rank 1, H100 on one, computes wrong: take it out of service"
    slow = what_is_wrong([good._replace(flops=400e12), good])
    assert slow is not None
    assert slow.startswith("rank 0, H100 on one, reaches 400 TFLOP/s, the fastest 700: ")
    other = what_is_wrong([good, good._replace(name="A100", host="two")])
    assert other is not None
    assert "H100 of 85 GB on one, A100 of 85 GB on two; leave the odd one out" in other


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1000, 1000, bias=False)
    check_disk(layer, Training(save_total_limit=2), tmp_path)
    # each 12 bytes per weight: 12 MB
    with pytest.raises(TrainingError, match="1000000000 checkpoints, the next one and the model"):
        check_disk(layer, Training(save_total_limit=10**9), tmp_path)


def test_wrong_corpora_are_named(corpus: Path, tmp_path: Path) -> None:
    copied = tmp_path / "corpus"
    shutil.copytree(corpus, copied)
    with pytest.raises(DataError, match=r"row \d+ has \d+ tokens, more than max_seq_length"):
        decode_corpus(copied, 20, tmp_path / "a")
    shard = copied / "cpt_train_shard_01.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_01.parquet: its digest is not the manifest's"):
        decode_corpus(copied, 64, tmp_path / "b")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard_01.parquet is missing"):
        decode_corpus(copied, 64, tmp_path / "b")
    with pytest.raises(DataError, match=r"corpus_manifest.json is missing"):
        decode_corpus(tmp_path, 64, tmp_path / "b")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ModelError("no model there")

    def lost() -> None:
        raise OSError("disk full")

    assert exit_code(lambda: None) == 0
    assert exit_code(wrong) == 78
    assert capsys.readouterr().err == "error: no model there\n"
    assert exit_code(lost) == 1


@pytest.mark.parametrize("place", ["before_sft/t1", "models/t1/final"])
def test_an_adapter_from_another_hosts_root_finds_its_base_under_this_one(
    tmp_path: Path, place: str
) -> None:
    adapter, base = tmp_path / place, tmp_path / "base_models" / "small-ab12-1"
    adapter.mkdir(parents=True)
    write_json(adapter / "base.json", {"base": "/gone/fast_cpt/base_models/small-ab12-1"})
    with pytest.raises(ModelError, match=r"^/gone/fast_cpt/base_models/small-ab12-1: no model"):
        base_of(adapter)
    base.mkdir(parents=True)
    write_json(base / "config.json", {})
    assert base_of(adapter) == str(base)
    write_json(adapter / "base.json", {"base": "org/name"})
    assert base_of(adapter) == "org/name"
