"""The trainer under the real launcher on two CPU ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fastcpt.recipe import load_recipe
from fastcpt.recipe_sections import CONFIGS
from fastcpt.training.data import Order
from fastcpt.training.made_from import training_name
from fastcpt.training.model import ModelError, load_model
from fastcpt.training.validation import HeldOutDocument
from training.conftest import INCLUDE, launch, start, train_arguments, write_recipe, write_shards
from training.test_evaluation import write_set


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


@pytest.fixture(scope="module")
def trained(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training on two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, budget={"price_per_gpu_hour": 3600.0})  # a dollar a second
    arguments = train_arguments(recipe, corpus, folder / "out", "--model", model)
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert "step 12/12 loss " in output
    assert " tokens/s " in output
    return folder


def test_a_corpus_that_goes_on_is_trained_on_for_its_share_of_the_steps_from_what_was_learnt(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    manifest = json.loads((corpus / "corpus_manifest.json").read_text())
    manifest["gone_on"] = {"new_tokens": 30, "replayed_tokens": 20, "all_tokens": 100}
    (tmp_path / "corpus" / "corpus_manifest.json").write_text(json.dumps(manifest))
    before = trained / "out" / "final"
    arguments = train_arguments(
        write_recipe(tmp_path), tmp_path / "corpus", tmp_path / "out", "--model", before
    )
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 6
    lines = metrics(tmp_path / "out")
    # warmed up again within a step of 2 x 6 / 12, and down again
    assert lines[0]["learning_rate"] == 0.01 > lines[-1]["learning_rate"]
    assert lines[0]["loss"] < 4.5  # from nothing 5.5


def test_a_training_learns_and_leaves_what_the_next_step_needs(
    trained: Path, corpus: Path, model: Path
) -> None:
    out = trained / "out"
    losses = [line["loss"] for line in metrics(out)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)  # knows nothing yet
    assert losses[-1] < 4.3
    result = json.loads((out / "training.json").read_text())
    assert result["steps"] == 12
    assert result["loss"] == losses[-1]
    assert result["skipped_steps"] == 0
    assert result["tokens_per_s_per_gpu"] > 0
    assert result["startup_seconds"] > 0
    chosen = {"attention": "sdpa", "precision": "float32", "checkpointing": "none", "ranks": 2}
    assert result.items() >= chosen.items()
    assert metrics(out)[-1]["cost"] == pytest.approx(2 * result["seconds"], abs=0.01)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_12", "step_6"]
    assert any((out / "tensorboard").iterdir())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(out / "final")
    assert AutoTokenizer.from_pretrained(out / "final").eos_token_id == 1
    ids = torch.arange(50, 90)[None]
    base = AutoModelForCausalLM.from_pretrained(model)
    assert final(ids, labels=ids).loss < base(ids, labels=ids).loss - 0.8
    # complete: started again it does nothing
    arguments = train_arguments(trained / "recipe.yaml", corpus, out, "--model", model)
    code, output = finish(start("train_cpt.py", *arguments))
    assert code == 0
    assert "is complete" in output


def test_one_rank_draws_the_same_curve_as_two(
    trained: Path, corpus: Path, model: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(write_recipe(tmp_path), corpus, tmp_path / "out", "--model", model)
    code, output = finish(launch("train_cpt.py", *arguments, ranks=1))
    assert code == 0, output
    one = [line["loss"] for line in metrics(tmp_path / "out")]
    two = [line["loss"] for line in metrics(trained / "out")]
    assert one == pytest.approx(two, rel=1e-4)


def test_fused_blocks_on_one_rank_draw_the_same_curve(
    trained: Path, corpus: Path, model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "fused.py"
    script.write_text(
        f"""
