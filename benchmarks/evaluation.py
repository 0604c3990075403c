"""The speed of evaluation and generation on this host, and whether batching changes the result.

    python benchmarks/evaluation.py [--shape 8b] [--tokens 400000]
    deepspeed --num_gpus 2 benchmarks/evaluation.py --shape 70b

A Llama of the trainer's benchmark shapes with random weights reads random documents of 200 to
20,000 tokens in windows of 3072, with batches of several sizes, then answers 64 prompts. The last
line is one JSON object. ``tokens_per_s`` counts evaluated tokens, over all GPUs: at training
rate R (tokens/s over the same GPUs), with a share s of the corpus held out, base and trained model
take 2 s R / tokens_per_s of one pass over the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "include"))

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastcpt.training.evaluation import loss_figures
from fastcpt.training.generation import generate
from fastcpt.training.inference import model_for_inference, ranks
from fastcpt.training.model import choose_attention
from fastcpt.training.ranks import rank, world_size
from fastcpt.training.scoring import Scorer, document_losses
from fastcpt.training.validation import HeldOutDocument
from training import SHAPES, SIZE

BATCHES = (SIZE, 4 * SIZE, 16 * SIZE)
ANSWERS, NEW_TOKENS = 64, 128


class Words:
    """The parts of a tokenizer that generation needs; no token ends an answer."""

    pad_token_id, eos_token_id = 0, 1

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


class Chat:
    tokenizer, end_id = Words(), 1


def documents(tokens: int, words: int) -> list[HeldOutDocument]:
    drawn = np.random.default_rng(0)
    made: list[HeldOutDocument] = []
    while sum(len(one.input_ids) for one in made) < tokens:
        length = int(np.exp(drawn.uniform(np.log(200), np.log(20_000))))
        ids = drawn.integers(2, words, length).astype(np.int32)
        made.append(HeldOutDocument(str(len(made)), ids, 4 * length, 2020, ()))
    return made


def write_model(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Written once per host; the other ranks wait for it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.manual_seed(0)
        more = {"max_position_embeddings": 8192, "initializer_range": 0.05}
        config = AutoConfig.for_model(**{"model_type": "llama", **shape, **more})
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=400_000, help="in the documents")
    parser.add_argument("--in_parts", action="store_true", default=None)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    # one folder for all ranks of a launch
    folder = (
        Path(tempfile.gettempdir()) / f"evaluation-{args.shape}-{os.environ.get('MASTER_PORT', 0)}"
    )
    with ranks() as device:
        write_model(folder, SHAPES[args.shape], device)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        begin = time.monotonic()
        scorer, in_parts = model_for_inference(
            folder, "auto", "bfloat16", device, wrap=Scorer, in_parts=args.in_parts
        )
        result: dict[str, Any] = {
            "shape": args.shape,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "ranks": world_size(),
            "in_parts": in_parts,
            "attention": choose_attention("auto"),
            "load_s": round(time.monotonic() - begin, 1),
            "evaluation": [],
        }
        found = documents(args.tokens, scorer.model.config.vocab_size)
        document_losses(scorer, found[:2], SIZE, device)
        for batch in BATCHES:
            begin = time.monotonic()
            figures = loss_figures(found, document_losses(scorer, found, SIZE, device, batch, "it"))
            seconds = time.monotonic() - begin
            line = {
                "batch_tokens": batch,
                "perplexity": f"{figures['perplexity']:.6g}",
                "tokens_per_s": round(figures["tokens"] / seconds),
            }
            result["evaluation"].append(line)
            if rank() == 0:
                print(line, flush=True)
        prompts = [[2] * (20 + n) for n in range(ANSWERS)]
        begin = time.monotonic()
        generate(scorer.model, Chat(), prompts, NEW_TOKENS, device, in_parts=in_parts)  # type: ignore[arg-type]
        seconds = time.monotonic() - begin
        result["generated_tokens_per_s"] = round(ANSWERS * NEW_TOKENS / seconds)
        if device.type == "cuda":
            result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if rank() == 0:
            shutil.rmtree(folder)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
