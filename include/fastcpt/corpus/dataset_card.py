"""Writes the README.md with which Hugging Face's ``datasets`` opens a corpus's folder."""

from __future__ import annotations

from pathlib import PurePosixPath

import yaml

from fastcpt.manifests import CorpusManifest

# The folder of a held-out set, and what ``load_dataset(folder, NAME)`` calls it.
HELD_OUT = {
    "validation": "validation",
    "validation_newest": "newest",
    "validation_general": "general",
}


def dataset_card(manifest: CorpusManifest) -> str:
    """README.md with a configuration for the training rows and one for each held-out set.

    The format of ``configs``: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    folders = {PurePosixPath(shard["file"]).parent.name for shard in manifest["validation"]}
    sets = {name: f"{folder}/*.parquet" for folder, name in HELD_OUT.items() if folder in folders}
    files = {"train": "cpt_train_shard_*.parquet", **sets}
    configs = [
        {
            "config_name": name,
            "default": name == "train",
            "data_files": [{"split": name, "path": path}],
        }
        for name, path in files.items()
    ]
    opened = "\n".join(f'load_dataset(FOLDER, "{name}", split="{name}")' for name in files)
    return f"""---
{yaml.safe_dump({"configs": configs}, sort_keys=False)}---
# Corpus {manifest["digest"]}

Token ids for continued pre-training, made by Fast CPT from {manifest["documents"]:,} documents.

| | |
|---|---|
| tokens for training | {manifest["tokens"]:,} |
| sequences | {manifest["sequences"]:,} of {manifest["max_seq_length"]:,} tokens |
| padding | {100 * manifest["padding_share"]:.2f} % |
| stored bytes per token | {manifest["bytes_per_token"]:.2f} |

A training row has `input_ids`, the `lengths` of the documents in it, and their legal `areas`. A held-out row is a document. The
tokenizer lies in `tokenizer/`; `funnel.md` says what was left out and why.

```python
from datasets import load_dataset  # streaming=True works too

{opened}
```
"""
