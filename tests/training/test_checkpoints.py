"""Checkpoints damaged after they were written, from a real training on two CPU ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcpt.training.digests import digest_of_file, what_is_damaged, write_digests
from training.conftest import launch, train_arguments, write_recipe


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of 12 steps; its checkpoints are those of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = train_arguments(write_recipe(folder), corpus, folder / "out", "--model", model)
    process = launch("train_cpt.py", *arguments)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return folder / "out"


def stopped_after_its_last_checkpoint(trained: Path, out: Path) -> None:
    """A copy of the training as it is when it was killed before it wrote its model."""
    shutil.copytree(trained, out)
    (out / "training.json").unlink()
    shutil.rmtree(out / "final")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:6]))  # what follows is written anew


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (cut, "rank_1.pt", r"rank_1.pt has {half:,} bytes of {whole:,}"),
        (flip, "rank_0.pt", "rank_0.pt has another content than was written"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    trained: Path,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    name: str,
    said: str,
) -> None:
    out = tmp_path / "out"
    stopped_after_its_last_checkpoint(trained, out)
    file = out / "checkpoints" / "step_12" / name
    size = file.stat().st_size
    damage(file)
    arguments = train_arguments(write_recipe(tmp_path), corpus, out, "--model", model)
    process = launch("train_cpt.py", *arguments)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    said = said.format(half=size // 2, whole=size)
    assert f"damaged and not used: checkpoints/step_12: {said}" in output
    assert "going on from checkpoints/step_6" in output
    # the other half again, to the last digit
    again, whole = metrics(out), metrics(trained)
    assert [line["step"] for line in again] == list(range(1, 13))
    for key in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [line[key] for line in again] == [line[key] for line in whole]
    # and the damaged one has been replaced
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step_12", "step_6"]
    digests = json.loads((out / "checkpoints/step_12/digests.json").read_text())
    assert sorted(digests) == ["rank_0.pt", "rank_1.pt", "state.json"]
    for written, digest in digests.items():
        content = (out / "checkpoints" / "step_12" / written).read_bytes()
        assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_is_wrong_with_a_checkpoint_is_told(tmp_path: Path) -> None:
    written = {"state.json": b"{}", "rank_0.pt": bytes(1000)}
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    write_digests(tmp_path, {name: digest_of_file(tmp_path / name) for name in written})
    assert what_is_damaged(tmp_path, 0, 1) is None
    flip(tmp_path / "rank_0.pt")
    seen = [what_is_damaged(tmp_path, rank, 2) for rank in (0, 1)]  # each looks at one file
    assert seen == ["rank_0.pt has another content than was written (its SHA-256 differs)", None]
    (tmp_path / "state.json").unlink()
    assert what_is_damaged(tmp_path, 0, 1) == "state.json is missing"
    cut(tmp_path / "digests.json")
    assert str(what_is_damaged(tmp_path, 0, 1)).startswith("it cannot be read: ")
    (tmp_path / "digests.json").unlink()
    assert what_is_damaged(tmp_path, 0, 1) == "digests.json is missing"


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    # a folder in place of a file: what is read there is an error of the system, not another content
    (tmp_path / "rank_0.pt").mkdir()
    size = (tmp_path / "rank_0.pt").stat().st_size
    write_digests(tmp_path, {"rank_0.pt": {"bytes": size, "sha256": "0" * 64}})
    with pytest.raises(OSError, match=r"rank_0\.pt"):
        what_is_damaged(tmp_path, 0, 1)


def test_where_no_checkpoint_is_whole_the_training_says_so_and_does_not_begin_anew(
    trained: Path, corpus: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_after_its_last_checkpoint(trained, out)
    flip(out / "checkpoints/step_12/rank_1.pt")
    cut(out / "checkpoints/step_6/rank_0.pt")
    arguments = train_arguments(write_recipe(tmp_path), corpus, out, "--model", model)
    process = launch("train_cpt.py", *arguments)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 78, output
    assert f"error: none of the checkpoints in {out}/checkpoints is whole (" in output
    assert "checkpoints/step_12: rank_1.pt has another content" in output
    assert "checkpoints/step_6: rank_0.pt has " in output
    assert "remove the folder to begin again from the first step" in output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_12", "step_6"]
