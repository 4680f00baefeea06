"""
Drafts: the first request of a chain is its prompt. Here prompts become token ids and requests get their seeds.
"""

import hashlib

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..recipe import RecipeError
from ..recipe_values import show
from .records import Prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    Token ids of a prompt, rendered as TRL renders it for training. A rendered template already holds its special tokens,
    so they are not added twice.

    Raises:
        [`RecipeError`]: the chat template does not take the messages.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    except (TemplateError, TypeError) as error:  # what a template raises, and what it runs into
        raise RecipeError(
            f"the tokenizer's chat template does not take the messages {show(prompt)}: {error}. Their roles or contents are others "
            "than it knows."
        ) from error


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those the model's generation config lists."""
    ids = {tokenizer.eos_token_id}
    if generation_config is not None:
        listed = generation_config.eos_token_id
        ids.update(listed if isinstance(listed, list) else [listed])
    return sorted(ids - {None})


def request_seed(*parts: object) -> int:
    """A 31-bit seed from (run seed, round, prompt, turn): the same request gets the same seed after any restart."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
