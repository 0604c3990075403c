"""The command as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcpt.planning.history import record_run
from fastcpt.recipe import load_recipe

SCRIPT = Path(__file__).resolve().parents[2] / "include" / "scripts" / "plan_run.py"


def plan_run(*arguments, home="/nowhere"):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "FASTCPT_HOME": str(home)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_the_default_recipe_does_not_fit_and_the_status_says_so():
    done = plan_run("--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["fits"] is False


def test_the_sample_fits():
    done = plan_run("--config", "sample")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("on 2xCPU: fits.")


def test_a_solved_recipe_is_written_and_fits(tmp_path):
    out = tmp_path / "mine.yaml"
    solved = plan_run(
        "--model", "meta-llama/Llama-3.1-8B", "--cluster", "8xH100", "--hours", 5, "--out", out
    )
    assert solved.returncode == 0, solved.stderr
    again = plan_run("--config", out)
    assert again.returncode == 0
    assert again.stdout == solved.stdout
    assert again.stdout.startswith("plan of 'mine'")
    recipe = load_recipe(out)
    assert recipe.description == "The most tokens of cpt_config_fast for 5 h (plan_run.py)"
    assert (recipe.claim, recipe.cluster.gpus, recipe.cluster.gpu) == (None, 8, "H100")


def test_the_fewest_gpus_are_written_too(tmp_path):
    out = tmp_path / "fewest.yaml"
    wanted = ["--model", "meta-llama/Llama-3.2-3B", "--cluster", "1xH200", "--hours", 24]
    solved = plan_run(*wanted, "--budget", 500, "--solve_for", "gpus", "--out", out)
    assert solved.returncode == 0, solved.stderr
    recipe = load_recipe(out)
    assert recipe.global_batch_size == 128
    assert recipe.training.max_steps == 12_000
    fewer = plan_run("--config", out, "--cluster", f"{recipe.cluster.gpus // 2}xH200", "--json")
    assert json.loads(fewer.stdout)["fits_time"] is False


def test_what_a_run_taught_is_found_in_the_data_home(tmp_path):
    took = {"tokens_per_s_per_gpu": 1500.0, "peak_memory_gb": 1.0}
    record_run(tmp_path, "first", load_recipe("sample"), None, took)
    found = plan_run("--config", "sample", "--json", home=tmp_path)
    assert json.loads(found.stdout)["rate_source"].startswith("last run here, first of")


def test_predicted_beside_measured():
    done = plan_run("--check")
    assert done.returncode == 0
    held, _, count, words = done.stdout.splitlines()[-1].split(" ", 3)
    assert held == count != "0"
    assert words.startswith("rows within 15% of the rate")


@pytest.mark.parametrize("how", [[], ["--markdown"], ["--json"]], ids=["text", "markdown", "json"])
def test_all_options(how, tmp_path):
    picture = tmp_path / "matrix.png"
    done = plan_run("--all", "--picture", picture, *how)
    assert done.returncode == 0
    assert "hybrid" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_corpus_can_be_a_builds_manifest(tmp_path):
    manifest = tmp_path / "corpus_manifest.json"
    manifest.write_text(json.dumps({"tokens": 1_000_000_000}))
    found = json.loads(plan_run("--manifest", manifest, "--json").stdout)
    assert found["passes"] == pytest.approx(4.72, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "4xQ1"], "GPU 'Q1' is not in gpus.yaml"),
        (["--cluster", "2xA100-64GB"], "GPU 'A100-64GB' is not in gpus.yaml"),
        (["--all", "--cluster", "8xH100-MIG"], "('mig' is not known of H100)"),
        (["--config", "cpt_config_fats"], "did you mean 'cpt_config_fast'"),
        (["--config", "sample", "--hours", "2"], "name a cluster"),
        (["--manifest", "/nowhere.json"], "No such file"),
        *[
            ([option, value], f"argument {option}: must be a {kind} above 0, not '{value}'")
            for option, kind, values in (
                ("--tokens", "whole number", ["-5", "0", "1.5", "many"]),
                ("--documents_bytes", "whole number", ["-5", "0"]),
                ("--take", "whole number", ["0"]),
                ("--hours", "number", ["0", "-1", "nan", "inf", "long"]),
                ("--budget", "number", ["0", "-1", "nan", "inf"]),
            )
            for value in values
        ],
        (["--take", "1"], "say where with --out FILE.yaml"),
        (["--out", "my plan.yaml"], "'my plan.yaml' is no recipe's file"),
        (["--out", "plan"], "'plan' is no recipe's file"),
        (["--take", "40", "--out", "x.yaml"], "--take 40: 5 alternatives are listed"),
        (["--config", "sample", "--take", "1", "--out", "x.yaml"], "'sample' fits as it is"),
        (["--all", "--out", "x.yaml"], "--out is for one recipe"),
        (["--solve_for", "gpus"], "nothing to solve for: give --hours, --budget or both"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(arguments, said):
    done = plan_run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "pydantic" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--all"], ["--all", "--markdown"], ["--json"], ["--hours", "6"],
     ["--config", "sample"], ["--cluster", "8xH100", "--tokens", "900000000"]],
    ids=" ".join,
)  # fmt: skip
def test_an_unknown_model_cannot_be_planned(arguments):
    done = plan_run("--model", "/nope/dir", *arguments)
    assert done.returncode == 2
    assert "model: '/nope/dir' is not known here" in done.stdout + done.stderr
    assert "fits." not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_hub_name_is_planned_by_the_config_that_was_downloaded(tmp_path, monkeypatch):
    # the layout of Hugging Face's own cache
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    config = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    config |= {"model_type": "llama", "tie_word_embeddings": True}
    (snapshot / "config.json").write_text(json.dumps(config))
    wanted = ("--model", "some/model", "--cluster", "8xH100", "--json")
    assert plan_run(*wanted).returncode == 2
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    done = plan_run(*wanted)
    known = plan_run("--model", "meta-llama/Llama-3.2-1B", "--cluster", "8xH100", "--json")
    assert done.returncode == known.returncode == 0
    assert figures(done) == figures(known)


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    done = plan_run("--model", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/config.json: no JSON" in done.stderr


def figures(done):
    keys = ("tokens", "hours", "cost", "memory_gb", "cluster", "fits", "passes")
    content = json.loads(done.stdout)
    return {key: content[key] for key in keys}


def test_any_listed_alternative_is_written_and_plans_to_the_same_figures(tmp_path):
    corpus = ("--tokens", 900_000_000, "--cluster", "8xH100")
    listed = plan_run(*corpus, "--json")
    choices = json.loads(listed.stdout)["alternatives"]
    assert len(choices) >= 4
    for number, choice in enumerate(choices, 1):
        out = tmp_path / f"taken_{number}.yaml"
        taken = plan_run(*corpus, "--take", number, "--out", out, "--json")
        assert taken.returncode == (0 if choice["fits"] else 1), taken.stderr
        assert f"recipe written to {out}" in taken.stderr
        again = plan_run("--config", out, "--tokens", 900_000_000, "--json")
        assert figures(again) == figures(taken)
        assert figures(again)["hours"] == choice["hours"]
        assert figures(again)["tokens"] == choice["tokens"]
        assert load_recipe(out).description.startswith(f"cpt_config_fast: {choice['what']}")


def test_a_number_of_the_solvers_list_is_of_that_list(tmp_path):
    wanted = ("--cluster", "4xH100", "--hours", 24, "--tokens", 2_000_000_000)
    refused = plan_run(*wanted)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("  2. ")]
    out = tmp_path / "second.yaml"
    plan_run(*wanted, "--take", 2, "--out", out)
    assert line.split(", on ")[0].removeprefix("  2. ") in load_recipe(out).description
    assert load_recipe(out).budget.hours == 24


def test_what_fits_is_written_as_it_was_planned(tmp_path):
    out = tmp_path / "small.yaml"
    wanted = ("--model", "meta-llama/Llama-3.2-1B", "--cluster", "8xH100")
    done = plan_run(*wanted, "--out", out, "--json")
    assert done.returncode == 0
    assert figures(plan_run("--config", out, "--json")) == figures(done)
    recipe = load_recipe(out)
    assert (recipe.cluster.gpus, recipe.cluster.gpu, recipe.claim) == (8, "H100", None)
    assert recipe.global_batch_size == 128


def test_what_does_not_fit_is_not_written_and_that_is_said(tmp_path):
    out = tmp_path / "large.yaml"
    done = plan_run("--out", out)
    assert done.returncode == 1
    assert f"{out} not written: the recipe does not fit" in done.stderr
    assert not out.exists()


def test_what_is_kept_is_in_all_alternatives():
    def words(*options):
        content = json.loads(plan_run("--cluster", "4xB200", "--json", *options).stdout)
        return " | ".join(choice["what"] for choice in content["alternatives"])

    assert "Llama-3.1-8B" in words()
    assert "LoRA" in words()
    assert "Llama" not in words("--keep_model")
    assert "LoRA" in words("--keep_model")
    assert "LoRA" not in words("--keep_method")


def test_a_manifest_without_tokens_says_so(tmp_path):
    manifest = tmp_path / "corpus_manifest.json"
    manifest.write_text(json.dumps({"tokens": 0}))
    done = plan_run("--manifest", manifest)
    assert done.returncode == 2
    assert "'tokens' must be a whole number above 0" in done.stderr
