import json

import pytest

from fastcpt.planning.models import KNOWN, known_name, shape_of
from fastcpt.recipe import load_recipe
from fastcpt.recipe_sections import Lora
from fastcpt.shapes import shape_from_config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # what transformers counts for each
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_known_models_have_their_published_sizes(name, parameters):
    assert KNOWN[name].parameters == parameters


def test_the_embedding_look_up_is_no_matrix_product():
    eight = KNOWN["Llama-3.1-8B"]
    assert eight.matrix_parameters == 8_030_261_248 - 128_256 * 4096 - 65 * 4096


def test_lora_of_rank_64_on_the_attention_of_8b():
    # q and o: 64 (4096 + 4096), k and v: 64 (4096 + 1024), 32 blocks
    assert KNOWN["Llama-3.1-8B"].lora_parameters(Lora()) == 32 * 64 * 2 * (8192 + 5120)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "Llama-3.1-70B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.1-70B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3.1-8B"),
        ("/models/llama-3.2-1b/", "Llama-3.2-1B"),
        ("output/cpt_stage1_fast/final", None),
        ("mistralai/Mistral-7B-v0.3", "Mistral-7B-v0.3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("microsoft/phi-4-reasoning", None),
        ("Qwen/Qwen3-32B-FP8", None),
        ("nvidia/Llama-3.1-Minitron-4B-Width-Base", None),
    ],
)
def test_names_are_recognised(name, known):
    assert known_name(name) == known


def test_the_shape_of_a_folder_is_its_config(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("cpt_config_fast", {"model.name_or_path": str(tmp_path)})
    shape = shape_of(recipe)
    # q, k, v, o: 4 x 64 x 64, MLP: 3 x 64 x 128; tied head 100 x 64; norms 5 x 64
    assert shape.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128) + 6400 + 320


def test_a_vocabulary_still_to_be_trained_is_the_recipes():
    assert shape_of(load_recipe("sample")).vocab_size == 2048


def test_a_config_without_a_dimension_names_it():
    with pytest.raises(ValueError, match=r"model.config: no 'intermediate_size'"):
        shape_from_config({"model_type": "llama", "hidden_size": 64}, "model.config")


def test_a_family_that_is_not_known_is_not_taken_for_a_llama():
    config = {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 128}
    with pytest.raises(
        ValueError, match=r"x/config.json: model_type is 'gpt_neox'; known here are"
    ):
        shape_from_config(config, "x/config.json")
    with pytest.raises(ValueError, match="no 'model_type'; known here are llama, mistral"):
        shape_from_config({"hidden_size": 64}, "x/config.json")


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # the totals of the models' own pages; a token's without the look-up where these give it so
        ("gpt-oss-20b", 20.91e9, 3.61e9 + 201_088 * 2880),
        ("gpt-oss-120b", 116.83e9, 5.13e9 + 201_088 * 2880),
        ("Mixtral-8x7B", 46.7e9, 12.9e9),
        ("Qwen3-30B-A3B", 30.5e9, 3.3e9),
        ("Qwen2.5-7B", 7.62e9, 7.62e9),
        ("Apertus-8B", 8.05e9, 8.05e9),
        ("gemma-3-1b", 1.0e9, 1.0e9),
    ],
)
def test_experts_count_whole_for_memory_and_by_the_token_for_work(name, total, active):
    shape = KNOWN[name]
    assert shape.parameters == pytest.approx(total, rel=3e-3)
    assert shape.active_parameters == pytest.approx(active, rel=2e-2)
    # a token is multiplied with its own experts, and with the output layer
    assert shape.matrix_parameters == pytest.approx(active, rel=0.16)
    assert shape.matrix_parameters <= shape.active_parameters


def test_layers_with_and_without_experts_are_refused():
    config = {**KNOWN["Qwen3-30B-A3B"].config, "mlp_only_layers": [0]}
    with pytest.raises(ValueError, match="only some layers have experts"):
        shape_from_config(config, "config.json")
