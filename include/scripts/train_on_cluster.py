"""Check a host, send code and corpus there, train and evaluate, and copy the figures back.

The last part of ``run_fast_cpt_training.sh``. Without ``--host`` everything runs on this machine,
through the same jobs. If the host has fewer GPUs than the recipe wants, those are used. It
prints the project's own lines; the output of launchers and libraries is in a log beside the figures.
It ends with the gate's decision and the command for the next step.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import local_sshd

from fastcpt import gate
from fastcpt.cluster import environment, jobs
from fastcpt.cluster.check import check_cluster
from fastcpt.cluster.remote import ConnectionLost, Remote, ask, ask_through
from fastcpt.cluster.transfer import files_of, send, send_base_model
from fastcpt.files import HOME, digest_of, read_json, whole_file
from fastcpt.manifests import CorpusManifest
from fastcpt.recipe import Recipe, load_recipe
from fastcpt.recipe_sections import CONFIGS
from fastcpt.training import commands, made_from

REPOSITORY = Path(__file__).resolve().parents[2]
# lines of DeepSpeed's launcher, torch's log, and Python's warnings with their indented lines
NOISE = re.compile(r"\s|$|\[\d{4}-\d\d-\d\d |\[rank\d+\]|[WIE]\d{4} |\S+:\d+: \w*Warning: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="recipe, by name or file")
    parser.add_argument("--corpus", type=Path, required=True, help="a built corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    for name in ("host", "port", "user", "key_file", "known_hosts", "python"):
        parser.add_argument(f"--{name}", default="")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config)
    server: local_sshd.Server | None = None
    try:
        if arguments.host:
            remote = Remote(
                arguments.host,
                arguments.user or None,
                int(arguments.port) if arguments.port else None,
                arguments.key_file or None,
                arguments.known_hosts or None,
            )
        else:
            server = local_sshd.start_server(HOME / "sshd")
            remote = Remote(
                server["host"],
                server["user"],
                server["port"],
                server["key_file"],
                server["known_hosts"],
            )
            overrides = {"cluster.root": str(HOME / "cluster")}
            recipe = load_recipe(arguments.config, overrides)
        train_on(remote, recipe, arguments)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    finally:
        if server:
            os.killpg(server["pid"], signal.SIGTERM)


def train_on(remote: Remote, recipe: Recipe, arguments: argparse.Namespace) -> None:
    recipe, facts = with_gpus_of(remote, recipe)
    root = facts["root"]
    code = environment.ship_code(remote, root, REPOSITORY)["path"]
    local_python = "" if arguments.host else str(REPOSITORY / ".env/cluster/bin/python")
    named = arguments.python or recipe.cluster.python or local_python
    python = python_of(remote, root, recipe, code, named, arguments.output)
    manifest: CorpusManifest = read_json(arguments.corpus / "corpus_manifest.json")
    listed = [*manifest["files"], *files_of(arguments.corpus, ["corpus_manifest.json"])]
    corpus = send(remote, arguments.corpus, f"{root}/corpora/{manifest['digest']}", listed)["path"]
    with whole_file(arguments.output / "recipe.yaml") as aside:
        aside.write_text(recipe.to_yaml(), encoding="utf-8")
    shipped = files_of(arguments.output, ["recipe.yaml"])
    place = send(remote, arguments.output, f"{root}/runs/{digest_of(shipped)}", shipped)["path"]
    host = commands.Host(python, code, f"{place}/recipe.yaml")
    base = send_base_model(remote, recipe.model.name_or_path, root)
    job, output = training_job(recipe, host, root, corpus, manifest, base)
    follow_job(remote, root, job, arguments.output)
    paths = {name: f"{output}/{name}" for name in ("training.json", "metrics.jsonl")}
    files = ask(remote, "read_files", paths={**paths, "evaluation.json": job.result})
    for name, text in files.items():
        with whole_file(arguments.output / name) as aside:
            aside.write_text(text, encoding="utf-8")
    print(f"The model is in {output}/final on {remote.host}; its figures are in {arguments.output}")
    print(what_is_next(recipe, host, json.loads(files["evaluation.json"]), corpus, output))


def what_is_next(
    recipe: Recipe, host: commands.Host, evaluation: dict[str, Any], corpus: str, output: str
) -> str:
    """The gate's decision, and the command for it on the host: fine-tuning, or stage 2."""
    decided = gate.decide(evaluation, recipe.gate.perplexity_threshold, recipe.gate.validation_set)
    model, port = f"{output}/final", 29_500
    if decided["passed"]:
        then = "fine-tuning there, with DIR a folder of instructions (train.jsonl)"
        command = commands.train_sft_command(
            recipe, host, port, instructions="DIR", model=model, output=f"{output}-sft"
        )
    else:
        then = "stage 2 there"
        command = commands.train_cpt_command(
            recipe,
            host,
            port,
            corpus=corpus,
            model=model,
            output=f"{output}-stage2",
            stage="stage2",
        )
    settings = [f"{name}={value}" for name, value in commands.environment(recipe, host).items()]
    return (
        f"Gate: {decided['decision']}, perplexity {gate.words(decided)}.\n"
        f"Next is {then}:\n{shlex.join(['env', *settings, *command])}"
    )


