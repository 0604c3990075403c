"""The value of a selection: arms of one pool and one budget, trained at equal compute.

    python benchmarks/selection_value.py --documents FOLDER --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --work FOLDER --arms head,legal,novel --seeds 0,1,2 --share 0.4 --steps 350 --side_by_side 3

Without ``--model`` a Llama of 45 M parameters is trained from scratch, with a vocabulary of 16,384 trained on
the pool. All arms get ``--share`` of the pool's training tokens, the same steps, and for one seed the same
random order; bits per byte are those of the held-out documents (random by work, and newest). The trivial arms
are always included. Intervals are paired over documents and seeds.

``--work`` keeps pool, arms and results: an interrupted call resumes, and a folder with a pool needs no
documents. ``--only_arms`` stops before the trainings: make pool and arms on one machine, train on another.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include"))

from selection_arms import ARMS, TRIVIAL, spans_of
from selection_pool import Pool, make_pool
from selection_table import SETS, bits_of, comparison_table

from fastcpt.files import HOME, read_json, write_json
from fastcpt.gguf import base_folder
from fastcpt.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
FROM_NOTHING = {
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
BASE = "base"  # among the results: the model before training


def experiment_recipe(args: argparse.Namespace, seed: int = 0) -> Recipe:
    """The product's recipe of the experiment: no selection, and one GPU for each training."""
    given = args.model and base_folder(args.model)
    config = FROM_NOTHING | json.loads(args.shape)
    return Recipe.model_validate(
        {
            "name": "selection_value",
            "documents": {"path": args.documents},
            "score": {"languages": args.languages.split(",")},
            "corpus": {
                "max_seq_length": args.sequence,
                "num_shards": 1,
                "validation_share": 0.06,
                "newest_share": 0.04,
                "validation_tokens": args.held_out_tokens,
            },
            "tokenizer": {"train_vocab_size": None if given else args.vocabulary},
            "model": {
                "name_or_path": given,
                "config": None if given else config,
                "dtype": args.dtype,
                "attn_implementation": args.attention,
            },
            "training": {
                "max_steps": args.steps,
                "warmup_steps": args.steps // 20,
                "per_device_train_batch_size": args.micro,
                "gradient_accumulation_steps": args.accumulation,
                "learning_rate": args.rate or (5e-4 if given else 2e-3),
                "save_steps": args.steps,
                "logging_steps": max(1, args.steps // 10),
                "seed": seed,
            },
            "cluster": {"gpus": 1, "cpu_only": not args.gpus},
            "budget": {"max_passes": 100_000.0},
        }
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--documents", help="folder of documents; not needed where the pool is made"
    )
    parser.add_argument("--work", required=True, type=Path, help="keeps pool, arms and results")
    parser.add_argument("--arms", default="legal,published", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--without", default="", help="trivial arms to leave out")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--share", type=float, default=0.4, help="of the pool's training tokens")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--model", help="base model: folder, hub name or GGUF file")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="where there is no --model")
    parser.add_argument(
        "--shape", default="{}", help="JSON over the LlamaConfig of 45 M parameters"
    )
    parser.add_argument("--languages", default="en", help="of the documents, for the legal score")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--rate", type=float, help="learning rate; 5e-4, from nothing 2e-3")
    parser.add_argument("--held_out_tokens", type=int, default=500_000, help="at most, of each set")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of this host; 0: its CPUs")
    parser.add_argument(
        "--side_by_side", type=int, default=1, help="trainings on one GPU at a time"
    )
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="what is not done by then is ended"
    )
    parser.add_argument("--only_arms", action="store_true")
    parser.add_argument("--results", type=Path, help="file of results; in --work if left")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one training: arm, seed and place
    return parser.parse_args()


# One training


