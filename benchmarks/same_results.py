"""Whether two work trees of this project make the same results: corpora, names, plans, losses.

    git worktree add --detach ../old COMMIT
    python benchmarks/same_results.py ../old . [--only corpus names plans training] [--data FOLDER] [--keep FOLDER]

For changes that must not change results. Each tree makes the sample corpus, plans recipes and
trains a few CPU steps through its own commands: pre-training on two ranks and on one, fine-tuning,
LoRA, the evaluation. Files are compared byte for byte, losses to the last digit. Both trees need ``.env/``. The last line is one JSON object; the exit status is 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

PARTS = ("corpus", "names", "plans", "training")
# a training's files that do not depend on timing
METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "skipped_steps")
RESULT = (
    "steps",
    "tokens",
    "loss",
    "skipped_steps",
    "ranks",
    "accumulation",
    "layers",
    "precision",
)
STEPS = {"max_steps": 8, "warmup_steps": 2, "logging_steps": 1, "save_steps": 4}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
# the files of everything that is found by its digest
NAMES = """
import json
from pathlib import Path
import fastcpt
from fastcpt.recipe import load_recipe
from fastcpt.training import made_from
CONFIGS = Path(fastcpt.__file__).resolve().parents[1] / "configs"
names = {}
for file in sorted(CONFIGS.glob("*.yaml")):
    recipe = load_recipe(file.stem)
    base = made_from.base_name(recipe, "tokenizer")
    names[file.stem] = [
        base,
        *(
            made_from.training_name(
                recipe, training, model=base, data={"corpus": "data"}, deepspeed=CONFIGS
            )
            for training in (recipe.training, recipe.stage2, recipe.sft.training)
        ),
        made_from.evaluation_name(recipe, base=base, corpus="data"),
        made_from.answers_name(recipe, instructions="data"),
    ]
print(json.dumps(names))
"""
INSTRUCTIONS = """
import sys
from pathlib import Path
from fastcpt.corpus.instructions import build_instructions
from fastcpt.recipe import load_recipe
print(build_instructions(load_recipe(sys.argv[1]), Path(sys.argv[2]))["path"])
"""


class Tree:
    """A work tree, and the folder for its results."""

    def __init__(self, root: Path, made: Path) -> None:
        self.root, self.made = root.resolve(), made
        made.mkdir(parents=True, exist_ok=True)

    def run(self, environment: str, *command: object, may_fail: bool = False) -> str:
        """The stdout of a command in the tree; its environment is ``airflow`` or ``cluster``."""
        programs = self.root / ".env" / environment / "bin"
        words = [str(programs / command[0]), *map(str, command[1:])]
        print("+", " ".join(words).replace("\n", " ")[:200], file=sys.stderr, flush=True)
        done = subprocess.run(
            words,
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(self.root / "include"),
                "FASTCPT_HOME": str(self.made / "home"),
                **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            },
            cwd=self.made,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if not may_fail else subprocess.DEVNULL,
            text=True,
        )
        if done.returncode and not may_fail:
            sys.exit(f"{done.stdout}\n{' '.join(words)[:500]}: exit status {done.returncode}")
        return done.stdout

    def script(
        self, environment: str, name: str, *arguments: object, may_fail: bool = False
    ) -> str:
        script = self.root / "include" / "scripts" / name
        return self.run(environment, "python", script, *arguments, may_fail=may_fail)

    def launch(self, ranks: int, name: str, *arguments: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = self.root / "include" / "scripts" / name
        ranked = ("--num_gpus", ranks, "--master_port", port)
        self.run("cluster", "deepspeed", *ranked, script, *arguments)


def recipes(tree: Tree, documents: Path) -> tuple[Path, Path]:
    """The sample's recipe with few steps, whole and with adapters."""
    sample = yaml.safe_load((tree.root / "include/configs/sample.yaml").read_text())
    sample["documents"] = {"path": str(documents / "parsed")}
    sample["training"] |= STEPS
    sample["sft"]["training"] |= STEPS
    sample["sft"]["instructions"] = str(documents / "instructions.jsonl")
    full, adapters = tree.made / "full.yaml", tree.made / "adapters.yaml"
    full.write_text(yaml.safe_dump(sample))
    adapters.write_text(yaml.safe_dump({**sample, "lora": LORA}))
    return full, adapters


def make_corpus(tree: Tree, recipe: Path, documents: Path) -> tuple[Path, Path]:
    """The folders of the corpus and of the instructions."""
    filtered, corpus = tree.made / "filtered", tree.made / "corpus"
    common = ("--config", recipe)
    steps = (
        ("create_fast_cpt_corpus.py", documents / "parsed", filtered),
        ("cpt_corpus_builder.py", filtered, corpus),
    )
    for name, source, target in steps:
        tree.script("airflow", name, "--input_dir", source, "--output_dir", target, *common)
    home = tree.made / "home"
    said = tree.run("airflow", "python", "-c", INSTRUCTIONS, recipe, home)
    return corpus, Path(said.strip().splitlines()[-1])


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by file name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def plans(tree: Tree) -> dict[str, str]:
    """Plans of the recipes on several clusters, and of the published measurements."""
    asked: list[tuple[object, ...]] = [("--check",)]
    for cluster in ("8xH100", "4xB200", "16xA100", "1xH200"):
        on = ("--cluster", cluster, "--tokens", 900_000_000)
        asked.append(("--all", "--json", *on))
        asked += [("--json", "--config", name, *on) for name in ("cpt_config", "cpt_lora_config")]
    return {
        " ".join(map(str, words)): tree.script("airflow", "plan_run.py", *words, may_fail=True)
        for words in asked
    }


