"""The trainer's tokens per second on this host's GPUs, compared with target figures.

    python benchmarks/training.py [--cases 8b-lora-bf16,8b-full-fp8@4] [--steps 2] [--profile]

Each case runs the product's own engine and step (``fastcpt.training``) in processes of its
own: shapes of Llama and Qwen 3 with random weights, random tokens in whole sequences of 3072, accumulation 16,
one step to warm up. ``@4`` runs a case on four GPUs, whatever its own number is. ``--rows 16`` repeats
so many rows, so that the loss falls where the steps are right. The last line is one JSON object.

Memory is reported in three parts, GB per GPU: what is kept for each weight (weights, gradients and the
optimizer's states, also as bytes per weight of this GPU's), what else stays between steps (FP8 copies of
weights, buffers), and what a step takes on top at most (activations, gathered weights).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SIZE = 3072
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, vocab_size=1024),
    "150m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=12, num_key_value_heads=4, vocab_size=100352),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
               num_attention_heads=24, num_key_value_heads=8, vocab_size=128256,
               tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    "14b": dict(model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
                num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=151936),
    "32b": dict(model_type="qwen3", hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
                num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip


class Case(NamedTuple):
    """What is trained, on how many GPUs, and the target tokens/s per GPU on which card."""

    shape: str
    lora: bool
    fp8: bool
    gpus: int
    micro: int
    aim: int
    chip: str
    states: str = "float32"


CASES = {
    "8b-lora-bf16": Case("8b", True, False, 1, 2, 12_500, "H100"),
    "8b-lora-fp8": Case("8b", True, True, 1, 4, 22_000, "H100"),
    "3b-full-fp8": Case("3b", False, True, 1, 2, 30_000, "H100"),
    "8b-full-fp8": Case("8b", False, True, 2, 4, 15_200, "H200"),
    "8b-full-bf16": Case("8b", False, False, 2, 2, 10_300, "H200"),
    "8b-full-fp8-int8": Case("8b", False, True, 1, 1, 12_500, "H100", "int8"),
    "14b-full-fp8-int8": Case("14b", False, True, 1, 1, 6_800, "H200", "int8"),
    "32b-full-fp8-int8": Case("32b", False, True, 2, 2, 2_900, "H200", "int8"),
    "70b-full-fp8-int8": Case("70b", False, True, 4, 2, 1_200, "H200", "int8"),
    "70b-lora-fp8": Case("70b", True, True, 1, 1, 2_200, "H200"),  # runs on an H100 too
    "tiny": Case("tiny", False, False, 1, 2, 0, "CPU"),
}
PEAK = 989e12  # dense bf16 FLOP/s of H100 and H200


def case_of(words: str) -> Case:
    """A case by name, or ``name@GPUs``."""
    name, _, gpus = words.partition("@")
    return CASES[name]._replace(gpus=int(gpus)) if gpus else CASES[name]


def flop_per_token(shape: dict[str, Any], lora: bool) -> float:
    """Forward and backward, the causal half of attention, frozen weights without their gradient."""
    h, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    width = shape.get("head_dim", h // shape["num_attention_heads"])
    q, kv = width * shape["num_attention_heads"], width * shape["num_key_value_heads"]
    matrices = layers * (2 * h * q + 2 * h * kv + 3 * h * inner) + shape["vocab_size"] * h
    adapters = layers * 64 * (2 * (h + q) + 2 * (h + kv)) if lora else 0
    return (4 if lora else 6) * matrices + 3 * 2 * layers * q * SIZE + 6 * adapters


def worker(args: argparse.Namespace) -> None:
    """One rank of one case; rank 0 prints the result."""
    import torch

    from fastcpt.recipe import Recipe
    from fastcpt.training import engine
    from fastcpt.training.loop import Loop
    from fastcpt.training.metrics import peak_memory_gb
    from fastcpt.training.ranks import StopSignal, start_ranks
    from fastcpt.training.schedule import phases_of

    case = case_of(args.worker)
    lora, fp8 = case.lora, case.fp8
    shape, folder, micro = SHAPES[case.shape], Path(args.folder), args.micro or case.micro
    write_config(shape, folder)
    replace_parts(args)
    recipe = Recipe.model_validate(recipe_values(args, case))
    rows = random_rows(shape["vocab_size"], args.pieces, args.rows)
    begin = time.monotonic()
    device = start_ranks()
    file = ROOT / "include/configs/ds_config_zero3.json"
    trained, chosen = engine.build_engine(
        recipe, recipe.training, str(folder), file, args.accumulation, fp8, device
    )
    phases = phases_of(recipe.training, rows)
    loop = Loop(recipe.training, phases, trained, folder, args.accumulation, device, StopSignal())
    ready = time.monotonic()
    loaded = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    times, losses = timed_steps(loop, args.steps, args.rate)
    if args.profile:
        print_profile(loop)
    median = sorted(times[1:])[(len(times) - 1) // 2] if args.steps else times[0]
    rate = micro * SIZE * args.accumulation / median
    if loop.rank == 0:
        result = {
            "case": args.worker,
            "gpus": case.gpus,
            "optimizer_states": args.states or case.states,
            "chip": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "tokens_per_s_per_gpu": round(rate),
            "mfu": round(rate * flop_per_token(shape, lora) / PEAK, 3),
            "memory_gb": round(peak_memory_gb(device), 1),
            # weights, optimizer and remains of creating them
            "loaded_gb": round(loaded / 1e9, 2),
            **measured_memory(trained, device),
            "recomputed": f"{chosen['checkpointing']} of {chosen['layers_recomputed']} layers",
            # memory released to the driver and allocated again because it was full: this costs time
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
            "micro_batch": micro,
            "accumulation": args.accumulation,
            "start_s": round(ready - begin, 1),
            "first_step_s": round(times[0], 1),
            "losses": [round(loss, 4) for loss in losses],
            "skipped_steps": loop.guard.skipped,
        }
        (folder / "result.json").write_text(json.dumps(result))
        print(json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


def replace_parts(args: argparse.Namespace) -> None:
    """Use random weights made on the GPU instead of files, and the arguments' settings instead of the product's."""
    from fastcpt import step_memory
    from fastcpt.training import engine, layers

    engine.load_model, engine.load_layerwise = random_model, random_layerwise
    if args.scaling == "delayed":
        from transformer_engine.common.recipe import DelayedScaling

        layers.fp8_recipe = lambda: DelayedScaling(amax_history_len=16, reduce_amax=False)
    if args.share:
        step_memory.FILL = args.share


def recipe_values(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The recipe of a case."""
    model = {"name_or_path": args.folder, "dtype": args.dtype}
    training = {"max_steps": 1000, "warmup_steps": 100, "use_fp8": case.fp8}
    training["per_device_train_batch_size"] = args.micro or case.micro
    training["gradient_accumulation_steps"] = args.accumulation
    return {
        "name": "benchmark",
        "corpus": {"max_seq_length": SIZE},
        "model": {**model, "attn_implementation": args.attention},
        "training": {**training, "optimizer_states": args.states or case.states},
        "lora": {"lora_dropout": args.dropout} if case.lora else None,
        "cluster": {"gpus": case.gpus},
    }


