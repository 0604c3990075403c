"""A checkpoint is written while the training changes its weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastcpt.training import checkpoint_writer
from fastcpt.training.checkpoint_writer import CheckpointWriter
from fastcpt.training.digests import save_tensors, what_is_damaged


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What the optimizer knows, in place of an engine's."""
    weights = torch.arange(5, dtype=torch.float32)
    content = {"slices": {"w": [weights, {"codes": weights}]}, "adam_step": 1.0}
    monkeypatch.setattr(checkpoint_writer, "own_state", lambda _: content)
    return weights


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before the event is set."""
    may_write = threading.Event()

    def save(content: Any, path: Path) -> Any:
        assert may_write.wait(60)
        return save_tensors(content, path)

    monkeypatch.setattr(checkpoint_writer, "save_tensors", save)
    return may_write


def test_what_is_written_is_what_was_there_when_it_began(
    tmp_path: Path, weights: torch.Tensor, slow_disk: threading.Event
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.begin(None, {"step": 3})
    weights.zero_()  # the next step, before a byte is on the disk
    assert writer.begun
    assert writer.writing
    assert not list(tmp_path.glob("step_*"))
    slow_disk.set()
    written = writer.complete()
    assert (written.step, writer.begun, writer.writing) == (3, False, False)
    assert written.stopped > 0
    kept = torch.load(tmp_path / "step_3" / "rank_0.pt")["slices"]["w"]
    assert kept[0].tolist() == kept[1]["codes"].tolist() == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "step_3/state.json").read_text()) == {"step": 3, "ranks": 1}
    assert what_is_damaged(tmp_path / "step_3", 0, 1) is None


@pytest.mark.usefixtures("weights")
def test_the_newest_are_kept_and_what_a_killed_training_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".step_2.partial").mkdir()
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (4, 6, 8):
        writer.begin(None, {"step": step})
        writer.complete()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_6", "step_8"]
    writer.begin(None, {"step": 8})  # it is there already
    assert not writer.begun


@pytest.mark.usefixtures("weights")
def test_a_full_disk_ends_the_training_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.begin(None, {"step": 1})
    writer.complete()

    def full(content: Any, path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint_writer, "save_tensors", full)
    writer.begin(None, {"step": 2})
    with pytest.raises(OSError, match=r"step_2 could not be written: .*No space left on device"):
        writer.complete()
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_1"]


def test_without_memory_for_a_copy_the_training_waits(
    tmp_path: Path, weights: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two ranks of this host with 40 B each, and 100 B free, of which 10 are left alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, copied in ((100, True), (88, False)):
        memory = type("memory", (), {"available": free})
        monkeypatch.setattr(checkpoint_writer.psutil, "virtual_memory", lambda m=memory: m)
        assert checkpoint_writer.has_room({"w": [weights, {"codes": weights}]}) == copied
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.begin(None, {"step": 1})
    assert not writer.writing
    written = writer.complete()
    assert written.stopped >= written.seconds
