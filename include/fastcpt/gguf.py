"""Converts a GGUF file into a base model folder for transformers.

``home/base_models/<name>-<digest>`` gets config.json, model.safetensors (bfloat16) and the tokenizer, from
the file's own metadata. Only Llama models with a byte-level BPE tokenizer are supported; anything unknown
is refused, never guessed. Formats: ggml's ``docs/gguf.md`` and ``ggml-quants.h``, read with numpy alone, as
Airflow's machine has no torch.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fastcpt.files import BASE_MODELS, HOME, flush, sha256_of_file, write_json

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUFFIX = ".gguf"
FORMAT = 1  # of the folders; increased when the conversion changes
INSTALLED = "gguf"  # folder under the home that is searched for named files


class GgufError(ValueError):
    """The file is missing, damaged or not supported; the message says what to do."""


def base_folder(name: str, home: Path = HOME) -> str:
    """``name`` itself, or for a GGUF file its model's folder, converted if necessary.

    A file is searched under its name, then in ``home/gguf``. Raises ``GgufError``.
    """
    if not name.endswith(SUFFIX):
        return name
    named = Path(name).expanduser()
    file = next((path for path in (named, home / INSTALLED / name) if path.is_file()), None)
    if file is None:
        raise GgufError(
            f"model.name_or_path: there is no '{name}', neither as named nor in {home / INSTALLED}; "
            "give the file's whole path, or put it there (for the recipe smollm2: "
            "include/scripts/install_smollm2.sh)"
        )
    return str(convert(file, home / BASE_MODELS))


def convert(file: Path, folder: Path) -> Path:
    """Convert a file to a model folder under ``folder``, unless it is already there."""
    digest = sha256_of_file(file)
    target = folder / f"{file.stem}-{digest[:16]}-{FORMAT}"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with file.open("rb") as content:
        gguf = _read(content, file)
        config = _config(gguf)
        write_json(partial / "config.json", config)
        _write_tokenizer(gguf, partial)
        _write_weights(gguf, content, config, partial / "model.safetensors")
    source = {"file": file.name, "sha256": digest}
    for key in ("general.name", "general.organization", "general.license"):
        source[key.removeprefix("general.")] = str(gguf.facts.get(key, ""))
    write_json(partial / "gguf.json", source)
    for path in [*partial.iterdir(), partial]:
        flush(path)
    partial.rename(target)
    flush(folder)
    return target


# The container


class _Tensor(NamedTuple):
    shape: tuple[int, ...]  # as in torch: the last axis is contiguous
    kind: int
    offset: int  # in the file


class _Gguf(NamedTuple):
    file: Path
    facts: dict[str, Any]
    tensors: dict[str, _Tensor]

    def fact(self, key: str) -> Any:
        if key not in self.facts:
            raise GgufError(f"{self.file} says nothing of {key}")
        return self.facts[key]


_NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _read(content: BinaryIO, file: Path) -> _Gguf:
    """Read the metadata and the tensors' locations."""
    try:
        magic, version, tensors, facts = struct.unpack("<4sIQQ", content.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise GgufError(f"{file} is no GGUF file of version 2 or 3")
        known = {_string(content): _value(content, *_unpack(content, "I")) for _ in range(facts)}
        places = [_place(content) for _ in range(tensors)]
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError) as error:
        raise GgufError(f"{file} is damaged or cut off: {error!r}; fetch it again") from error
    align = known.get("general.alignment", 32)
    data = -(-content.tell() // align) * align
    return _Gguf(
        file, known, {name: place._replace(offset=data + place.offset) for name, place in places}
    )


def _unpack(content: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", content.read(struct.calcsize(f"<{form}")))


def _string(content: BinaryIO) -> str:
    (length,) = _unpack(content, "Q")
    text = content.read(length)
    if len(text) < length:
        raise struct.error("a text ends too soon")
    return text.decode()


def _value(content: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(content)
    if kind == _ARRAY:
        inner, count = _unpack(content, "IQ")
        if inner in _NUMBERS:
            return list(_unpack(content, f"{count}{_NUMBERS[inner]}"))
        return [_value(content, inner) for _ in range(count)]
    return _unpack(content, _NUMBERS[kind])[0]


def _place(content: BinaryIO) -> tuple[str, _Tensor]:
    name = _string(content)
    (axes,) = _unpack(content, "I")
    shape = _unpack(content, f"{axes}Q")
    kind, offset = _unpack(content, "IQ")
    return name, _Tensor(tuple(reversed(shape)), kind, offset)


# The weights


def _half(blocks: Bytes) -> Floats:
    halves: Floats = blocks.view("<f2").astype(np.float32)
    return halves


def _nibbles(packed: Bytes) -> Bytes:
    """[n, k] bytes -> [n, 2 k]: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]) + _half(b[:, 2:4])


def _q8_0(b: Bytes) -> Floats:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8)


def _q4_k(b: Bytes) -> Floats:
    """Eight blocks of 32, each with a 6-bit scale and a 6-bit minimum, which are scaled in turn."""
    packed = b[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    halves = b[:, 16:].reshape(-1, 4, 32)
    quants = np.stack([halves & 15, halves >> 4], axis=2).reshape(-1, 8, 32)
    scale, least = _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima
    weights: Floats = scale[:, :, None] * quants - least[:, :, None]
    return weights.reshape(len(b), -1)


def _q6_k(b: Bytes) -> Floats:
    """Sixteen blocks of 16, each with a signed scale; four low and two high bits per weight."""
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    quants = (low.reshape(-1, 8, 32) | high.reshape(-1, 8, 32) << 4).astype(np.float32) - 32
    scales = _half(b[:, 208:]) * b[:, 192:208].view(np.int8)
    weights: Floats = scales[:, :, None] * quants.reshape(-1, 16, 16)
    return weights.reshape(len(b), -1)


# by ggml's number: name, weights per block, bytes per block, decoder
_KINDS: dict[int, tuple[str, int, int, Any]] = {
    0: ("F32", 1, 4, lambda b: b.view("<f4")),
    1: ("F16", 1, 2, _half),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
    12: ("Q4_K", 256, 144, _q4_k),
    14: ("Q6_K", 256, 210, _q6_k),
    30: ("BF16", 1, 2, lambda b: (b.view("<u2").astype(np.uint32) << 16).view(np.float32)),
}


def weights_of(stored: Bytes, kind: int) -> Floats:
    """A tensor's stored bytes as flat float32 weights."""
    _, _, size, read = _KINDS[kind]
    return np.asarray(read(stored.reshape(-1, size)), dtype=np.float32).reshape(-1)


_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _names(layers: int, tied: bool) -> dict[str, str]:
    """GGUF's names by transformers' names."""
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    for n in range(layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{n}.{ours}.weight"] = f"blk.{n}.{theirs}.weight"
    names["model.norm.weight"] = "output_norm.weight"
    return names if tied else {**names, "lm_head.weight": "output.weight"}


def _write_weights(gguf: _Gguf, content: BinaryIO, config: dict[str, Any], target: Path) -> None:
    """Write a safetensors file of bfloat16 weights, one tensor at a time."""
    names = _names(config["num_hidden_layers"], config["tie_word_embeddings"])
    missing = [theirs for theirs in names.values() if theirs not in gguf.tensors]
    strange = sorted(set(gguf.tensors) - set(names.values()))
    if missing or strange:
        raise GgufError(
            f"{gguf.file} is no plain Llama: "
            + "; ".join(
                f"{what} {', '.join(some[:3])}"
                for what, some in (("it lacks", missing), ("not known here:", strange))
                if some
            )
            + ". Give the model's folder or hub name instead"
        )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for ours, theirs in names.items():
        begin, shape = end, gguf.tensors[theirs].shape
        end += 2 * math.prod(shape)
        header[ours] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for ours, theirs in names.items():
            weights = _tensor(gguf, content, theirs)
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            for projection, count in heads.items():
                if f".{projection}." in ours:
                    weights = _unpaired(weights, config[count])
            _to_bfloat16(weights).tofile(out)


def _tensor(gguf: _Gguf, content: BinaryIO, name: str) -> Floats:
    shape, kind, offset = gguf.tensors[name]
    if kind not in _KINDS:
        raise GgufError(
            f"{gguf.file}: {name} is quantized in a way that is not read here (ggml type {kind}); "
            f"take a file of {', '.join(known for known, *_ in _KINDS.values())}"
        )
    _, of_block, size, _ = _KINDS[kind]
    content.seek(offset)
    stored = content.read(math.prod(shape) // of_block * size)
    if len(stored) < math.prod(shape) // of_block * size:
        raise GgufError(f"{gguf.file} is cut off at {name}; fetch it again")
    return weights_of(np.frombuffer(stored, np.uint8), kind).reshape(shape)


def _unpaired(weights: Floats, heads: int) -> Floats:
    """Reorder rows of queries or keys: ggml rotates neighbours, transformers rotates halves."""
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _to_bfloat16(weights: Floats) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(weights).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(
        "<u2"
    )  # round to nearest, ties to even


def _config(gguf: _Gguf) -> dict[str, Any]:
    """The content of config.json, for transformers' LlamaConfig."""
    if gguf.fact("general.architecture") != "llama":
        raise GgufError(
            f"{gguf.file} is a {gguf.fact('general.architecture')} model: only llama ones are read "
            "from GGUF; give the model's folder or hub name instead"
        )
    heads, width = gguf.fact("llama.attention.head_count"), gguf.fact("llama.embedding_length")
    head = gguf.facts.get("llama.attention.key_length", width // heads)
    scaling = gguf.facts.get("llama.rope.scaling.type", "none")
    if scaling != "none" or gguf.facts.get("llama.rope.dimension_count", head) != head:
        raise GgufError(
            f"{gguf.file} turns positions in a way that is not read from GGUF here (scaling "
            f"{scaling!r}); give the model's folder or hub name instead"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": gguf.fact("llama.feed_forward_length"),
        "num_hidden_layers": gguf.fact("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.facts.get("llama.attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": gguf.fact("llama.context_length"),
        "rms_norm_eps": _short(gguf.fact("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(gguf.facts.get("llama.rope.freq_base", 10_000.0)),
        "vocab_size": len(gguf.fact("tokenizer.ggml.tokens")),
        "bos_token_id": gguf.facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.facts.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.facts.get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }


def _short(value: float) -> float:
    """The decimal that a float32 was made from: 1e-05 for 9.99999974737875e-06."""
    return float(f"{value:.7g}")


# The tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Pre-tokenizers of ``tokenizers`` by llama.cpp's name (``tokenizer.ggml.pre``), before ByteLevel, which
# has GPT-2's expression; smollm splits digits first.
_SPLITS: dict[str, list[Any]] = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


def _write_tokenizer(gguf: _Gguf, folder: Path) -> None:
    """Write tokenizer.json and its config from the file's ids, merges, token types and BOS settings."""
    tokens: list[str] = gguf.fact("tokenizer.ggml.tokens")
    kinds: list[int] = gguf.fact("tokenizer.ggml.token_type")
    model, first = gguf.fact("tokenizer.ggml.model"), gguf.facts.get("tokenizer.ggml.pre", "none")
    if model != "gpt2" or first not in _SPLITS:
        raise GgufError(
            f"{gguf.file} has a tokenizer ({model}, first split {first}) that is not known here; "
            f"known are gpt2 with {' or '.join(_SPLITS)}. Give the model's folder or hub name instead"
        )
    merges = [tuple(pair.split(" ")) for pair in gguf.fact("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, merges))
    split = [*_SPLITS[first], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    without = _bytes_without_token(tokens)
    if without:  # these bytes yield no token, and nothing is merged across them
        split.append(pre_tokenizers.Split(Regex(f"[{without}]"), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if tokenizer.get_vocab_size() != len(tokens):
        raise GgufError(f"{gguf.file}: tokens of its vocabulary stand in it twice")
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(_special_tokens(gguf, tokens))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(gguf.facts.get("tokenizer.ggml.add_bos_token", False)),
            "add_eos_token": bool(gguf.facts.get("tokenizer.ggml.add_eos_token", False)),
            "clean_up_tokenization_spaces": False,
            "model_max_length": gguf.fact("llama.context_length"),
            **named,
        },
    )
    if template := gguf.facts.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _special_tokens(gguf: _Gguf, tokens: list[str]) -> Iterator[tuple[str, str]]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        number = gguf.facts.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            yield f"{ours}_token", tokens[number]


def _bytes_without_token(tokens: list[str]) -> str:
    known = set(tokens)
    return "".join(
        sorted(char for char in pre_tokenizers.ByteLevel.alphabet() if char not in known)
    )
