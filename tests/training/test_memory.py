"""What the trainer recomputes by itself is what a plan foresees: two rooms, one rule."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from fastcpt.planning.costs import UNSEEN, Job, as_the_trainer_runs
from fastcpt.planning.shapes import KNOWN
from fastcpt.recipe import Lora, Training
from fastcpt.training.memory import StepMemory


@pytest.mark.parametrize("gpu_gb", [48.3, 85.5, 150.7, 192.0])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.1], ids=["full", "LoRA", "LoRA with dropout"])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Llama-3.1-70B"])
def test_trainer_and_plan_agree(name: str, dropout: float | None, gpu_gb: float) -> None:
    shape = KNOWN[name]
    lora = None if dropout is None else Lora(lora_dropout=dropout)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.queries // shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    chosen = set()
    for micro in (1, 2, 4, 8, 16):
        for ranks in (1, 2, 8):
            for fp8 in (False, True):
                training = Training(per_device_train_batch_size=micro)
                seen = int(gpu_gb * 1e9 - UNSEEN)
                trainer = StepMemory(
                    config, training, 3072, seen, ranks, lora is not None, bool(dropout), fp8
                )
                job = Job(shape, 3072, micro, 1, ranks, lora=lora, fp8=fp8)
                planned = as_the_trainer_runs(job, gpu_gb * 1e9)
                again = planned.again * shape.num_hidden_layers
                full, mlp = (
                    round(again) if planned.checkpointing == kind else 0 for kind in ("full", "mlp")
                )
                # the trainer counts a block's two norms and leaves the last one out: a layer either way
                assert trainer.recomputed == pytest.approx(full, abs=1), job
                assert trainer.mlp_recomputed == pytest.approx(mlp, abs=1), job
                assert trainer.gathered == planned.gathered, job
                chosen.add(planned.checkpointing)
    assert chosen
