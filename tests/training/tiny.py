"""A Llama with two layers and a tokenizer of single bytes: small enough to work out figures by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, END, PAD, TURN = 256, 257, 258, 259
WORDS = 260
CONTEXT = 512
torch.set_num_threads(1)  # threads cost more than they save on layers of this size


def byte_tokenizer(folder: Path, template: str | None = None) -> Path:
    """A token a byte; a chat template only where one is given."""
    words = Tokenizer(models.BPE({byte: n for n, byte in enumerate(BYTES)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    ids = fast.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<turn>"])
    assert ids == [BOS, END, PAD, TURN]
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Random weights large enough that logits differ between tokens and contexts."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).eval()


def model_folder(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A folder that transformers loads, with the byte tokenizer."""
    llama(seed, **settings).save_pretrained(str(folder))
    return byte_tokenizer(folder)


def adapter_folder(folder: Path, base: Path) -> Path:
    """The ``final`` folder of a LoRA training on ``base``, its adapters far from zero."""
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"])
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(str(folder))
    (folder / "base.json").write_text(f'{{"base": "{base}"}}\n')
    return byte_tokenizer(folder)