def write_config(shape: dict[str, Any], folder: Path) -> None:
    """Rank 0 writes the model's config.json; all ranks return when it exists."""
    from transformers import AutoConfig

    # beyond 2^31 the mask of positions is longer than any row here
    more = {"max_position_embeddings": 131072, "rope_parameters": LLAMA3}
    config = AutoConfig.for_model(**{"model_type": "llama", **shape, **more})
    if os.environ["RANK"] == "0":
        config.save_pretrained(folder)
    while not (folder / "config.json").is_file():
        time.sleep(0.1)


def random_model(path: str, attention: str, dtype: str, device: Any) -> tuple[Any, str]:
    """``fastcpt.training.model.load_model`` for a folder without weights: random ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from fastcpt.training.model import choose_attention

    attention = choose_attention(attention)
    shape = AutoConfig.from_pretrained(path)
    with no_init_weights(), torch.device(device or "cpu"):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    model.tie_weights()
    model.config.use_cache = False
    for words, parameter in model.named_parameters():
        new_weight(words, parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter)
    return model, attention


def random_layerwise(path: str, attention: str, dtype: str, device: Any) -> tuple[Any, str, Any]:
    """``fastcpt.training.layerwise.load_layerwise`` for a folder without weights: random ones."""
    import torch
    from transformers import AutoConfig

    from fastcpt.training.layerwise import LAYERS, without_layers
    from fastcpt.training.model import choose_attention

    attention, kind = choose_attention(attention), getattr(torch, dtype)
    model = without_layers(AutoConfig.from_pretrained(path), attention, kind, device)
    for words, parameter in model.named_parameters():
        if not words.startswith(LAYERS):
            new_weight(words, parameter)
    shapes = {words: weight.shape for words, weight in model.model.layers[0].named_parameters()}

    def read(_: int) -> dict[str, Any]:
        empty = {words: torch.empty(s, dtype=kind, device=device) for words, s in shapes.items()}
        return {words: new_weight(words, weight) for words, weight in empty.items()}

    return model, attention, read


def new_weight(words: str, weight: Any) -> Any:
    """The weight with that name, initialised as in a new model."""
    values = weight.data
    return values.fill_(1.0) if "norm" in words else values.normal_(0.0, 0.02)


def measured_memory(engine: Any, device: Any) -> dict[str, float]:
    """After a step: GB kept for weights, GB that otherwise stays, and GB that a step adds."""
    import torch

    zero, kept = engine.optimizer, {}
    held, gradients = [], 0
    for parameter in engine.module.parameters():
        part = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        held += [part.data, getattr(parameter, "main_grad", None)]
        if parameter.requires_grad and not hasattr(parameter, "main_grad"):
            gradients += part.numel() * part.element_size()
    buffer = getattr(zero, "grad_partitions_flat_buffer", None)
    if buffer is not None:  # ZeRO-3's gradients of this rank
        held, gradients = [*held, buffer], 0
    for flat, state in zero.optimizer.state.items():
        held += [flat.data, *state.values()]
    for tensor in held:
        if tensor is not None and tensor.device == device:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    states = sum(kept.values())
    own = sum(len(flat) for flat in zero.optimizer.state)
    found = {"kept_gb": round((states + gradients) / 1e9, 2)}
    if all(parameter.requires_grad for parameter in engine.module.parameters()):
        found["bytes_a_weight"] = round((states + gradients) / own, 4)
    if device.type == "cuda":
        stays = torch.cuda.memory_allocated(device)
        found["fp8_copies_and_buffers_gb"] = round((stays - states) / 1e9, 2)
        added = torch.cuda.max_memory_allocated(device) - stays - gradients
        found["activations_gb"] = round(added / 1e9, 2)
    return found


def random_rows(words: int, pieces: int, count: int) -> Any:
    """``count`` full rows of random tokens below ``words``, each with so many documents."""
    import numpy as np

    from fastcpt.training.data import ListRows, Row

    drawn = np.random.default_rng(0)

    def row() -> Row:
        ends = np.sort(drawn.choice(np.arange(1, SIZE), pieces - 1, replace=False))
        lengths = np.diff(np.concatenate([[0], ends, [SIZE]])).astype(np.int32)
        return Row(drawn.integers(0, words, SIZE).astype(np.int32), lengths)

    return ListRows([row() for _ in range(count)], SIZE)


def timed_steps(loop: Any, steps: int, rate: float) -> tuple[list[float], list[float]]:
    """Seconds and losses of one warm-up step and ``steps`` more, at this learning rate."""
    import torch

    times, losses = [], []
    for step in range(steps + 1):
        started = time.monotonic()
        loop.one_step(rate)
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
        losses.append(loop.loss)
        if loop.rank == 0:
            print(f"step {step}: {times[-1]:.2f} s, loss {loop.loss:.4f}", flush=True)
    return times, losses


def print_profile(loop: Any) -> None:
    """The kernels of one step that took the most time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        loop.one_step(1e-5)
        torch.cuda.synchronize()
    if loop.rank != 0:
        return
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:110]][0] += event.time_range.elapsed_us() / 1000
            spent[event.name[:110]][1] += 1
    total = sum(ms for ms, _ in spent.values())
    print(f"profile of one step: {total:.0f} ms in kernels")
    for kernel, (ms, count) in sorted(spent.items(), key=lambda x: -x[1][0])[:32]:
        print(f"{ms:9.1f} ms {100 * ms / total:5.1f} % {int(count):6d} x {kernel}")


