"""A plan's results for users, on the published recipes and on changed ones."""

import json

import pytest

from fastcpt.planning.history import record_transfer
from fastcpt.planning.jobs import changed
from fastcpt.planning.plan import estimated_tokens, plan, require_fit
from fastcpt.planning.result import CannotRun, PlanRefused
from fastcpt.recipe import load_recipe

SMALL = {
    "model.name_or_path": "meta-llama/Llama-3.2-1B",
    "budget.hours": None,
    "budget.money": None,
}


def test_the_published_hybrid_cannot_be(hybrid):
    found = plan(hybrid, cluster="4xB200")
    assert found.tokens == 12_000 * 128 * 3072
    assert found.flops == pytest.approx(2.0e21, rel=0.02)
    assert found.passes == pytest.approx(2.36, abs=0.01)
    # 31 h at four chips' FP8 peak, of six hours
    assert found.peak_hours == pytest.approx(31, abs=0.5)
    assert found.peak_hours > 5 * found.budget_hours
    # 282 GB of states alone, of 192
    assert found.memory_gb["total"] > 282 > found.available_gb
    verdicts = [found.fits_memory, found.fits_time, found.fits_money, found.fits]
    assert not any(verdicts)
    # the best published rate of a 70B needs about 73 h
    assert 65 < found.hours.low < 90


def test_its_message_says_why_and_what_would(hybrid):
    message = plan(hybrid, cluster="4xB200").message()
    first, *rest = message.splitlines()
    assert first == "'cpt_config_fast' (Llama-3.1-70B, full, FP8) on 4xB200 does not fit:"
    assert rest[0].startswith("  - memory: 308 GB per GPU of 186 (optimizer 212, weights 35")
    assert rest[0].endswith("; training.optimizer_states: bfloat16 would fit")
    assert "5.2 times the budget" in message
    assert "What would fit, best first:" in message
    with pytest.raises(PlanRefused, match="does not fit"):
        require_fit(plan(hybrid, cluster="4xB200"))