import runpy, sys
sys.path[:0] = [{str(INCLUDE)!r}, {str(Path(__file__).parent / "fake")!r}]  # a GPU's layers in torch
from fastcpt.training import engine
engine.can_fuse = lambda *_: True
engine.UPDATED_AT_ONCE = 10_000  # several groups
runpy.run_path({str(INCLUDE / "scripts/train_cpt.py")!r}, run_name="__main__")
"""
    )
    out = tmp_path / "out"
    arguments = train_arguments(write_recipe(tmp_path), corpus, out, "--model", model)
    code, output = finish(launch(str(script), *arguments, ranks=1))
    assert code == 0, output
    assert "fused layers" in output
    fused, plain = metrics(out), metrics(trained / "out")
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in fused] == pytest.approx([x[key] for x in plain], rel=1e-3)
    final = load_file(out / "final/model.safetensors")
    for name, weight in load_file(trained / "out/final/model.safetensors").items():
        torch.testing.assert_close(final[name], weight, rtol=1e-2, atol=1e-3)


def name_of(file: Path) -> str:
    recipe = load_recipe(file)
    given = {"model": "m", "data": {"corpus": "c"}, "deepspeed": CONFIGS}
    return training_name(recipe, recipe.training, **given)


@pytest.mark.parametrize(("kind", "ranks"), [(signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_a_stopped_training_goes_on_with_the_same_curve_on_any_number_of_ranks(
    trained: Path, corpus: Path, model: Path, tmp_path: Path, kind: signal.Signals, ranks: int
) -> None:
    out = tmp_path / "out"
    arguments = train_arguments(write_recipe(tmp_path), corpus, out, "--model", model)
    process = launch("train_cpt.py", *arguments)
    assert process.stdout is not None
    wanted = "step 3/12" if kind == signal.SIGTERM else "step 8/12"
    for line in process.stdout:
        if line.startswith(wanted):
            break
    os.killpg(process.pid, kind)
    process.stdout.read()
    process.wait(60)
    found = [path.name for path in (out / "checkpoints").glob("step_*")]
    assert len(found) == 1
    assert not (out / "training.json").exists()
    with (out / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 9, "lo')
    if ranks == 1:  # all that may change does, and it is the same training still
        changes: dict[str, object] = {"per_device_train_batch_size": 4, "save_steps": 5}
        changes |= {"gradient_checkpointing": True, "save_total_limit": 3, "max_skipped_steps": 9}
        changed = write_recipe(tmp_path / "changed", training=changes, cluster={"gpus": 1})
        assert name_of(changed) == name_of(tmp_path / "recipe.yaml")
        arguments = train_arguments(changed, corpus, out, "--model", model)
    code, output = finish(launch("train_cpt.py", *arguments, ranks=ranks))
    assert code == 0, output
    assert f"going on from checkpoints/{found[0]}" in output
    resumed, whole = metrics(out), metrics(trained / "out")
    assert [line["step"] for line in resumed] == list(range(1, 13))
    for key in ("loss", "learning_rate", "tokens"):
        assert [x[key] for x in resumed] == pytest.approx([x[key] for x in whole], rel=1e-4)


def test_an_offloaded_optimizer_draws_the_same_curve_also_after_a_stop(
    trained: Path, corpus: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = train_arguments(write_recipe(tmp_path), corpus, out, "--model", model)
    offload = INCLUDE / "configs" / "ds_config_zero3_offload.json"
    assert "offload_optimizer" in json.loads(offload.read_text())["zero_optimization"]
    arguments[arguments.index("--deepspeed") + 1] = offload
    process = launch("train_cpt.py", *arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/12"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    process.stdout.read()
    process.wait(60)
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert "going on from checkpoints/step_" in output
    for key in ("loss", "grad_norm", "tokens"):
        here, there = ([line[key] for line in metrics(path)] for path in (out, trained / "out"))
        assert here == pytest.approx(there, rel=1e-4)


def test_adapters_are_trained_and_saved_with_their_base(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    recipe = write_recipe(tmp_path, lora=lora, training={"max_steps": 4, "save_steps": 2})
    out = tmp_path / "out"
    # a base named from where the training runs is found from anywhere
    near = os.path.relpath(model)
    arguments = train_arguments(recipe, corpus, out, "--model", f"./{near}")
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert json.loads((out / "final" / "base.json").read_text()) == {"base": str(model)}
    adapted, _ = load_model(out / "final", dtype="float32")
    base, _ = load_model(model, dtype="float32")
    ids = torch.arange(50, 90)[None]
    assert not torch.allclose(adapted(ids).logits, base(ids).logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)
    # from its checkpoint, without the base in it
    (out / "training.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step_4")
    before = metrics(out)
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 0, output
    assert "going on from checkpoints/step_2" in output
    again, _ = load_model(out / "final", dtype="float32")
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert metrics(out) == before


def test_the_launcher_passes_on_what_cannot_heal(model: Path, tmp_path: Path) -> None:
    arguments = train_arguments(write_recipe(tmp_path), tmp_path, tmp_path / "out")
    code, output = finish(launch("train_cpt.py", *arguments, "--model", model))
    assert code == 78
    assert f"error: {tmp_path}/corpus_manifest.json is missing" in output


def test_fp8_without_a_gpu_for_it_is_refused(corpus: Path, model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"dtype": "bfloat16"})
    arguments = train_arguments(recipe, corpus, tmp_path / "out", "--use_fp8")
    code, output = finish(start("train_cpt.py", *arguments, "--model", model))
    assert code == 78
    assert "error: FP8 needs a Hopper or newer GPU" in output


def test_models_and_attention_that_are_not_there_are_named(model: Path) -> None:
    with pytest.raises(ModelError, match=r"/nowhere: no model there"):
        load_model("/nowhere")
    with pytest.raises(ModelError, match=r"flash_attention_2, but flash-attn is not installed"):
        load_model(model, "flash_attention_2")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a checkpoint, as its ranks keep them."""
    return {
        f"{file.name} {name}": parts[0]
        for file in checkpoint.glob("rank_*.pt")
        for name, parts in torch.load(file)["slices"].items()
    }


