"""Every alternative is a recipe: written, read and planned again it gives the same figures."""

import pytest

from fastcpt.planning.alternatives import numbered, own_recipe
from fastcpt.planning.jobs import changed
from fastcpt.planning.plan import plan
from fastcpt.recipe import load_recipe

RECIPES = (
    "cpt_config",
    "cpt_config_fast",
    "cpt_config_short",
    "cpt_lora_config",
    "cpt_stage1_fast",
)
SEEN = {
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_gb": 85.5}] * 4,
    "memory_gb": 1500.0,
    "disk_free_gb": 9000.0,
}
CLUSTERS = ("4xB200", "8xH100", "3xH100", "8xA100", "1xH200", "16xB200", SEEN)
TOKENS = 900_000_000


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[str(c)[:7] for c in CLUSTERS[:-1]] + ["seen"])
@pytest.mark.parametrize("name", RECIPES)
def test_each_plans_to_the_same_figures(name, cluster, tmp_path):
    recipe = load_recipe(name)
    found = plan(recipe, TOKENS, cluster)
    assert found.alternatives
    for number, choice in enumerate(found.alternatives, 1):
        assert numbered(found, number) == choice
        written = tmp_path / f"taken_{number}.yaml"
        written.write_text(own_recipe(recipe, written.stem, choice.what, choice.changes).to_yaml())
        taken = load_recipe(written)
        # each says which cluster it is for; on the one that was seen it is that one again
        assert f"{taken.cluster.gpus}x{taken.cluster.gpu}" == choice.cluster
        for there in (None, choice.cluster) if isinstance(cluster, str) else (cluster,):
            again = plan(taken, TOKENS, there)
            assert (
                again.tokens,
                again.hours,
                again.cost,
                again.memory_gb["total"],
                again.fits,
            ) == (
                choice.tokens,
                choice.hours,
                choice.cost,
                choice.memory_gb,
                choice.fits,
            ), choice.what
            assert again.cluster == choice.cluster
        assert taken.claim is None


def test_the_message_numbers_all_of_them():
    found = plan(load_recipe("cpt_config_fast"), cluster="4xB200")
    lines = found.message().splitlines()
    assert len(found.alternatives) >= 5
    for number, choice in enumerate(found.alternatives, 1):
        (line,) = [line for line in lines if line.startswith(f"  {number}. ")]
        assert line.startswith(f"  {number}. {choice.what}, on {choice.cluster}: ")
    assert lines[-1] == (
        "To have one as a recipe: the same command with --take NUMBER --out FILE.yaml"
    )


def test_what_is_kept_stays():
    recipe = load_recipe("cpt_config_fast")
    models, methods = [], []
    for keep in ([], ["model"], ["method"], ["model", "method"]):
        found = plan(recipe, cluster="4xB200", keep=keep)
        others = [changed(recipe, choice.changes) for choice in found.alternatives]
        assert others
        models.append({other.model.name_or_path for other in others})
        methods.append({other.lora is not None for other in others})
    seventy = {"meta-llama/Llama-3.1-70B-Instruct"}
    assert [len(names) > 1 for names in models] == [True, False, True, False]
    assert models[1] == models[3] == seventy
    assert methods == [{True, False}, {True, False}, {False}, {False}]


def test_three_gpus_are_told_what_helps():
    recipe = changed(
        load_recipe("cpt_config_fast"), {"model.name_or_path": "meta-llama/Llama-3.2-1B"}
    )
    found = plan(recipe, 2_000_000_000, "3xH100")
    assert (
        "cannot be split over 3 GPUs, whatever the micro-batch: take 2 or 4 GPUs, or steps of 126 "
        in (found.message())
    )
    assert found.alternatives[0].what.startswith("steps of 126 sequences")
    # 126 = 3 GPUs x 42, each training's; on two or four the 128 stay
    three = changed(recipe, found.alternatives[0].changes)
    for training in (three.training, three.stage2, three.sft.training):
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 42
    assert plan(three, 2_000_000_000, "3xH100").fits
    for count in (2, 4):
        assert not plan(recipe, 2_000_000_000, f"{count}xH100").problems


def test_a_micro_batch_that_does_not_divide_is_told_one_that_does():
    changes = {"training.per_device_train_batch_size": 5, "training.gradient_accumulation_steps": 3}
    recipe = changed(load_recipe("cpt_config_fast"), changes)  # 60 sequences, 30 on each of two
    found = plan(recipe, cluster="2xH100")
    assert found.problems == ()
    found = plan(recipe, cluster="4xH100")
    assert found.problems == ()
    found = plan(recipe, cluster="10xH100")  # six each
    assert (
        "60 sequences cannot be split over 10 GPUs with 5 at a time: each has 6; set "
        "training.per_device_train_batch_size to 3 and training.gradient_accumulation_steps to 2"
    ) in found.message()


def test_offload_says_what_it_takes_of_the_hosts_and_is_held_against_what_they_have():
    recipe = load_recipe("cpt_config_fast", {"training.optimizer_states": "float32"})
    offload = {f"{name}.deepspeed": "ds_config_zero3_offload.json"
               for name in ("training", "stage2", "sft.training")}  # fmt: skip
    offloaded = changed(recipe, offload)
    named = plan(offloaded, cluster="4xB200")
    # float32 master weights, two moments and gradients: 16 B of 70.55 B parameters
    assert named.host_memory_gb == pytest.approx(1129, abs=1)
    assert "1,129 GB for the offloaded optimizer, of what such hosts usually have: 2,000 GB" in (
        named.text()
    )
    facts = {"gpus": [{"name": "NVIDIA B200", "memory_gb": 192.0}] * 4}
    small = plan(offloaded, cluster={**facts, "memory_gb": 1000.0})
    assert "host memory: offloading takes 1,129 GB of main memory, the hosts have 1,000" in (
        small.message()
    )
    large = plan(offloaded, cluster={**facts, "memory_gb": 1500.0})
    assert not large.problems
    assert "1,129 GB for the offloaded optimizer, of the hosts' 1,500 GB" in large.text()
    # offered where the hosts have room, and only there
    for memory, offered in ((1000.0, False), (1500.0, True)):
        found = plan(recipe, cluster={**facts, "memory_gb": memory})
        words = [choice.what for choice in found.alternatives if "offload" in choice.what]
        assert bool(words) == offered
        assert all("1,129 GB of host memory" in what for what in words)