def test_with_states_in_8_bits_it_fits_the_memory_and_says_what_its_hours_give():
    found = plan(load_recipe("cpt_config_fast"), cluster="4xB200")
    assert found.fits_memory
    states = sum(found.memory_gb[part] for part in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx(70.55 * (6 + 8 / 256) / 4, abs=0.1)  # 106.4
    overhead = sum(found.hours_parts.values()) - found.hours_parts["training"]
    low = found.tokens_per_s.low * 3600 * (6 - overhead) / 1e9
    assert f"budget 6 h, which give {low:.2f} to " in found.message()
    assert found.notes == ()
    # of a smaller model float32 would do
    small = plan(load_recipe("cpt_config_fast", SMALL), cluster="4xB200")
    assert "float32 would fit too (training.optimizer_states)" in " ".join(small.notes)


@pytest.mark.parametrize(
    ("cluster", "changes", "setting"),
    [
        ("1xH100", {}, "training.optimizer_states: bfloat16"),
        ("1xH100", {"layers": 39}, "training.optimizer_states: bfloat16 with training.per_device"),
        ("1xH100", {"layers": 46}, "training.optimizer_states: int8"),
        ("2xH200", {"training.gradient_checkpointing": False, "training.per_device_train_batch_size": 8,
                    "training.gradient_accumulation_steps": 4}, "training.gradient_checkpointing: auto"),
        ("2xH100", {"training.per_device_train_batch_size": 32,
                    "training.gradient_accumulation_steps": 1}, "training.per_device_train_batch_size: "),
    ],
)  # fmt: skip
def test_a_refusal_for_memory_names_the_settings_that_would_fit(hybrid, cluster, changes, setting):
    changes = {"model.name_or_path": "meta-llama/Llama-3.1-8B", **changes}
    if "layers" in changes:  # Llamas of 9.6 and 11.1 B
        layers = changes.pop("layers")
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        changes |= {"model.name_or_path": None, "model.config": {**shape, **heads}}
    recipe = changed(hybrid, changes)
    found = plan(recipe, cluster=cluster)
    assert not found.fits_memory
    assert found.memory_setting.startswith(setting)
    assert f"; {found.memory_setting} would fit" in found.message()
    named = dict(words.split(": ") for words in found.memory_setting.split(" with "))
    micro = "training.per_device_train_batch_size"
    if micro in named:
        named[micro] = int(named[micro])
        batch = recipe.global_batch_size // recipe.cluster.gpus
        named["training.gradient_accumulation_steps"] = batch // named[micro]
    assert plan(changed(recipe, named), cluster=cluster).fits_memory


def test_every_alternative_is_a_recipe_that_takes_what_it_says(hybrid):
    found = plan(hybrid, cluster="4xB200")
    assert len(found.alternatives) >= 5
    verdicts = [choice.fits for choice in found.alternatives]
    assert verdicts == sorted(verdicts, reverse=True)  # what fits comes first
    kinds = " | ".join(choice.what for choice in found.alternatives)
    for kind in ("8B", "LoRA", "offload", "GPUs", "fewer tokens"):
        assert kind in kinds
    for choice in found.alternatives:
        gpus = choice.changes.get("cluster.gpus", 4)
        again = plan(changed(hybrid, choice.changes), cluster=f"{gpus}xB200")
        assert again.hours == choice.hours
        assert again.fits == choice.fits
        if choice.fits:
            assert choice.hours.high <= 6
            assert choice.cost.high <= 180


def test_five_hours_on_four_b200_do_what_is_known_of_them(hybrid):
    """1.1-2.4 B tokens of 8B, 0.2-0.45 B of 70B LoRA, from the published rates."""
    eight = plan(changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B"}))
    per_five_hours = [
        rate * 5 * 3600 / 1e9 for rate in (eight.tokens_per_s.low, eight.tokens_per_s.high)
    ]
    assert 0.9 < per_five_hours[0] < per_five_hours[1] < 2.6
    lora = plan(load_recipe("cpt_lora_config"))
    per_five_hours = [
        rate * 5 * 3600 / 1e9 for rate in (lora.tokens_per_s.low, lora.tokens_per_s.high)
    ]
    assert 0.14 < per_five_hours[0] < per_five_hours[1] < 0.5


def test_what_fits_says_so_in_one_line(hybrid):
    found = plan(changed(hybrid, SMALL), cluster="8xH100")
    assert found.fits
    assert found.alternatives == ()
    assert found.message() == "'cpt_config_fast' (Llama-3.2-1B, full, FP8) on 8xH100: fits."
    require_fit(found)


def test_fits_time_is_a_promise_of_the_slow_end(hybrid):
    recipe = changed(hybrid, SMALL)
    hours = plan(recipe, cluster="8xH100").hours
    assert plan(changed(recipe, {"budget.hours": hours.high + 0.01}), cluster="8xH100").fits_time
    between = (hours.low + hours.high) / 2
    assert not plan(changed(recipe, {"budget.hours": between}), cluster="8xH100").fits_time


def test_money_is_hours_times_gpus_times_price(hybrid):
    recipe = changed(hybrid, {**SMALL, "budget.price_per_gpu_hour": 2.0})
    found = plan(recipe, cluster="8xH100")
    assert found.cost.high == pytest.approx(found.hours.high * 8 * 2.0)
    assert found.price_source == "price of the recipe"
    assert sum(found.hours_parts.values()) == pytest.approx(
        (found.hours.low + found.hours.high) / 2
    )


def test_a_chip_without_a_price_costs_something_unknown(hybrid):
    found = plan(changed(hybrid, {**SMALL, "budget.money": 5.0}), cluster="4xGB200")
    assert found.cost is None
    assert found.fits_money
    assert "no price for GB200" in found.notes[0]


def test_recomputation_comes_only_where_memory_needs_it(hybrid):
    eight = changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B"})
    twice = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    eight = changed(eight, {f"training.{key}": value for key, value in twice.items()})
    assert plan(eight, cluster="4xH200").checkpointing == "none"
    assert plan(eight, cluster="4xH100").checkpointing == "mlp of 27/32 layers"
    # the trainer's own choice; the recipe may ask for all or nothing
    whole = changed(eight, {"training.gradient_checkpointing": True})
    assert plan(whole, cluster="4xH100").checkpointing == "full"
    kept = changed(eight, {"training.gradient_checkpointing": False})
    refused = plan(kept, cluster="4xH100")
    assert not refused.fits_memory
    assert refused.best_micro_batch["micro_batch"] in (1, 2, 4)
    assert "\nthat fits       micro-batch" in refused.text()
    assert "micro-batch" in refused.alternatives[0].what
    assert plan(changed(kept, refused.alternatives[0].changes), cluster="4xH100").fits_memory


def test_fp8_where_there_is_none_is_planned_in_bf16(hybrid):
    found = plan(changed(hybrid, SMALL), cluster="8xA100")
    assert not found.fits
    assert found.precision == "bfloat16"
    assert "A100 has no FP8" in found.message()
    assert found.alternatives[0].what == "bf16"
    sections = ("training", "stage2", "sft.training")
    # and the cluster it is for, each training's 128 sequences a step split over it
    assert found.alternatives[0].changes == {
        **{f"{name}.use_fp8": False for name in sections},
        **{f"{name}.per_device_train_batch_size": 2 for name in sections},
        **{f"{name}.gradient_accumulation_steps": 8 for name in sections},
        "cluster.gpus": 8,
        "cluster.gpu": "A100",
    }
    assert found.alternatives[0].fits


def test_a_40_gb_card_is_planned_with_40_gb(hybrid):
    recipe = changed(hybrid, {"training.use_fp8": False, **SMALL})
    named = plan(recipe, cluster="2xA100-40GB")
    assert named.cluster == "2xA100-40GB"
    assert named.available_gb == pytest.approx(0.97 * 42.9)
    gpus = [{"name": "NVIDIA A100-SXM4-40GB", "memory_gb": 42.9}] * 2
    seen = plan(changed(recipe, {"cluster.gpus": 2}), cluster={"gpus": gpus, "memory_gb": 2000.0})
    assert (seen.cluster, seen.memory_gb) == (named.cluster, named.memory_gb)
    eighty = plan(recipe, cluster="2xA100")
    # slower memory, and nobody here measured either
    assert named.tokens_per_s.high < eighty.tokens_per_s.high
    eight = changed(recipe, {"model.name_or_path": "meta-llama/Llama-3.1-8B"})
    assert plan(eight, cluster="2xA100").fits_memory
    assert not plan(eight, cluster="2xA100-40GB").fits_memory


@pytest.mark.parametrize("card", ["H100-PCIe", "H100-NVL"])
def test_cards_in_slots_are_slower_and_less_sure_than_sxm(hybrid, card):
    recipe = changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B"})
    slot, sxm = plan(recipe, cluster=f"8x{card}"), plan(recipe, cluster="8xH100")
    assert slot.peak_hours > 1.15 * sxm.peak_hours
    assert slot.tokens_per_s.low < 0.8 * sxm.tokens_per_s.low
    assert slot.tokens_per_s.high < sxm.tokens_per_s.high
    assert card in slot.rate_source


def test_a_batch_that_cannot_be_split_is_a_problem(hybrid):
    found = plan(changed(hybrid, SMALL), cluster="6xH100")
    assert not found.fits
    assert "128 sequences cannot be split over 6 GPUs" in found.message()


def test_a_time_budget_of_the_trainer_bounds_hours_and_tokens(hybrid):
    free = plan(changed(hybrid, SMALL), cluster="8xH100")
    bound = plan(changed(hybrid, {**SMALL, "training.time_budget_hours": 1.0}), cluster="8xH100")
    # start, checkpoints and evaluation are inside the hour too
    assert bound.hours.high == pytest.approx(1.0)
    assert bound.hours_parts["training"] < 0.95
    assert bound.tokens < free.tokens
    assert "time_budget_hours" in bound.notes[0]


def test_disk_there_holds_one_checkpoint_more_than_are_kept(hybrid):
    found = plan(changed(hybrid, SMALL), cluster="8xH100")
    # two kept, one being written, 12 B a parameter; base, trained and published model, 2 B each;
    # 2 B tokens at 1.1 B in the shards and 4 B as the trainer reads them; stage 2's checkpoints and
    # model too, since a missed gate starts it
    stage2 = (3 * 12 + 2) * 1.2358
    assert found.stage2_disk_gb == pytest.approx(stage2, rel=1e-3)
    assert found.checkpoint_disk_gb == pytest.approx(
        (3 * 12 + 6) * 1.2358 + stage2 + 5.1 * 2, rel=1e-3
    )
    tuned = plan(changed(hybrid, {**SMALL, "sft.instructions": "i.jsonl"}), cluster="8xH100")
    more = tuned.checkpoint_disk_gb - found.checkpoint_disk_gb
    assert more == pytest.approx((3 * 12 + 2) * 1.2358, rel=1e-3)
    facts = {"gpus": [{"name": "NVIDIA H100", "memory_gb": 85.5}] * 8, "memory_gb": 2000.0}
    recipe = changed(hybrid, {**SMALL, "cluster.gpus": 8})
    assert plan(recipe, cluster={**facts, "disk_free_gb": 110.0}).fits_disk
    full = plan(recipe, cluster={**facts, "disk_free_gb": 100.0})
    assert not full.fits
    assert (
        "disk: shards, checkpoints and models take 109 GB there (47 of them stage 2's"
        in full.message()
    )


def test_fine_tuning_is_in_the_hours_where_there_are_instructions(hybrid):
    recipe = changed(hybrid, SMALL)
    alone = plan(recipe, cluster="8xH100")
    with_sft = plan(changed(recipe, {"sft.instructions": "i.jsonl"}), cluster="8xH100")
    parts = with_sft.hours_parts
    assert set(parts) - set(alone.hours_parts) == {"fine-tuning", "its evaluation"}
    # 500 steps of 128 rows of 3072 tokens at the training's rate, and a start-up
    rate = (with_sft.tokens_per_s.low + with_sft.tokens_per_s.high) / 2
    steps = 500 * 128 * 3072 / rate / 3600
    assert parts["fine-tuning"] == pytest.approx(steps + parts["start-up"])
    added = parts["fine-tuning"] + parts["its evaluation"]
    assert with_sft.hours.high == pytest.approx(alone.hours.high + added)
    assert with_sft.cost.high > alone.cost.high


def test_the_evaluation_reads_the_held_out_tokens_in_overlapping_windows(hybrid):
    found = plan(changed(hybrid, SMALL), 120_000_000, "8xH100")
    rate = (found.tokens_per_s.low + found.tokens_per_s.high) / 2
    # 0.5 % at random, but 500,000 at most, and 0.25 % of the newest, twice over, and 100 questions of
    # each kind in 4,200 tokens, by model and base, a third of a step each; two minutes to begin and
    # two models of 2.47 GB at 2 GB/s
    read = (500_000 + 300_000) * 2 + 100 * 4_200
    seconds = read * 2 / 3 / rate + 120 + 2 * 2.4716 / 2
    assert found.hours_parts["evaluation"] * 3600 == pytest.approx(seconds, rel=1e-3)


def test_an_alternative_keeps_every_trainings_batch(hybrid):
    found = plan(
        changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B"}), cluster="8xH100"
    )
    first = next(choice for choice in found.alternatives if choice.fits)
    there = changed(hybrid, first.changes)
    assert there.cluster.gpus == 8
    for training in (there.training, there.stage2, there.sft.training):
        a_gpu = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert 8 * a_gpu == hybrid.global_batch_size == 128


def test_offload_is_offered_only_where_memory_asks_for_it(hybrid):
    def offered(model):
        found = plan(
            changed(hybrid, {"model.name_or_path": f"meta-llama/{model}"}), cluster="4xB200"
        )
        assert not found.fits
        return any("offload" in choice.what for choice in found.alternatives)

    assert offered("Llama-3.1-70B")
    assert not offered("Llama-3.1-8B")


def test_transfer_is_the_shards_there_and_the_model_back(hybrid):
    recipe = changed(hybrid, SMALL)
    back = plan(recipe, 1_000_000_000, "8xH100").transfer_gb
    assert back == pytest.approx(1.1 + 2 * 1.2358, rel=1e-3)
    stay = changed(recipe, {"publish.destination": "leave_on_cluster"})
    assert plan(stay, 1_000_000_000, "8xH100").transfer_gb == pytest.approx(1.1)


def test_checkpoints_are_brought_at_the_rate_that_was_measured(hybrid, tmp_path):
    history = tmp_path / "plan_history.jsonl"
    often = {**SMALL, "checkpoints.bring_every_minutes": 10.0}
    alone = plan(changed(hybrid, SMALL), cluster="8xH100", history=history)
    assumed = plan(changed(hybrid, often), cluster="8xH100", history=history)
    size = 12 * 1.2358  # GB: float32 weights and two moments
    assert assumed.checkpoint_gb == pytest.approx(size, rel=1e-3)
    assert assumed.bring_source == "assumed, none was brought from there yet"
    # one more there, while it is brought
    more = assumed.checkpoint_disk_gb - alone.checkpoint_disk_gb
    assert more == pytest.approx(size, rel=1e-3)
    record_transfer(tmp_path, "gpu_cluster", 10**9, 20.0)
    record_transfer(tmp_path, "gpu_cluster", 10**9, 50.0)
    record_transfer(tmp_path, "another", 10**9, 1.0)
    record_transfer(tmp_path, "gpu_cluster", 10**6, 30.0)  # mostly waiting
    with (tmp_path / "transfers.jsonl").open("a") as damaged:
        damaged.write('{"line": "gpu_clus')
    found = plan(changed(hybrid, often), cluster="8xH100", history=history)
    # 20 to 50 MB/s
    assert found.bring_hours.high == pytest.approx(1000 * size / 20 / 3600, rel=1e-3)
    assert found.bring_hours.low == pytest.approx(1000 * size / 50 / 3600, rel=1e-3)
    # the last transfer is in time and money
    assert found.hours.high - alone.hours.high == pytest.approx(found.bring_hours.high)
    price = alone.cost.high / alone.hours.high
    assert found.cost.high == pytest.approx(price * found.hours.high)
    assert found.reserve_hours > found.bring_hours.high
    assert not found.fits
    assert (
        "checkpoints: bringing one (14.8 GB) takes 4.9 to 12.4 min (measured), longer than "
        "checkpoints.bring_every_minutes (10): set it to 13 or more" in found.message()
    )
    seldom = plan(
        changed(hybrid, {**often, "checkpoints.bring_every_minutes": 13.0}),
        cluster="8xH100",
        history=history,
    )
    assert seldom.fits
    assert "every 13 min: fits" in seldom.text()


def test_a_model_that_only_the_cluster_knows_is_not_guessed():
    found = plan(load_recipe("cpt_stage2_deep"))
    assert found.hours is None
    assert not found.fits
    assert (
        "(output/cpt_stage1_fast/final, full, FP8) on 4xB200 cannot run:\n  - model: "
        "'output/cpt_stage1_fast/final' is not known here, so neither are its memory, hours and cost: put "
        "its config.json there on this machine too"
    ) in found.message()
    assert "rate            unknown" in found.text()
    with pytest.raises(CannotRun, match=r"hf download some/model config\.json"):
        require_fit(plan(load_recipe("cpt_config_fast", {"model.name_or_path": "some/model"})))


@pytest.mark.parametrize("name", ["cpt_config_fast", "sample"])
def test_an_unknown_model_fits_nowhere(name):
    found = plan(changed(load_recipe(name), {"model.config": None, "model.name_or_path": "/nope"}))
    assert (found.fits, found.hours, found.memory_gb) == (False, None, None)
    with pytest.raises(CannotRun, match="'/nope' is not known here"):
        require_fit(found)


@pytest.mark.parametrize("name", ["sample", "local"])
def test_on_cpus_nothing_is_promised(name):
    found = plan(load_recipe(name))
    assert found.fits
    assert (found.hours, found.cost, found.memory_gb) == (None, None, None)
    assert "unknown" in found.text()


def test_tokens_are_estimated_from_bytes(hybrid):
    # 4.4 characters per token, then the hybrid's 40 %
    assert estimated_tokens(440_000_000, hybrid) == 40_000_000
    assert estimated_tokens(10**12, hybrid) == 2_000_000_000
    assert estimated_tokens(4_400, load_recipe("local")) == 1000


def test_json_has_the_promised_fields(hybrid):
    content = json.loads(json.dumps(plan(hybrid).to_json()))
    for name in ("tokens", "passes", "flops", "memory_gb", "fits_memory", "tokens_per_s", "hours",
                 "fits_time", "cost", "alternatives", "rate_source", "transfer_hours",
                 "checkpoint_disk_gb", "micro_batch", "checkpointing", "message"):  # fmt: skip
        assert content[name] is not None, name
    assert set(content["hours"]) == {"low", "high"}
    parts = content["memory_gb"]
    assert sum(parts.values()) - parts["total"] == pytest.approx(parts["total"])
    assert {"weights", "gradients", "optimizer", "activations", "logits", "gather_buffers"} < set(
        parts
    )


def test_the_source_of_a_rate_is_named(hybrid):
    eight = changed(hybrid, {"model.name_or_path": "meta-llama/Llama-3.1-8B"})
    measured = plan(eight, cluster="2xH200")
    assert measured.rate_source.startswith("this project's measurements on H200")
    assert measured.tokens_per_s.high / measured.tokens_per_s.low == pytest.approx(1.15 / 0.85)
    assert "30,624 tokens/s per GPU on B200" in plan(eight, cluster="4xB200").rate_source


def test_more_passes_than_allowed_ask_for_more_tokens_not_more_steps(hybrid):
    recipe = changed(hybrid, SMALL)
    found = plan(recipe, 900_000_000, "8xH100")
    assert found.passes == pytest.approx(12_000 * 128 * 3072 / 900e6)  # 5.24
    assert (found.max_passes, found.fits_passes, found.fits) == (4.0, False, False)
    # 12,000 steps are 4.72 B tokens: 1.18 B four times; 0.9 B four times are 9,155.27 steps
    assert (
        "passes: 5.2 over a corpus of 900,000,000 tokens, at most 4 (budget.max_passes): more tokens are "
        "needed, not more steps: 1,179,648,000 for these 12,000 steps; the corpus there is allows 9,155"
    ) in found.message()
    assert "5.2 passes over 900,000,000 (at most 4): DOES NOT FIT" in found.text()
    content = found.to_json()
    assert (content["max_passes"], content["fits_passes"]) == (4.0, False)
    fits = [choice for choice in found.alternatives if choice.fits]
    assert fits
    for choice in fits:
        assert choice.tokens <= 4 * 900_000_000
    assert changed(recipe, fits[0].changes).training.max_steps == 9155
    enough = plan(recipe, 1_179_648_000, "8xH100")
    assert enough.fits
    assert plan(changed(recipe, {"budget.max_passes": 5.3}), 900_000_000, "8xH100").fits


def test_an_empty_corpus_is_said(hybrid):
    with pytest.raises(ValueError, match="a corpus of 0 tokens: there is nothing to train on"):
        plan(hybrid, 0, "8xH100")


def test_the_disk_of_a_70b_holds_stage_2_too(hybrid):
    found = plan(hybrid, cluster="4xB200")
    # (2 kept + 1) x 12 B and the model's 2 B of 70.55 B parameters
    assert found.stage2_disk_gb == pytest.approx(2681, abs=1)
    assert found.checkpoint_disk_gb > 2 * found.stage2_disk_gb
    # each training keeps as many checkpoints as it says itself
    fewer = plan(changed(hybrid, {"stage2.save_total_limit": 1}), cluster="4xB200")
    assert found.checkpoint_disk_gb - fewer.checkpoint_disk_gb == pytest.approx(12 * 70.55, abs=1)
    facts = {"gpus": [{"name": "NVIDIA B200", "memory_gb": 192.0}] * 4, "memory_gb": 2000.0}
    short = plan(hybrid, cluster={**facts, "disk_free_gb": found.checkpoint_disk_gb - 1})
    assert not short.fits_disk
    assert "(2,681 of them stage 2's, where the gate is missed)" in short.message()


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("cpt_config", 4.19),
        ("cpt_config_16gpu", 4.19),
        ("cpt_config_fast", 2.36),
        ("cpt_config_filtered", 4.19),
        ("cpt_config_reduced_steps", 1.05),
        ("cpt_config_short", 2.10),
        ("cpt_lora_config", 2.10),
        ("cpt_stage1_fast", 1.97),
        ("cpt_stage2_deep", 5.90),
    ],
)
def test_the_guides_own_steps_are_within_their_recipes_passes(name, passes):
    found = plan(load_recipe(name))
    assert found.passes == pytest.approx(passes, abs=0.01)
    assert found.fits_passes


def test_the_tiny_recipes_train_on_any_few_documents():
    assert plan(load_recipe("sample"), 1000).fits
    assert plan(load_recipe("local"), 1000).fits