def train_and_evaluate(args: argparse.Namespace, arm: str, seed: int, out: Path) -> None:
    """Train on an arm with the product's trainer and write the losses on the held-out documents."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if not args.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    from selection_rows import SpanRows

    from fastcpt.training.inference import model_for_inference
    from fastcpt.training.model import initialise_model
    from fastcpt.training.scoring import Scorer, document_losses
    from fastcpt.training.trainer import train
    from fastcpt.training.validation import read_held_out, validation_files

    begun = time.monotonic()
    recipe, folder = experiment_recipe(args, seed), args.work / "pool"
    tokenizer = folder / "tokenizer"
    model = recipe.model.name_or_path
    if model is None:
        model = str(out.parent / "initial")
        initialise_model(recipe, tokenizer, Path(model))
    result: dict[str, Any] = {"arm": arm, "seed": seed, "steps": args.steps}
    if arm != BASE:
        pool, busy = Pool.read(folder), time.process_time()
        spans = spans_of(arm, seed, pool, budget_of(args, pool), args.work / "arms")
        result["selection_cpu_seconds"] = round(time.process_time() - busy, 1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        output = out.parent / "training"
        trained = train(
            recipe,
            recipe.training,
            lambda: SpanRows(pool, spans, args.sequence),
            model=model,
            tokenizer=tokenizer,
            output=output,
            deepspeed_file=ROOT / "include/configs/ds_config_zero3.json",
        )
        result |= {key: trained[key] for key in ("loss", "tokens", "tokens_per_s_per_gpu")}
        result |= {"documents": documents_in(spans, pool), "arm_tokens": int(spans[:, 1].sum())}
        model = str(output / "final")
    device = torch.device("cuda" if args.gpus else "cpu")
    scorer, _ = model_for_inference(model, "sdpa", args.dtype, device, wrap=Scorer)
    for name, files in validation_files(folder).items():
        documents = read_held_out(files)
        losses = document_losses(scorer, documents, args.sequence, device, what=name)
        result[name] = {
            "nats": losses.tolist(),
            "bytes": [document.bytes for document in documents],
        }
    if not all(math.isfinite(nats) for name in SETS for nats in result[name]["nats"]):
        raise ValueError(f"{arm}, seed {seed}: the loss on a held-out document is not finite")
    write_json(out, result | {"seconds": round(time.monotonic() - begun, 1)})


def budget_of(args: argparse.Namespace, pool: Pool) -> int:
    return math.floor(args.share * pool.tokens)


def documents_in(spans: Any, pool: Pool) -> int:
    return len(np.unique(np.searchsorted(pool.begin, spans[:, 0], side="right")))


# All of them


def run_all(args: argparse.Namespace, runs: list[tuple[str, int]], results: Path) -> list[Any]:
    """Results of these runs, including those already in ``results``, which is updated after each."""
    done: dict[str, Any] = read_json(results) if results.is_file() else {}
    left = [(arm, seed) for arm, seed in runs if result_key(args, arm, seed) not in done]
    places: Queue[int] = Queue()
    for place in range(max(1, args.gpus) * args.side_by_side):
        places.put(place % max(1, args.gpus))
    end = time.monotonic() + args.seconds
    with ThreadPoolExecutor(places.qsize()) as slots:
        found = {
            slots.submit(in_a_process, args, arm, seed, places, end): (arm, seed)
            for arm, seed in left
        }
        for future in as_completed(found):
            result = future.result()
            if result is None:
                continue
            arm, seed = found[future]
            done[result_key(args, arm, seed)] = result
            write_json(results, done)
            bits = ", ".join(f"{name} {bits_of(result[name]):.4f}" for name in SETS)
            rate = result.get("tokens_per_s_per_gpu", 0)
            print(
                f"{arm} seed {seed}: {bits}; {rate:,.0f} tokens/s, {result['seconds']} s",
                flush=True,
            )
    wanted = [result_key(args, arm, seed) for arm, seed in runs]
    return [done[name] for name in wanted if name in done]


def result_key(args: argparse.Namespace, arm: str, seed: int) -> str:
    """A run's key in the results: everything that the arguments may change."""
    return (
        f"{arm} seed={seed} share={args.share:g} steps={args.steps} rate={args.rate} {args.shape}"
    )


def in_a_process(
    args: argparse.Namespace, arm: str, seed: int, places: Queue[int], end: float
) -> dict[str, Any] | None:
    """One run in a separate process on a free GPU; None if it fails or the time is over."""
    gpu = places.get()
    try:
        left = end - time.monotonic()
        if left <= 0:
            return None
        with tempfile.TemporaryDirectory(prefix="selection_value_") as scratch:
            out, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu) if args.gpus else ""}
            command = [sys.executable, __file__, *sys.argv[1:], "--run", f"{arm},{seed},{out}"]
            with log.open("w") as lines:
                try:
                    code = subprocess.run(
                        command,
                        env=environment,
                        stdout=lines,
                        stderr=lines,
                        timeout=left,
                        check=False,
                    ).returncode
                except subprocess.TimeoutExpired:
                    print(f"{arm} seed {seed}: ended by --seconds", flush=True)
                    return None
            if code == 0 and out.is_file():
                result: dict[str, Any] = read_json(out)
                return result
            shutil.copy(log, args.work / f"failed-{arm}-{seed}.txt")
            tail = log.read_text(errors="replace")[-2000:]
            print(f"{arm} seed {seed} failed ({code}):\n{tail}", flush=True)
            return None
    finally:
        places.put(gpu)


def main() -> None:
    args = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.run:
        arm, seed, out = args.run.split(",", 2)
        train_and_evaluate(args, arm, int(seed), Path(out))
        return
    arms = [arm for arm in TRIVIAL if arm not in args.without.split(",")]
    arms += [arm for arm in args.arms.split(",") if arm and arm not in arms]
    if unknown := set(arms) - ARMS.keys():
        sys.exit(f"--arms: no {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    recipe = experiment_recipe(args)
    make_pool(args.work / "pool", recipe, HOME)
    pool = Pool.read(args.work / "pool")
    budget = budget_of(args, pool)
    print(
        f"pool: {len(pool.length):,} documents, {pool.tokens:,} tokens; budget {budget:,}",
        flush=True,
    )
    if args.only_arms:
        for arm, seed in product(arms, seeds):
            spans_of(arm, seed, pool, budget, args.work / "arms")
        return
    runs = [(BASE, 0)] if args.model else []
    runs += [(arm, seed) for seed, arm in product(seeds, arms)]
    results = run_all(args, runs, args.results or args.work / "results.json")
    table, figures = comparison_table(results, [arm for arm in TRIVIAL if arm in arms])
    print(table)
    print(json.dumps({"benchmark": "selection_value", "arms": figures}))


if __name__ == "__main__":
    main()