def trained(tree: Tree, full: Path, adapters: Path, corpus: Path, instructions: Path) -> Any:
    """The figures and weights of some trainings, and the perplexity of one."""
    base, zero3 = tree.made / "base", tree.root / "include/configs/ds_config_zero3.json"
    made = ("--tokenizer", corpus / "tokenizer", "--output_dir", base)
    tree.script("cluster", "initialise_model.py", "--config", full, *made)
    found: dict[str, Any] = {"base": contents(base)}
    for name, recipe, ranks in (("two", full, 2), ("one", full, 1), ("lora", adapters, 1)):
        of = ("--config", recipe, "--deepspeed", zero3, "--model", base, "--data_dir", corpus)
        tree.launch(ranks, "train_cpt.py", *of, "--output_dir", tree.made / name)
        found[name] = _figures(tree.made / name)
    of = ("--config", full, "--deepspeed", zero3, "--instructions", instructions)
    model = tree.made / "two" / "final"
    tree.launch(2, "train_sft.py", *of, "--model", model, "--output_dir", tree.made / "sft")
    found["sft"] = _figures(tree.made / "sft")
    file = tree.made / "evaluation.json"
    what = ("--validation_data", corpus, "--base_model", base, "--output", file, "--config", full)
    tree.script("cluster", "evaluate_cpt_checkpoint.py", "--checkpoint", model, *what)
    evaluation = json.loads(file.read_text())
    found["evaluation"] = _without(evaluation, ("seconds", "time", "path", "model", "base_model"))
    return found


def _figures(output: Path) -> dict[str, Any]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    result = json.loads((output / "training.json").read_text())
    weights = contents(output / "final")
    return {
        "metrics": [{key: line[key] for key in METRICS} for line in lines],
        "result": {key: result[key] for key in RESULT},
        "weights": {name: sha for name, sha in weights.items() if name.endswith(".safetensors")},
    }


def _without(content: Any, words: tuple[str, ...]) -> Any:
    """``content`` without the keys that contain one of these words."""
    if isinstance(content, list):
        return [_without(item, words) for item in content]
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if not any(w in key for w in words)}
    return {key: _without(value, words) for key, value in kept.items()}


def results_of(tree: Tree, parts: set[str], data: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if data:
        target = tree.made / "corpus_of_data"
        of = ("--input_dir", data.resolve(), "--output_dir", target, "--config", "local")
        tree.script("airflow", "cpt_corpus_builder.py", *of)
        found["data"] = contents(target)
    if "names" in parts:
        found["names"] = json.loads(tree.run("airflow", "python", "-c", NAMES))
    if "plans" in parts:
        found["plans"] = plans(tree)
    if not parts & {"corpus", "training"}:
        return found
    documents, home = tree.made / "documents", tree.made / "home"
    tree.script("airflow", "generate_sample.py", "--output_dir", documents)
    full, adapters = recipes(tree, documents)
    corpus, instructions = make_corpus(tree, full, documents)
    found["documents"], found["corpus"] = contents(documents), contents(corpus)
    found["instructions"] = contents(instructions)
    made = [*home.glob("*/*"), *home.glob("*/*/*")]
    found["folders"] = dict.fromkeys(str(path.relative_to(home)) for path in made)
    if "training" in parts:
        found["training"] = trained(tree, full, adapters, corpus, instructions)
    return found


def differences(old: Any, new: Any, where: str) -> list[str]:
    """The differences between two results, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{where}/{key}: in one tree alone" for key in sorted(old.keys() ^ new.keys())]
        for key in sorted(old.keys() & new.keys()):
            found += differences(old[key], new[key], f"{where}/{key}")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{where}/{n}")]
    return [] if old == new else [f"{where}: {str(old)[:200]} | {str(new)[:200]}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", type=Path, help="documents to build a further corpus from")
    parser.add_argument("--keep", type=Path, help="an empty folder in which the results are kept")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="same_results-"))
    found = []
    try:
        for name in ("old", "new"):
            # one path for both trees: digests depend on the paths of documents
            tree = Tree(getattr(arguments, name), folder.resolve() / "work")
            found.append(results_of(tree, set(arguments.only), arguments.data))
            tree.made.rename(folder / name)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    lines = differences(found[0], found[1], "")
    print("\n".join(lines))
    losses = {
        name: part["result"]["loss"]
        for name, part in found[1].get("training", {}).items()
        if "result" in part
    }
    compared = {part: len(results) for part, results in found[1].items()}
    print(
        json.dumps({"same": not lines, "differ": len(lines), "compared": compared, "loss": losses})
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
