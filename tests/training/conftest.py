"""A tiny corpus in the layout of the corpus room, and the launcher on two CPU ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastcpt.files import sha256_of_file

INCLUDE = Path(__file__).resolve().parents[2] / "include"
SIZE = 64
WORDS = 256


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 40 rows each; a token is followed by the next higher one, nearly always."""
    folder = tmp_path_factory.mktemp("corpus")
    words = {f"w{n}": n for n in range(WORDS)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        bos_token="w0",
        eos_token="w1",
        unk_token="w2",
        pad_token="w1",
    )
    fast.save_pretrained(str(folder / "tokenizer"))
    drawn = np.random.default_rng(0)
    shards, lengths = [], []
    for _ in range(2):
        shards.append([])
        lengths.append([])
        for _ in range(40):
            first = int(drawn.integers(10, SIZE - 10))
            rest = int(drawn.integers(2, SIZE - first + 1))
            row: list[int] = []
            for length in (first, rest):
                begin = int(drawn.integers(3, 150))
                row += range(begin, begin + length)
            shards[-1].append(row)
            lengths[-1].append([first, rest])
    write_shards(folder, shards, lengths)
    return folder


def write_shards(
    folder: Path,
    shards: list[list[list[int]]],
    lengths: list[list[list[int]]],
    areas: list[list[list[list[str] | None]]] | None = None,
) -> None:
    """Shards of rows of tokens, with the lengths and areas of the rows' segments, and their manifest."""
    files = []
    kind = pa.list_(pa.int32())
    for shard, (ids, pieces) in enumerate(zip(shards, lengths, strict=True)):
        file = folder / f"cpt_train_shard_{shard:02d}.parquet"
        columns = {"input_ids": pa.array(ids, kind), "lengths": pa.array(pieces, kind)}
        if areas:
            columns["areas"] = pa.array(areas[shard], pa.list_(pa.list_(pa.string())))
        parquet.write_table(pa.table(columns), file, row_group_size=7)
        files.append(
            {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        )
    (folder / "corpus_manifest.json").write_text(json.dumps({"files": files}))


def write_recipe(folder: Path, **sections: object) -> Path:
    """A recipe of a one-layer model; ``sections`` are merged into it."""
    recipe: dict[str, dict[str, object]] = {
        "corpus": {"max_seq_length": SIZE},
        "model": {
            "name_or_path": None,
            "dtype": "float32",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        },
        "training": {
            "max_steps": 12,
            "warmup_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 6,
        },
        "cluster": {"gpus": 2, "gpu": None, "cpu_only": True},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(INCLUDE),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def launch(script: str, *arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
    """A script under the deepspeed launcher, its output piped together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    return _start([deepspeed, "--num_gpus", ranks, "--master_port", port], script, arguments)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A script on its own, for what ends before there are ranks."""
    return _start([sys.executable], script, arguments)


def _start(
    command: list[object], script: str, arguments: tuple[object, ...]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in (*command, INCLUDE / "scripts" / script, *arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train_arguments(recipe: Path, corpus: Path, output: Path, *more: object) -> list[object]:
    zero3 = INCLUDE / "configs" / "ds_config_zero3.json"
    return [
        *("--config", recipe, "--deepspeed", zero3),
        *("--data_dir", corpus, "--output_dir", output, *more),
    ]


@pytest.fixture(scope="session")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    recipe = write_recipe(folder)
    subprocess.run(
        [
            *(sys.executable, INCLUDE / "scripts" / "initialise_model.py", "--config", recipe),
            *("--tokenizer", corpus / "tokenizer", "--output_dir", folder / "model"),
        ],
        env=environment(),
        check=True,
    )
    return folder / "model"