def python_of(
    remote: Remote, root: str, recipe: Recipe, code: str, named: str, output: Path
) -> str:
    """The interpreter on the host: the named one, or else one that is built there."""
    if named:
        cluster = recipe.cluster.model_copy(update={"python": named})
        return environment.check_python(remote, cluster, REPOSITORY)
    folder = environment.environment_folder(recipe, root, REPOSITORY)
    build = environment.build_commands(recipe, root, code, folder)
    name = f"environment-{digest_of(folder)}"
    follow_job(remote, root, jobs.Job(name, build, result=f"{folder}/complete", alone="no"), output)
    return f"{folder}/bin/python"


def training_job(
    recipe: Recipe,
    host: commands.Host,
    root: str,
    corpus: str,
    manifest: CorpusManifest,
    sent_base: str | None,
) -> tuple[jobs.Job, str]:
    """The job that trains and evaluates, and its output folder on the host."""
    base = sent_base or made_from.base_name(recipe, made_from.tokenizer_digest(manifest["files"]))
    name = made_from.training_name(
        recipe,
        recipe.training,
        model=base.removeprefix(f"{root}/"),
        data={"corpus": manifest["digest"]},
        deepspeed=CONFIGS,
    )
    if recipe.model.config is not None:
        base = f"{root}/models/{base}"
    output = f"{root}/models/{name}"
    of = base.removeprefix(f"{root}/")
    named = made_from.evaluation_name(recipe, base=of, corpus=manifest["digest"])
    evaluation = f"{output}/evaluation-{named}.json"
    port = 20_000 + int(name, 16) % 10_000
    train = commands.train_cpt_command(
        recipe, host, port, corpus=corpus, model=base, output=output, stage="stage1"
    )
    evaluate = commands.evaluate_command(
        recipe, host, port, corpus=corpus, model=f"{output}/final", base=base, output=evaluation
    )
    job = jobs.Job(
        f"shell-{name}",
        [*commands.initialise(recipe, host, corpus, base), train, evaluate],
        commands.environment(recipe, host),
        result=evaluation,
        alone=jobs.alone(recipe.cluster),
    )
    return job, output


def with_gpus_of(remote: Remote, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, with the host's number of GPUs if that is smaller."""
    found = len(ask(remote, "check", root=recipe.cluster.root)["gpus"])
    if not recipe.cluster.cpu_only and 0 < found < recipe.cluster.gpus and not recipe.cluster.hosts:
        print(
            f"{remote.host} has {found} GPUs, the recipe wants {recipe.cluster.gpus}: using {found}"
        )
        cluster = recipe.cluster.model_copy(update={"gpus": found})
        recipe = recipe.model_copy(update={"cluster": cluster})
    return recipe, check_cluster(remote, recipe.cluster)


def follow_job(remote: Remote, root: str, job: jobs.Job, output: Path) -> None:
    """Run a job to its end: its log is copied into ``output``, the project's own lines are printed."""
    found = jobs.submit(remote, root, job)
    log = output / f"{job.name}.log"
    print(
        f"job {job.name}: {found}{'' if found == 'complete' else f', its log is {log}'}", flush=True
    )
    if found == "complete":
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    begun = b""
    seen: int | None = None
    last_lines = [""]
    while True:
        asked = [{"name": job.name, "seen": seen}]
        answer = ask_through(remote, "poll", root=root, jobs=asked)["jobs"][0]
        if "error" in answer:
            raise ConnectionLost(f"{remote.host}: {answer['error']}")
        piece = base64.b64decode(answer["log"])
        seen = answer["seen"] + len(piece)
        with log.open("ab") as whole:
            whole.write(piece)
        *ended, begun = (begun + piece).split(b"\n")
        lines = [line.decode(errors="replace") for line in ended]
        for line in lines:
            if not NOISE.match(line):
                print(line, flush=True)
        last_lines = (last_lines + lines)[-30:]
        if answer["status"]["state"] not in jobs.ACTIVE and seen >= answer["size"]:
            jobs.outcome(remote, job.name, answer["status"], last_lines)
            return
        time.sleep(2)


if __name__ == "__main__":
    main()
