"""The corpus's folder as a dataset: each configuration has exactly the files of its set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from corpus.made import acts, made
from fastcpt.corpus.dataset_card import dataset_card
from fastcpt.manifests import CorpusManifest
from fastcpt.recipe import Recipe


def test_each_configuration_holds_the_files_of_its_set(
    documents: Callable[..., Path], recipe_for: Callable[..., Recipe], home: Path
) -> None:
    corpus = made(recipe_for(documents(acts())), home)
    folder = Path(corpus["path"])
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    found = {}
    for config in front["configs"]:
        (files,) = config["data_files"]
        assert files["split"] == config["config_name"]
        found[config["config_name"]] = {
            str(path.relative_to(folder)) for path in folder.glob(files["path"])
        }
    held_out = {"validation": "validation", "newest": "validation_newest"}
    assert found == {
        "train": {shard["file"] for shard in corpus["shards"]},
        **{
            name: {item["file"] for item in corpus["validation"] if item["set"] == held}
            for name, held in held_out.items()
        },
    }
    assert [config["config_name"] for config in front["configs"] if config["default"]] == ["train"]


def test_the_card_has_the_manifests_figures_and_a_general_set_where_there_is_one() -> None:
    manifest: CorpusManifest = {  # type: ignore[typeddict-item]
        **{"digest": "0a", "documents": 1200, "tokens": 34_000, "sequences": 70},
        **{"max_seq_length": 512, "padding_share": 0.0125, "bytes_per_token": 4.4},
        "validation": [
            {"file": f"{name}/part_00.parquet"} for name in ("validation", "validation_general")
        ],
    }
    card = dataset_card(manifest)
    assert "| tokens for training | 34,000 |" in card
    assert "| sequences | 70 of 512 tokens |" in card
    assert "| padding | 1.25 % |" in card
    assert 'load_dataset(FOLDER, "general", split="general")' in card
    assert "newest" not in card
