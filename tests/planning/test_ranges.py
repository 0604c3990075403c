"""A range claims no more than was measured: it names its source and widens with the distance from it."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcpt.planning.costs import tokens_per_second
from fastcpt.planning.hardware import named_hardware
from fastcpt.planning.history import FILE, record_run
from fastcpt.planning.jobs import changed
from fastcpt.planning.measured import measured_rows, published_rows
from fastcpt.planning.models import KNOWN
from fastcpt.planning.plan import plan
from fastcpt.planning.ranges import differing, measured_range, widened
from fastcpt.recipe import load_recipe

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "planning.py"


@pytest.fixture
def eight():
    model = {"model.name_or_path": "meta-llama/Llama-3.1-8B"}
    measured = {"training.per_device_train_batch_size": 4}
    return changed(load_recipe("cpt_config_fast"), model | measured)


def width(found):
    return found.tokens_per_s.high / found.tokens_per_s.low


def test_a_range_says_how_many_gpus_of_which_kind_and_which_model_it_comes_from(eight):
    measured = plan(eight, cluster="2xH200")
    assert measured.rate_source == (
        "this project's measurements on H200 (2 GPUs, Llama-3.1-8B, full, fp8), scaled by its cost "
        "model: -15% to +15%"
    )
    # eight of another chip: 1.1 for one doubling, and a memory 4.8 / 3.35 as fast to the power of 0.2;
    # as logarithms, in squares: exp(hypot(0.0953, 0.0719)) = 1.127
    farther = plan(eight, cluster="8xH100")
    assert farther.rate_source == (
        "this project's measurements on H200 (4 GPUs, Llama-3.1-8B, full, fp8), scaled by its cost "
        "model: -25% to +30%, wider for 8 GPUs, H100"
    )
    assert width(farther) == pytest.approx(1.15 / 0.85 * 1.127**2, rel=1e-3)


def test_one_row_a_micro_batch_on_several_gpus_widens(eight):
    one = changed(eight, {"training.per_device_train_batch_size": 1})
    found = plan(one, cluster="2xH200")
    assert "wider for micro-batch 1" in found.rate_source
    assert width(found) == pytest.approx(1.15 / 0.85 * 1.2**2, rel=1e-3)


def test_more_gpus_another_size_and_another_chip_each_widen(eight):
    there = width(plan(eight, cluster="2xH200"))
    assert there == pytest.approx(1.15 / 0.85)
    more = [width(plan(eight, cluster=f"{count}xH200")) for count in (8, 16, 32)]
    assert there < more[0] < more[1] < more[2]
    seventy = changed(eight, {"model.name_or_path": "meta-llama/Llama-3.1-70B"})
    assert there < width(plan(seventy, cluster="2xH200"))
    bf16 = changed(eight, {"training.use_fp8": False})
    assert there < width(plan(bf16, cluster="2xA100"))


def test_the_best_that_was_shown_bounds_a_chip_that_was_not_measured(eight):
    found = plan(eight, cluster="4xB200")
    assert "at best 30,624 tokens/s per GPU on B200 (Megatron-Bridge, MXFP8, 8 GPUs)" in (
        found.rate_source
    )
    # scaled to 3072 tokens: of 8192's 51.5 GFLOP a token 47.5 are left
    assert found.tokens_per_s.high / 4 == pytest.approx(30_624 * 51.5 / 47.5, rel=2e-3)


def test_cards_below_their_power_are_no_bound_of_the_chip():
    limited = [row for row in published_rows() if "500 W" in row.source]
    assert len(limited) == 2
    assert not any(row.bound for row in limited)


def test_a_last_run_on_few_gpus_says_less_of_many(eight, tmp_path):
    recipe = changed(eight, {"cluster.gpus": 2, "cluster.gpu": "H200"})
    record_run(tmp_path, "run_1", recipe, None, {"tokens_per_s_per_gpu": 16_000.0})
    same, more = (plan(recipe, None, name, tmp_path / FILE) for name in ("2xH200", "8xH200"))
    assert width(same) == pytest.approx(1.07 / 0.93)
    assert "on 2xH200: -7% to +7%" in same.rate_source
    assert width(more) == pytest.approx(1.07 / 0.93 * 1.1**4)
    assert "on 2xH200: -23% to +29%, wider for 8 GPUs" in more.rate_source


OWN = [row for row in measured_rows() if row[2]["what"].startswith("trainer")]


@given(
    st.sampled_from(OWN),
    st.sampled_from(list(KNOWN.values())),
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.sampled_from(["A100", "H100", "H200", "B200", "GB200", "L40S"]),
)
def test_any_distance_widens_and_is_named(row, shape, count, gpu):
    job, there, _ = row
    hardware = named_hardware(f"{count}x{gpu}")
    other = replace(job, shape=shape, ranks=count)
    differences = differing(other, hardware, job, there)
    assert all(factor > 1 for factor in differences.values())
    found, nothing = widened(1000.0, 0.15, differences), widened(1000.0, 0.15, {})
    assert found.low <= nothing.low < 1000 < nothing.high <= found.high
    named = {
        f"{count} GPUs" if count > 1 else "1 GPU": count != there.count,
        gpu: gpu != there.gpu.name,
        f"{hardware.hosts} hosts": hardware.hosts != there.hosts,
    }
    for words, differs in named.items():
        assert (words in differences) == differs
    # not more than all factors together, not less than the largest
    whole, largest = 1.0, 1.0
    for factor in differences.values():
        whole, largest = whole * factor, max(largest, factor)
    factor = found.high / nothing.high
    assert largest <= factor * (1 + 1e-9)
    assert factor <= whole * (1 + 1e-9)


@pytest.mark.parametrize(("job", "hardware", "facts"), OWN, ids=[row[2]["what"] for row in OWN])
def test_what_was_measured_itself_is_within_15_percent(job, hardware, facts):
    likely = tokens_per_second(job, hardware)
    found, source = measured_range(job, hardware, likely, measured_rows())
    assert (found.low, found.high) == pytest.approx((0.85 * likely, 1.15 * likely))
    assert found.low <= facts["rate"] <= found.high
    assert f"on {hardware.gpu.name} ({hardware.count} GPU" in source


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("planning_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_four_fifths_of_the_trainers_rows_left_out_by_group_lie_inside(benchmark):
    found = benchmark.left_out_groups(measured_rows())
    # each of the trainer's 26 rows once by its model's size, once by its number of GPUs
    sizes = [row for row in found if "GPU" not in row.group]
    gpus = [row for row in found if "GPU" in row.group]
    assert (len(sizes), len(gpus)) == (26, 26)
    for rows in (sizes, gpus):
        assert sum(row.inside for row in rows) / len(rows) >= 0.8
    assert sum(row.inside for row in found) > sum(row.inside_earlier for row in found)
