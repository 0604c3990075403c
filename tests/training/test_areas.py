"""One adapter per legal area: its segments, its training, its figures, and the mean of all."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastcpt.best_fit import best_fit
from fastcpt.files import read_json, write_json
from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recipe_sections import Training
from fastcpt.training.data import AreaRows, DataError, ListRows, Row, decode_corpus
from fastcpt.training.exits import TrainingError, exit_code
from fastcpt.training.model import load_model
from fastcpt.training.publish import publish
from fastcpt.training.schedule import phases_of
from fastcpt.training.validation import HeldOutDocument
from training.conftest import INCLUDE, launch, start, train_arguments, write_recipe, write_shards
from training.test_evaluation import write_set
from training.test_trainer import finish, metrics

AREAS = {"falling fast": ["down"], "rising": ["up", "upward"]}
SIZE = 64


def test_the_longest_segment_goes_first_into_the_fullest_row_with_room() -> None:
    # rows of 8: 6; 5; 5; 3 fits a 5 exactly, 2 the 6, 1 what is left of the other 5
    assert sorted(best_fit([5, 3, 6, 2, 5, 1], 8)) == [[0, 5], [2, 3], [4, 1]]


def test_an_areas_rows_are_its_segments_and_no_others(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]]
    pieces = [[2, 3, 1], [3], [1, 3]]
    areas: list[list[list[str] | None]] = [
        [["up"], ["down", "upward"], None],
        [[]],
        [["sideways"], ["up", "down"]],
    ]
    write_shards(tmp_path, [rows[:2], rows[2:]], [pieces[:2], pieces[2:]], [areas[:2], areas[2:]])
    scratch = decode_corpus(tmp_path, 6, tmp_path / "scratch", AREAS)

    def seen(area: int) -> list[list[int]]:
        found = AreaRows(scratch, 6, area)
        taken = []
        for n in range(len(found)):
            row = found[n]
            assert len(row.input_ids) <= 6
            ends = np.cumsum(row.lengths)[:-1]
            taken += [piece.tolist() for piece in np.split(row.input_ids, ends)]
        return sorted(taken)

    assert seen(0) == [[3, 4, 5], [11, 12, 13]]
    assert seen(1) == [[1, 2], [3, 4, 5], [11, 12, 13]]
    with pytest.raises(DataError, match=r"lora\.areas\.empty: no segment of the corpus"):
        decode_corpus(tmp_path, 6, tmp_path / "scratch", {"empty": ["nothing"]})
    write_shards(tmp_path, [rows], [pieces])
    with pytest.raises(DataError, match=r"no column areas, which lora\.areas needs"):
        decode_corpus(tmp_path, 6, tmp_path / "scratch", AREAS)


def test_areas_share_the_steps_as_they_share_the_rows() -> None:
    def rows(many: int) -> ListRows:
        return ListRows([Row(np.zeros(1, np.int32), np.ones(1, np.int32))] * many, 1)

    training = Training(max_steps=100, warmup_steps=20)
    first, second = phases_of(training, {"a": rows(30), "b": rows(10)})
    assert (first.begin, first.end, second.begin, second.end) == (0, 0.75, 0.75, 1)
    assert (first.training.max_steps, first.training.warmup_steps) == (75, 15)
    assert (second.training.max_steps, second.training.warmup_steps) == (25, 5)
    with pytest.raises(
        TrainingError, match=r"leave none for lora\.areas\.b, which has 1 of 1000 rows"
    ):
        phases_of(training, {"a": rows(999), "b": rows(1)})


def test_the_names_of_areas_are_names_of_folders(tmp_path: Path) -> None:
    for name in ("../up", "a/b", ""):
        recipe = write_recipe(tmp_path, lora={"areas": {name: ["up"]}})
        with pytest.raises(ValueError, match=r"lora\.areas"):
            load_recipe(recipe)


@pytest.fixture(scope="module")
def legal(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that rise among the low tokens and fall among the high; a held-out document of each."""
    folder = tmp_path_factory.mktemp("areas")
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    drawn = np.random.default_rng(0)
    rows, areas = [], []
    for _ in range(60):
        up, down = (int(n) for n in drawn.integers([3, 190], [60, 250]))
        rows.append([*range(up, up + 30), *range(down, down - 30, -1)])
        areas.append([["up"], ["down"]])
    write_shards(folder, [rows], [[[30, 30]] * 60], [areas])
    held_out = [
        HeldOutDocument("up", np.arange(20, 80, dtype=np.int32), 100, 2020, ("up",)),
        HeldOutDocument("down", np.arange(240, 180, -1, dtype=np.int32), 100, 2021, ("down",)),
        HeldOutDocument("other", np.arange(3, 63, 2, dtype=np.int32), 100, None, ()),
    ]
    write_set(folder / "validation", held_out)
    return folder


LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "areas": AREAS}
TRAINING = {"max_steps": 40, "save_steps": 8, "learning_rate": 0.03, "warmup_steps": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    target = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return write_recipe(folder, lora={**LORA, "target_modules": target}, training=TRAINING)


@pytest.fixture(scope="module")
def trained(
    legal: Path, model: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    arguments = train_arguments(recipe, legal, out, "--model", model)
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert "adapter rising: 30 rows" in output
    return out


def loss(model: Any, begin: int, step: int) -> float:
    ids = torch.arange(begin, begin + 40 * step, step)[None]
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_each_adapter_knows_its_own_area(trained: Path, model: Path) -> None:
    result = json.loads((trained / "training.json").read_text())
    assert result["steps"] == 40
    assert {area: done["steps"] for area, done in result["areas"].items()} == {
        "rising": 20,
        "falling fast": 20,
    }
    lines = metrics(trained)
    assert [line["area"] for line in lines] == ["falling fast"] * 20 + ["rising"] * 20
    rates = [line["learning_rate"] for line in lines]
    assert rates[:20] == pytest.approx(rates[20:])  # warm-up and decay for each
    assert lines[20]["loss"] == pytest.approx(lines[0]["loss"], abs=0.3)  # from the base again
    base = AutoModelForCausalLM.from_pretrained(model)
    losses = {}
    for area in AREAS:
        adapted, _ = load_model(trained / "final" / "areas" / area, dtype="float32")
        losses[area] = loss(adapted, 30, 1), loss(adapted, 230, -1)
    up, down = loss(base, 30, 1), loss(base, 230, -1)
    assert losses["rising"][0] < up - 0.15
    assert losses["falling fast"][1] < down - 0.15
    assert losses["rising"][0] < losses["falling fast"][0] - 0.15
    assert losses["falling fast"][1] < losses["rising"][1] - 0.15


def test_the_final_model_is_the_mean_of_the_adapters(trained: Path, model: Path) -> None:
    base = load_file(model / "model.safetensors")
    added = []
    for area in AREAS:
        adapted, _ = load_model(trained / "final" / "areas" / area, dtype="float32")
        whole = adapted.merge_and_unload().state_dict()
        added.append({name: whole[name] - weight for name, weight in base.items()})
    mean, _ = load_model(trained / "final", dtype="float32")
    whole = mean.merge_and_unload().state_dict()
    for name, weight in base.items():
        expected = weight + (added[0][name] + added[1][name]) / 2
        torch.testing.assert_close(whole[name], expected, rtol=1e-4, atol=1e-6)


def test_a_killed_run_goes_on_with_the_adapter_it_was_at(
    trained: Path, legal: Path, model: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = train_arguments(recipe, legal, out, "--model", model)
    process = launch("train_cpt.py", *arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 27/40"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.read()
    process.wait(60)
    # killed before the checkpoint of step 24, it goes on from the one between the adapters
    shutil.rmtree(out / "checkpoints" / "step_24")
    assert [path.name for path in (out / "areas").iterdir()] == ["falling fast"]
    code, output = finish(launch("train_cpt.py", *arguments, ranks=1))
    assert code == 0, output
    assert "going on from checkpoints/step_20" in output
    whole = [line["loss"] for line in metrics(trained)]
    assert [line["loss"] for line in metrics(out)] == pytest.approx(whole, rel=3e-4)
    file = "final/areas/falling fast/adapter_model.safetensors"
    straight, kept = load_file(trained / file), load_file(out / file)
    assert all(torch.allclose(kept[name], weight) for name, weight in straight.items())


def test_each_adapter_is_evaluated_on_its_area_beside_mean_and_base(
    trained: Path, legal: Path, model: Path, recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation.json"
    code, said = finish(
        launch(
            "evaluate_cpt_checkpoint.py",
            *("--config", recipe, "--checkpoint", trained, "--base_model", model),
            *("--validation_data", legal, "--output", output, "--in_parts"),
        )
    )
    assert code == 0, said
    found = json.loads(output.read_text())["random"]
    assert set(found["adapters"]) == set(AREAS)
    for (area, figures), (begin, step), key in zip(
        found["adapters"].items(), [(240, -1), (20, 1)], ["down", "up"], strict=True
    ):
        assert figures["adapter"]["documents"] == 1
        assert figures["adapter"]["tokens"] == 59
        for who in ("model", "base"):
            assert figures[who] == {
                name: value
                for name, value in found[who]["by_area"][key].items()
                if name in figures[who]
            }
        own, _ = load_model(trained / "final" / "areas" / area, dtype="float32")
        ids = torch.arange(begin, begin + 60 * step, step)[None]
        with torch.no_grad():
            expected = float(own(ids, labels=ids).loss)
        assert figures["adapter"]["loss"] == pytest.approx(expected, rel=1e-4)
        assert figures["adapter"]["loss"] < figures["base"]["loss"]
    # the base's figures of an evaluation before are taken for the areas too
    again = start(
        "evaluate_cpt_checkpoint.py",
        *("--config", recipe, "--checkpoint", trained, "--base_model", model),
        *("--base_evaluation", output, "--validation_data", legal),
        *("--output", tmp_path / "again.json"),
    )
    code, said = finish(again)
    assert code == 0, said
    assert "the base model was evaluated before" in said
    assert "evaluated base" not in said
    second = json.loads((tmp_path / "again.json").read_text())["random"]
    assert second["base"] == found["base"]
    for area, figures in second["adapters"].items():
        assert figures["base"] == found["adapters"][area]["base"]
        assert figures["adapter"]["loss"] == pytest.approx(
            found["adapters"][area]["adapter"]["loss"]
        )


def test_stage_2_goes_on_with_each_adapter(
    trained: Path, legal: Path, model: Path, recipe: Path, tmp_path: Path
) -> None:
    content = read_json(trained / "training.json")
    short = {**TRAINING, "max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-9}
    second = write_recipe(
        tmp_path,
        lora=load_recipe(recipe).model_dump(mode="json")["lora"],
        training={**short, "gradient_accumulation_steps": 15},
    )
    arguments = train_arguments(second, legal, tmp_path / "out", "--model", trained / "final")
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    began = {line["area"]: line["loss"] for line in reversed(metrics(tmp_path / "out"))}
    for area, done in content["areas"].items():
        assert began[area] == pytest.approx(done["loss"], abs=0.1)
        before, after = (
            load_file(folder / "final" / "areas" / area / "adapter_model.safetensors")
            for folder in (trained, tmp_path / "out")
        )
        assert all(torch.allclose(after[name], weight) for name, weight in before.items())


def test_published_are_the_mean_and_the_adapters_beside_it(
    trained: Path, model: Path, recipe: Path, tmp_path: Path
) -> None:
    settings: Recipe = load_recipe(recipe)
    (tmp_path / "record").mkdir()
    folder = tmp_path / "published"
    figures = {"perplexity": 9.0, "bits_per_byte": 1.0, "tokens": 59}
    by = {"rising": {"adapter": figures, "base": {**figures, "perplexity": 90.0}}}
    evaluation = {"general": {"model": figures, "base": figures}, "random": {"adapters": by}}
    write_json(tmp_path / "record" / "evaluation.json", evaluation)
    publish(settings, trained / "final", tmp_path / "record", folder)
    mean = AutoModelForCausalLM.from_pretrained(folder)
    adapted, _ = load_model(trained / "final", dtype="float32")
    ids = torch.arange(30, 70)[None]
    torch.testing.assert_close(mean(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model)
    rising = PeftModel.from_pretrained(base, str(folder / "adapters" / "rising"))
    own, _ = load_model(trained / "final" / "areas" / "rising", dtype="float32")
    torch.testing.assert_close(rising(ids).logits, own(ids).logits)
    card = (folder / "README.md").read_text()
    assert "`adapters/`: falling fast, rising." in card
    assert "| random, rising | with the area's own adapter | 9.00 |" in card
    assert "| general | base model | 9.00 |" in card
    assert not any(str(model) in file.read_text() for file in folder.rglob("*.json"))


def test_one_adapter_is_merged_by_its_command(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(INCLUDE / "scripts" / "merge_lora.py")
    adapter, merged = trained / "final" / "areas" / "rising", tmp_path / "merged"

    def run(model: Path, output: Path) -> int:
        words = [script, "--model", model, "--output_dir", output, "--dtype", "float32"]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        return exit_code(runpy.run_path(script)["main"])

    assert run(adapter, merged) == 0
    own, _ = load_model(adapter, dtype="float32")
    ids = torch.arange(30, 70)[None]
    alone = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(alone(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged).eos_token_id == 1
    assert run(merged, tmp_path / "again") == 78
    assert "is no adapter: there is nothing to merge" in capsys.readouterr().err
    assert run(adapter, merged) == 78
    assert "is there already" in capsys.readouterr().err
