"""The gate passes a perplexity strictly below the threshold, and nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcpt.gate import GateError, decide, words


def evaluation(value, base=400.0):
    return {
        "validation_set": "random",
        "model": {"perplexity": value},
        "base": {"perplexity": base},
    }


@pytest.mark.parametrize(
    ("value", "decision"), [(17.999, "pass"), (18.0, "miss"), (18, "miss"), (250.0, "miss")]
)
def test_strictly_below_the_threshold_passes(value, decision):
    assert decide(evaluation(value), 18.0, "random") == {
        "decision": decision,
        "passed": decision == "pass",
        "value": value,
        "base_value": 400.0,
        "threshold": 18.0,
        "validation_set": "random",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "12.0", True, 0.5, -3.0])
def test_what_is_no_perplexity_never_passes(value):
    with pytest.raises(GateError, match="no usable perplexity"):
        decide(evaluation(value), 18.0, "random")


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"validation_set": "random"},
        {"validation_set": "random", "model": {}},
        {"validation_set": "random", "model": 12.0},
        {"random": None, "validation_set": "newest", "model": {"perplexity": 2.0}},
        {"random": 3.0},
    ],
)
def test_a_missing_figure_never_passes(broken):
    with pytest.raises(ValueError, match="random validation set"):
        decide(broken, 18.0, "random")


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1.0, 0.0])
def test_a_threshold_that_lets_everything_or_nothing_pass_is_refused(threshold):
    with pytest.raises(GateError, match="perplexity_threshold"):
        decide(evaluation(2.0), threshold, "random")


def test_the_recipes_validation_set_counts():
    figures = {
        "validation_set": "random",
        "random": {"model": {"perplexity": 10.0}, "base": {"perplexity": 30.0}},
        "newest": {"model": {"perplexity": 20.0}},
    }
    assert decide(figures, 18.0, "random")["passed"]
    newest = decide(figures, 18.0, "newest")
    assert not newest["passed"]
    assert newest["base_value"] is None


def test_a_base_model_that_passes_too_is_said():
    gate = decide(evaluation(8.9, base=9.6), 18.0, "random")
    assert words(gate) == (
        "8.90, base model 9.60; below the gate's 18 (random validation set). The base model passes "
        "this gate too (9.60, below 18): passing it does not show that training helped"
    )
    assert "too" not in words(decide(evaluation(8.9, base=18.0), 18.0, "random"))
    unknown = words(decide({"random": {"model": {"perplexity": 20.0}}}, 18.0, "random"))
    assert unknown == "20.00; not below the gate's 18 (random validation set)"


@given(
    value=st.floats(allow_nan=True, allow_infinity=True),
    threshold=st.floats(min_value=1.0, max_value=1e5, exclude_min=True),
)
def test_a_pass_means_a_real_perplexity_below_the_threshold(value, threshold):
    try:
        passed = decide(evaluation(value), threshold, "random")["passed"]
    except GateError:
        assert not (math.isfinite(value) and value >= 1)
    else:
        assert passed == (1 <= value < threshold)
