import pytest

from fastcpt.recipe import load_recipe


@pytest.fixture
def hybrid():
    """The default recipe as published: with float32 optimizer states."""
    return load_recipe("cpt_config_fast", {"training.optimizer_states": "float32"})