def test_a_step_out_of_bounds_changes_no_weight(corpus: Path, model: Path, tmp_path: Path) -> None:
    """Step 6 reads a word whose embedding is no number; step 71 text unlike all before it."""
    rare = 250
    shape = json.loads((model / "config.json").read_text())
    tied = tmp_path / "model"
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": False}))
    with torch.no_grad():
        causal.model.embed_tokens.weight[rare] = math.nan
    causal.save_pretrained(tied)
    drawn = np.random.default_rng(1)
    usual = [list(range(begin, begin + 60)) for begin in drawn.integers(3, 100, 80)]
    order = Order(80, seed=0)
    usual[order[5]] = [5, 6, rare, 7]
    usual[order[70]] = drawn.integers(200, 240, 60).tolist()
    folder = tmp_path / "corpus"
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    write_shards(folder, [usual], [[[len(row)] for row in usual]])
    recipe = write_recipe(
        tmp_path,
        training={
            **{"max_steps": 72, "save_steps": 1, "save_total_limit": 72, "logging_steps": 72},
            **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
            **{"lr_scheduler_type": "constant", "learning_rate": 0.001},
        },
        cluster={"gpus": 1},
    )
    arguments = train_arguments(recipe, folder, tmp_path / "out", "--model", tied)
    code, output = finish(launch("train_cpt.py", *arguments, ranks=1))
    assert code == 0, output
    assert [line for line in output.splitlines() if "skipped" in line and "step" in line[:5]] == [
        line for line in output.splitlines() if line.startswith(("step 6 sk", "step 71 sk"))
    ]
    assert "step 6 skipped: loss nan" in output
    assert "step 71 skipped: loss 5." in output
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    assert result["skipped_steps"] == 2
    made = tmp_path / "out" / "checkpoints"
    for step in (6, 71):
        before, after = weights(made / f"step_{step - 1}"), weights(made / f"step_{step}")
        assert all(torch.equal(after[n].nan_to_num(), w.nan_to_num()) for n, w in before.items())
        moved = weights(made / f"step_{step + 1}")
        assert not all(torch.equal(moved[n].nan_to_num(), w.nan_to_num()) for n, w in after.items())
    final = load_file(tmp_path / "out" / "final" / "model.safetensors")
    broken = {name: int(w.isnan().sum()) for name, w in final.items() if w.isnan().any()}
    assert broken == {"model.embed_tokens.weight": 32}  # the word that was broken before


