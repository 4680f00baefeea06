"""Tiny models of any architecture."""

import pytest
import torch
from tests.conftest import TINY
from transformers import AutoConfig, AutoModelForCausalLM


SIZES = {**TINY, "tie_word_embeddings": False}


@pytest.fixture
def make_model_dir(tiny_model_dir, tmp_path):
    """Returns a function that saves a tiny model of an architecture, for the tiny Llama's tokenizer, and returns its path."""

    def make(model_type: str, **options) -> str:
        llama = AutoConfig.from_pretrained(tiny_model_dir)
        tokens = {"pad_token_id": llama.pad_token_id, "eos_token_id": llama.eos_token_id, "bos_token_id": None}
        own = AutoConfig.for_model(model_type)
        sizes = {name: value for name, value in SIZES.items() if hasattr(own, name)}
        config = AutoConfig.for_model(model_type, vocab_size=llama.vocab_size, **tokens, **{**sizes, **options})
        torch.manual_seed(0)
        path = tmp_path / f"tiny-{model_type}"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        return str(path)

    return make
