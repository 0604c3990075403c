"""The command of each job on the cluster, as a list of words, never as text for a shell.

Pure functions of the recipe and of paths on the cluster (``Host``); no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastcpt.recipe import Recipe

Command = list[str]
# Environment variables that the trainer reads. DEADLINE is set by a rented host's agent
# (cluster.agent.processes): when its money is spent, in seconds since the epoch.
PRICE = "FASTCPT_PRICE_PER_GPU_HOUR"
DEADLINE = "FASTCPT_DEADLINE"


@dataclass(frozen=True)
class Host:
    """Absolute paths on the cluster: interpreter, shipped code, the run's recipe."""

    python: str
    code: str
    recipe: str

    def script(self, name: str) -> str:
        return f"{self.code}/include/scripts/{name}"


def environment(recipe: Recipe, host: Host, price: float | None = None) -> dict[str, str]:
    """Environment variables of every job; ``price`` in USD per GPU hour, if known."""
    values = {
        "PYTHONPATH": f"{host.code}/include",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NVTE_FP8_DPA_BWD": "1",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    }
    if price is not None:
        values[PRICE] = str(price)
    if recipe.model.config is not None:
        values["HF_HUB_OFFLINE"] = "1"  # such a run needs nothing from a hub
    if recipe.cluster.cpu_only:
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return values


def launch(recipe: Recipe, host: Host, port: int) -> Command:
    """DeepSpeed's launcher over the recipe's GPUs, on one host or on each of several.

    Several hosts, and Slurm's, are started by the agent's ``on-hosts`` (``cluster.agent.hosts``), which
    fills in the words in braces.
    """
    deepspeed = [host.python, f"{host.python.rpartition('/')[0]}/deepspeed"]
    cluster = recipe.cluster
    if not cluster.hosts and cluster.launcher == "process":
        return [*deepspeed, "--master_port", str(port), "--num_gpus", str(cluster.gpus)]
    on_hosts = ["python3", "supervisor.py", "on-hosts", str(cluster.gpus), ",".join(cluster.hosts)]
    return [
        *on_hosts,
        *deepspeed,
        *("--hostfile", "{hostfile}", "--no_ssh", "--node_rank", "{node_rank}"),
        *("--master_addr", "{master_addr}", "--master_port", str(port)),
    ]


def initialise(recipe: Recipe, host: Host, corpus: str, base: str) -> list[Command]:
    """Commands that create the base model if the recipe has a ``model.config``; else none."""
    if recipe.model.config is None:
        return []
    script = [host.python, host.script("initialise_model.py"), "--config", host.recipe]
    return [[*script, "--tokenizer", f"{corpus}/tokenizer", "--output_dir", base]]


def train_cpt_command(
    recipe: Recipe,
    host: Host,
    port: int,
    *,
    corpus: str,
    model: str,
    output: str,
    stage: Literal["stage1", "stage2"],
) -> Command:
    training = recipe.training if stage == "stage1" else recipe.stage2
    command = [
        *launch(recipe, host, port),
        host.script("train_cpt.py"),
        *("--config", host.recipe),
        *("--deepspeed", f"{host.code}/include/configs/{training.deepspeed}"),
        *("--data_dir", corpus),
        *("--output_dir", output),
        *("--stage", stage),
        *("--model", model),
    ]
    return [*command, "--use_fp8"] if training.use_fp8 else command


def evaluate_command(
    recipe: Recipe,
    host: Host,
    port: int,
    *,
    corpus: str,
    model: str,
    base: str,
    output: str,
    base_evaluation: str | None = None,
) -> Command:
    """``base_evaluation``: an earlier evaluation, to reuse the base model's figures."""
    known = ["--base_evaluation", base_evaluation] if base_evaluation else []
    return [
        *_on_gpus(recipe, host, port),
        host.script("evaluate_cpt_checkpoint.py"),
        *("--config", host.recipe),
        *("--checkpoint", model),
        *("--validation_data", corpus),
        *("--base_model", base),
        *known,
        *("--output", output),
    ]


def train_sft_command(
    recipe: Recipe, host: Host, port: int, *, instructions: str, model: str, output: str
) -> Command:
    training = recipe.sft.training
    command = [
        *launch(recipe, host, port),
        host.script("train_sft.py"),
        *("--config", host.recipe),
        *("--deepspeed", f"{host.code}/include/configs/{training.deepspeed}"),
        *("--model", model),
        *("--instructions", instructions),
        *("--output_dir", output),
    ]
    return [*command, "--use_fp8"] if training.use_fp8 else command


def evaluate_sft_command(
    recipe: Recipe, host: Host, port: int, *, instructions: str, model: str, base: str, output: str
) -> Command:
    return [
        *_on_gpus(recipe, host, port),
        host.script("evaluate_sft.py"),
        *("--config", host.recipe),
        *("--model", model),
        *("--base_model", base),
        *("--instructions", instructions),
        *("--output", output),
    ]


def publish_command(host: Host, *, model: str, record: str, output: str) -> Command:
    return [
        host.python,
        host.script("publish_model.py"),
        *("--config", host.recipe),
        *("--model", model),
        *("--record", record),
        *("--output_dir", output),
    ]


def _on_gpus(recipe: Recipe, host: Host, port: int) -> Command:
    # on CPUs the models are tiny, and one process starts faster than several
    return [host.python] if recipe.cluster.cpu_only else launch(recipe, host, port)
