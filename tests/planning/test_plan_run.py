"""The command as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "include" / "scripts" / "plan_run.py"


def plan_run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


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
    assert plan_run("--config", out).returncode == 0


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
