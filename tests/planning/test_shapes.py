import json

import pytest

from fastcpt.planning.shapes import KNOWN, known_name, shape_from_config, shape_of
from fastcpt.recipe import Lora, load_recipe


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
        ("mistralai/Mistral-7B-v0.3", None),
    ],
)
def test_names_are_recognised(name, known):
    assert known_name(name) == known


def test_the_shape_of_a_folder_is_its_config(tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
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
        shape_from_config({"hidden_size": 64}, "model.config")
