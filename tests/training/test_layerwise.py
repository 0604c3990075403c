"""Models loaded layer by layer: the same weights as usual, but never all of them at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastcpt.recipe_sections import Lora
from fastcpt.training.layers import plain_weights, with_fused_blocks
from fastcpt.training.layerwise import load_layerwise
from fastcpt.training.model import ModelError, add_lora, load_model
from training.conftest import INCLUDE, launch, train_arguments, write_recipe
from training.test_trainer import finish, metrics
from training.tiny import adapter_folder, model_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fake_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake"))


def in_two_files(folder: Path) -> None:
    """The weights of a folder in two files, as those of large models are."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for part, own in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in own}, folder / f"model-{part}.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_layers_read_one_by_one_are_those_of_the_usual_way(tmp_path: Path, tied: bool) -> None:
    folder = model_folder(tmp_path / "model", tie_word_embeddings=tied)
    expected, _ = load_model(folder, "sdpa", "bfloat16")
    in_two_files(folder)
    model, attention, read = load_layerwise(folder, "sdpa", "bfloat16", CPU)
    assert attention == "sdpa"
    for layer in model.model.layers:
        assert all(p.untyped_storage().nbytes() == 2 for p in layer.parameters())
    with_fused_blocks(model, 40, "transformer_engine", False, False, None, CPU, read=read)
    got = plain_weights(model.state_dict(), model.config)
    assert got.keys() == expected.state_dict().keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.state_dict().items())
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if "lora_" in name}


def test_fresh_adapters_on_unread_layers_are_drawn_as_on_read_ones(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    found = []
    for model in (
        load_model(folder, "sdpa")[0],
        load_layerwise(folder, "sdpa", "bfloat16", CPU)[0],
    ):
        torch.manual_seed(3)
        found.append(adapters(add_lora(model, Lora(r=4))))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())


def test_an_adapter_is_put_on_unread_layers(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    folder = adapter_folder(tmp_path / "adapter", base)
    model, _, read = load_layerwise(folder, "sdpa", "bfloat16", CPU)
    expected, _ = load_model(folder, "sdpa", "bfloat16")
    wanted, got = adapters(expected), adapters(model)
    assert wanted
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())
    own = expected.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight
    assert torch.equal(read(1)["self_attn.q_proj.weight"], own)


def test_a_model_in_other_files_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"no safetensors file has lm_head\.weight.*save_pretrained"
    ):
        load_layerwise(folder, "sdpa", "bfloat16", CPU)


def test_adapters_on_weights_in_one_byte_go_on_with_another_number_of_ranks(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    """ZeRO-3 on two ranks, each with all of the frozen weights; then one that reads layer by layer."""
    script = tmp_path / "one_byte.py"
    script.write_text(
        f"""
import os, runpy, sys
sys.path[:0] = [{str(INCLUDE)!r}, {str(Path(__file__).parent / "fake")!r}]  # a GPU's layers in torch
from fastcpt.step_memory import ActivationCheckpointing
from fastcpt.training import engine
engine.can_fuse = lambda *_: True
memory = ActivationCheckpointing("none", 0, 2, one_byte=True)
if os.environ["WORLD_SIZE"] == "1":
    memory = ActivationCheckpointing("full", 2, 2, one_byte=True, on_host=1)
engine._checkpointing = lambda *_: memory
runpy.run_path({str(INCLUDE / "scripts/train_cpt.py")!r}, run_name="__main__")
"""
    )
    lora = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    recipe = write_recipe(
        tmp_path, lora={**lora, "lora_dropout": 0.0}, training={"max_steps": 4, "save_steps": 2}
    )
    out = tmp_path / "out"
    arguments = train_arguments(recipe, corpus, out, "--model", model)
    code, output = finish(launch(str(script), *arguments, ranks=2))
    assert code == 0, output
    assert "fused layers" in output
    assert "frozen weights in one byte" in output
    before, ids = metrics(out), torch.arange(50, 90)[None]
    adapted, _ = load_model(out / "final", dtype="float32")
    base, _ = load_model(model, dtype="float32")
    assert not torch.allclose(adapted(ids).logits, base(ids).logits)
    (out / "training.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step_4")
    code, output = finish(launch(str(script), *arguments, ranks=1))
    assert code == 0, output
    assert "inputs of 1 layers on the host" in output
    assert "going on from checkpoints/step_2" in output
    again, _ = load_model(out / "final", dtype="float32")
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)
    for was, now in zip(before, metrics(out), strict=True):
        assert now["loss"] == pytest.approx(was["loss"], rel=1e-4)