def run_case(case: str, options: list[str], seconds: float) -> dict[str, Any] | None:
    """A case in separate processes; None if it fails."""
    gpus = case_of(case).gpus
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(gpus), __file__, "--worker", case, "--folder", folder),
            *options,
        ]
        path = f"{ROOT / 'include'}:{os.environ.get('PYTHONPATH', '')}"
        try:
            subprocess.run(
                command,
                env={"OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": path},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{case}: longer than {seconds} s", flush=True)
        result = Path(folder) / "result.json"
        return json.loads(result.read_text()) if result.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="names, separated by commas; default: those for this host")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--micro", type=int)
    parser.add_argument("--attention", default="auto", choices=("auto", "flash_attention_2"))
    parser.add_argument("--scaling", choices=("current", "delayed"), default="current")
    parser.add_argument("--states", choices=("float32", "bfloat16", "int8"), help="the optimizer's")
    parser.add_argument("--rows", type=int, default=64, help="different ones, then repeated")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate of every step")
    parser.add_argument("--pieces", type=int, default=1, help="documents packed into a row")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--share", type=float, help="share of memory that the plan may use")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit for one case")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    import torch

    gpus = torch.cuda.device_count()
    cases = (
        args.cases.split(",")
        if args.cases
        else [name for name, case in CASES.items() if case.gpus == gpus and case.aim]
    )
    results = [(case, run_case(case, sys.argv[1:], args.seconds)) for case in cases]
    print(f"{'case':18} {'tokens/s/GPU':>12} {'to reach':>9} {'MFU':>6} {'GB':>6} {'B/weight':>9}")
    for case, result in results:
        if result is None:
            print(f"{case:18} {'failed':>12}")
        else:
            print(
                f"{case:18} {result['tokens_per_s_per_gpu']:>12,} {case_of(case).aim:>9,} "
                f"{result['mfu']:>6.1%} {result['memory_gb']:>6} {result.get('bytes_a_weight', ''):>9}"
            )
    print(json.dumps({"benchmark": "training", "results": [r for _, r in results]}))


if __name__ == "__main__":
    main()
