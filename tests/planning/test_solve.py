import pytest

from fastcpt.planning.jobs import changed
from fastcpt.planning.plan import plan
from fastcpt.planning.result import PlanRefused
from fastcpt.planning.solve import fewest_gpus, most_tokens
from fastcpt.recipe import load_recipe

EIGHT = {"model.name_or_path": "meta-llama/Llama-3.1-8B"}


@pytest.fixture
def recipe():
    return changed(load_recipe("cpt_config_fast"), {**EIGHT, "budget.hours": 6.0})


def test_the_most_tokens_fit_and_a_step_more_does_not(recipe):
    solved, found = most_tokens(recipe, cluster="4xB200")
    assert found.fits
    steps = solved.training.max_steps
    assert found.tokens == steps * 128 * 3072
    assert solved.global_batch_size == recipe.global_batch_size
    one_more = changed(solved, {"training.max_steps": steps + 1})
    assert not plan(one_more, cluster="4xB200").fits


def test_the_written_recipe_loads_and_plans_the_same(recipe, tmp_path):
    solved, found = most_tokens(recipe, cluster="8xH100")
    path = tmp_path / "solved.yaml"
    path.write_text(solved.to_yaml())
    again = load_recipe(path)
    assert again == solved
    assert (again.cluster.gpus, again.cluster.gpu) == (8, "H100")
    assert plan(again).hours == found.hours


def test_money_bounds_too(recipe):
    _, rich = most_tokens(changed(recipe, {"budget.money": 1000.0}), cluster="4xB200")
    poor, found = most_tokens(changed(recipe, {"budget.money": 60.0}), cluster="4xB200")
    assert found.cost.high <= 60
    assert found.tokens < rich.tokens
    assert poor.training.warmup_steps < poor.training.max_steps


def test_the_fewest_gpus_keep_the_tokens(recipe):
    whole = changed(recipe, {"budget.money": None, "budget.hours": 24.0})
    solved, found = fewest_gpus(whole, cluster="1xH100")
    assert found.fits
    assert found.tokens == 12_000 * 128 * 3072
    assert solved.global_batch_size == 128
    fewer = solved.cluster.gpus // 2
    hurried = plan(
        changed(solved, {"training.gradient_checkpointing": "auto"}), cluster=f"{fewer}xH100"
    )
    assert not hurried.fits


def test_what_cannot_be_is_refused_with_what_can(recipe):
    model = {"model.name_or_path": "meta-llama/Llama-3.1-70B"}
    seventy = changed(recipe, {**model, "training.optimizer_states": "float32"})
    with pytest.raises(
        PlanRefused, match=r"What would fit, best first:\n  1\. Llama-3\.1-8B in place"
    ):
        most_tokens(seventy, cluster="4xB200")
    with pytest.raises(PlanRefused, match="does not fit"):
        fewest_gpus(changed(seventy, {"budget.hours": 0.5}), cluster="4xB200")


def test_something_must_bound_it(recipe):
    free = changed(recipe, {"budget.hours": None, "budget.money": None})
    with pytest.raises(ValueError, match="give hours"):
        most_tokens(free, cluster="4xB200")


@pytest.mark.parametrize("hours", [24.0, 1e9])
def test_hours_without_end_are_bounded_by_the_passes(recipe, hours):
    free = changed(recipe, {"budget.hours": hours, "budget.money": None})
    solved, found = most_tokens(free, 100_000_000, "8xH100")
    # 393,216 tokens per step: 4 x 100 M are 1,017 steps and a bit
    assert solved.training.max_steps == 1017
    assert found.passes == pytest.approx(4.0, abs=0.005)
    assert "to train longer, more tokens are needed, not more steps" in found.text()


def test_a_corpus_below_a_step_is_refused(recipe):
    with pytest.raises(PlanRefused, match=r"more tokens are needed, not more steps"):
        most_tokens(recipe, 50_000, "8xH100")
