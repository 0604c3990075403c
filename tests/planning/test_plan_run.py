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
    assert done.stdout.splitlines()[-1].startswith("38 of 38 rows within 15% of the rate")


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
        (["--config", "cpt_config_fats"], "did you mean 'cpt_config_fast'"),
        (["--config", "sample", "--hours", "2"], "name a cluster"),
        (["--manifest", "/nowhere.json"], "No such file"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(arguments, said):
    done = plan_run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