def test_a_time_budget_ends_decayed_and_evaluated(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    budget = 120.0  # seconds; a start takes 15, or 50 where the cores are shared
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    held_out = [
        HeldOutDocument(f"d{n}", np.arange(3, 200, dtype=np.int32), 400, 2020, ())
        for n in range(20)
    ]
    write_set(folder / "validation", held_out)
    recipe = write_recipe(
        tmp_path,
        training={
            **{"max_steps": 1_000_000, "lr_scheduler_type": "warmup_stable_decay"},
            **{"time_budget_hours": budget / 3600, "learning_rate": 0.001},
        },
    )
    out = tmp_path / "out"
    began = time.monotonic()
    code, output = finish(
        launch("train_cpt.py", *train_arguments(recipe, folder, out, "--model", model))
    )
    assert code == 0, output
    code, output = finish(
        start(
            "evaluate_cpt_checkpoint.py",
            *("--config", recipe, "--checkpoint", out, "--base_model", model),
            *("--validation_data", folder, "--output", out / "evaluation.json"),
        )
    )
    took = time.monotonic() - began
    assert code == 0, output
    assert 0.5 * budget < took < budget
    rates = [line["learning_rate"] for line in metrics(out)]
    assert max(rates) == pytest.approx(0.001)
    assert rates[-1] < 0.05 * 0.001
    flat = sum(rate > 0.000999 for rate in rates[2:])
    assert 0.7 * len(rates) < flat < 0.9 * len(rates)
    found = json.loads((out / "evaluation.json").read_text())["random"]
    assert found["model"]["perplexity"] < found["base"]["perplexity"]


def test_a_budget_that_is_gone_before_the_first_step_is_refused(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, training={"time_budget_hours": 1 / 3600})
    arguments = train_arguments(recipe, corpus, tmp_path / "out", "--model", model)
    code, output = finish(launch("train_cpt.py", *arguments, ranks=1))
    assert code == 78
    assert "time_budget_hours (0.000277778, 1 s) leaves no time for training: the start" in output


def test_hosts_that_do_not_share_the_output_are_named(tmp_path: Path) -> None:
    script = tmp_path / "see.py"
    script.write_text(
        f"""
import os
from pathlib import Path
from fastcpt.training.exits import end
from fastcpt.training.preflight import check_shared
from fastcpt.training.ranks import start_ranks
start_ranks()
check_shared(Path({str(tmp_path)!r}) / "shared")
end(lambda: check_shared(Path({str(tmp_path)!r}) / os.environ["RANK"]))
"""
    )
    code, output = finish(launch(str(script)))
    assert code == 78
    assert "is not the same folder on" in output
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.slow
@pytest.mark.linux("a process's pages in /proc")
def test_two_ranks_load_a_model_in_the_memory_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is needed is measured, not what the C library keeps of what was freed
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    shape = LlamaConfig(
        **{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10},
        **{"num_attention_heads": 16, "vocab_size": 4096},
    )
    causal = LlamaForCausalLM(shape).bfloat16()
    size = 2 * causal.num_parameters() / 1e6
    causal.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    del causal
    script = tmp_path / "load.py"
    script.write_text(
        f"""
import sys, threading, time
from pathlib import Path
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig
from fastcpt.recipe_sections import Training
from fastcpt.training.exits import end
from fastcpt.training.model import load_model
from fastcpt.training.engine import deepspeed_config
from fastcpt.training.ranks import start_ranks
def own():  # pages of mapped files are the system's, which drops them when it needs room
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if "RssAnon" in line)
start_ranks()
config = deepspeed_config(Path({str(INCLUDE)!r}) / "configs/ds_config_zero3.json",
    Training(), "bfloat16", 12_000_000, 16, 2)
parts = HfDeepSpeedConfig(config)
dist.barrier()
before, most = own(), [0.0]
def watch():
    while True:
        most[0] = max(most[0], own())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
load_model({str(tmp_path / "model")!r}, "sdpa", "bfloat16")
print(f"\\ngrew {{most[0] - before}} MB\\n", end="", flush=True)  # one write: ranks share the pipe
dist.barrier()
end(lambda: None)
"""
    )
    code, output = finish(launch(str(script)))
    assert code == 0, output
    grew = [float(line.split()[1]) for line in output.splitlines() if line.startswith("grew")]
    assert len(grew) == 2
    assert 0.9 * size < sum(grew) < 1.4 * size


def test_too_many_skipped_steps_end_the_training(corpus: Path, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    content = load_file(broken / "model.safetensors")
    content["model.norm.weight"][0] = math.nan
    save_file(content, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, training={"max_skipped_steps": 1})
    arguments = train_arguments(recipe, corpus, tmp_path / "out", "--model", broken)
    code, output = finish(launch("train_cpt.py", *arguments))
    assert code == 78
    assert "step 1 skipped: loss nan" in output
    assert "more than max_skipped_steps (1)" in output
