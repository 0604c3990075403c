"""The same models trained with each kind of optimizer states, in parallel on this host's GPUs.

    python benchmarks/optimizer_states.py --corpus FOLDER [--shape 146m] [--seeds 0,1,2] [--steps 1500]

Each training runs the product's command in separate processes on one GPU, several per GPU if
there are more trainings than GPUs; its model is then evaluated on the corpus's validation sets. A seed sets the
initial weights and the order of the rows, the same for all states. ``nearest`` is bfloat16 states without
stochastic rounding. Steps have 16,384 tokens. After ``--seconds`` running trainings are ended, and the
curves are compared up to the last step that all have reached. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "include" / "scripts"
STATES = ("float32", "bfloat16", "int8", "nearest")
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2),
    "146m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=11,
                 num_attention_heads=12, num_key_value_heads=4),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8),
}  # fmt: skip
STEP_TOKENS = 16_384


def write_recipe(args: argparse.Namespace, states: str, seed: int, folder: Path) -> Path:
    """The training's recipe, written to ``folder``."""
    size = int(json.loads((args.corpus / "corpus_manifest.json").read_text())["max_seq_length"])
    rows = STEP_TOKENS // size
    training = {
        "max_steps": args.steps,
        "warmup_steps": max(1, args.steps // 15),
        "per_device_train_batch_size": args.micro,
        "gradient_accumulation_steps": rows // args.micro,
        "learning_rate": args.rate,
        "logging_steps": 5,
        "save_steps": args.steps,
        "save_total_limit": 1,
        "seed": seed,
        "optimizer_states": "bfloat16" if states == "nearest" else states,
    }
    model = {"tie_word_embeddings": True, "max_position_embeddings": size, **SHAPES[args.shape]}
    content = {
        "corpus": {"max_seq_length": size},
        "model": {"name_or_path": None, "config": model},
        "training": training,
        "evaluation": {"questions": 0},
        "cluster": {"gpus": 1, "gpu": None, "cpu_only": args.gpus == 0},
    }
    folder.mkdir(parents=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


class Host:
    """Shared by the trainings of one call: the remaining time, and the running processes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.end = time.monotonic() + args.seconds
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'include'}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        }

    def run(self, log: Path, gpu: int, *command: object) -> bool:
        """Run a command on one GPU until it ends or the time is over; returns whether it succeeded."""
        environment = self.environment
        if self.args.gpus:
            environment = {**environment, "CUDA_VISIBLE_DEVICES": str(gpu)}
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(max(1.0, self.end - time.monotonic())) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return False

    def initialise(self, seed: int) -> None:
        """A model with random weights."""
        recipe = write_recipe(self.args, "float32", seed, self.folder / f"seed_{seed}")
        words, model = self.args.corpus / "tokenizer", recipe.parent / "model"
        given = ("--config", recipe, "--tokenizer", words, "--output_dir", model)
        self.run(recipe.parent / "log.txt", 0, SCRIPTS / "initialise_model.py", *given)

    def train(self, states: str, seed: int, gpu: int) -> None:
        """Train and evaluate one model."""
        out = self.folder / f"{states}_{seed}"
        recipe, log = write_recipe(self.args, states, seed, out), out / "log.txt"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1)
        worker = (__file__, "--nearest") if states == "nearest" else (SCRIPTS / "train_cpt.py",)
        given = (
            *("--config", recipe, "--deepspeed", ROOT / "include/configs/ds_config_zero3.json"),
            *("--data_dir", self.args.corpus, "--output_dir", out),
            *("--model", self.folder / f"seed_{seed}" / "model"),
        )
        if self.run(log, gpu, *launcher, *worker, *given):
            print(f"{out.name}: trained, {self.end - time.monotonic():.0f} s left", flush=True)
            self.run(
                log,
                gpu,
                *(SCRIPTS / "evaluate_cpt_checkpoint.py", "--checkpoint", out / "final"),
                *("--validation_data", self.args.corpus, "--config", recipe),
                *("--output", out / "evaluation.json"),
            )


def train_to_nearest() -> None:
    """The training command with every random number fixed at the middle, which rounds to nearest."""
    import torch

    from fastcpt.training.rounded_adamw import RoundedAdamW

    middle = 0x80808000 - (1 << 32)
    RoundedAdamW.random_bits = lambda self, size, device, step: torch.full(
        (size,), middle, dtype=torch.int32, device=device
    )
    script = str(SCRIPTS / "train_cpt.py")
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


def curve(out: Path) -> dict[int, float]:
    """Loss by step so far."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def curve_figures(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """For each training: the mean loss over the last tenth of the common steps, held-out bits per byte,
    and steps skipped by the guard."""
    curves = {name: curve(folder / name) for name in names}
    common = min((max(steps, default=0) for steps in curves.values()), default=0)
    found: dict[str, dict[str, Any]] = {}
    for name, steps in curves.items():
        last = [loss for step, loss in steps.items() if 0.9 * common < step <= common]
        found[name] = {"steps": common, "loss": statistics.fmean(last) if last else None}
        evaluation = folder / name / "evaluation.json"
        if evaluation.is_file():
            sets = json.loads(evaluation.read_text())
            for kind in ("random", "newest"):
                if kind in sets:
                    found[name][f"bits_{kind}"] = sets[kind]["model"]["bits_per_byte"]
        done = folder / name / "training.json"
        if done.is_file():
            result = json.loads(done.read_text())
            for key in ("skipped_steps", "tokens_per_s_per_gpu", "peak_memory_gb"):
                found[name][key] = result[key]
    return found


def print_table(found: dict[str, dict[str, Any]], states: list[str], seeds: list[str]) -> None:
    """Each figure's mean over the seeds, and its difference from float32's for the same seed."""
    for key in ("loss", "bits_random", "bits_newest"):
        values = {name: one.get(key) for name, one in found.items()}
        print(f"\n{key:14}{'mean':>10}{'beside float32, by seed':>34}")
        for kind in states:
            own = [values[f"{kind}_{seed}"] for seed in seeds]
            known = [value for value in own if value is not None]
            if not known:
                print(f"{kind:14}{'-':>10}")
                continue
            beside = [
                f"{value / base - 1:+8.3%}"
                if value is not None and base is not None
                else "       -"
                for value, base in zip(
                    own, [values.get(f"float32_{seed}") for seed in seeds], strict=True
                )
            ]
            spread = f"   seeds lie {max(known) / min(known) - 1:.3%} apart"
            print(f"{kind:14}{statistics.fmean(known):10.4f}{'':6}{' '.join(beside)}{spread}")


def main() -> None:
    if sys.argv[1:2] == ["--nearest"]:
        train_to_nearest()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="made by cpt_corpus_builder.py")
    parser.add_argument("--shape", choices=SHAPES, default="146m")
    parser.add_argument("--states", default=",".join(STATES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=6e-4, help="learning rate, cosine to 0")
    parser.add_argument("--micro", type=int, default=8, help="rows per micro-batch")
    parser.add_argument("--gpus", type=int, help="0 trains on the CPU; default: all")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--keep", type=Path, help="folder for the curves and logs")
    args = parser.parse_args()
    if args.gpus is None:
        import torch

        args.gpus = torch.cuda.device_count()
    args.corpus = args.corpus.resolve()
    states, seeds = args.states.split(","), args.seeds.split(",")
    names = [f"{kind}_{seed}" for seed in seeds for kind in states]
    with tempfile.TemporaryDirectory() as folder:
        host = Host(args, Path(folder))
        together([threading.Thread(target=host.initialise, args=(int(seed),)) for seed in seeds])
        together(
            [
                threading.Thread(target=host.train, args=(kind, int(seed), n % max(1, args.gpus)))
                for n, (seed, kind) in enumerate((s, k) for s in seeds for k in states)
            ]
        )
        found = curve_figures(Path(folder), names)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            curves = {name: curve(Path(folder) / name) for name in names}
            (args.keep / f"curves_{args.shape}.json").write_text(json.dumps(curves))
            for name in names:
                log = Path(folder) / name / "log.txt"
                (args.keep / f"{name}.txt").write_text(log.read_text()[-20_000:])
    print_table(found, states, seeds)
    print(json.dumps({"benchmark": "optimizer_states", "shape": args.shape, "results": found}))


def together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
