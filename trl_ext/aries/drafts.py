"""
Drafts: the first request of a chain is its prompt. Here prompts become token ids and requests get their seeds.
"""

import hashlib

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .records import Prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    Token ids of a prompt, rendered as TRL renders it for training. A rendered template already holds its special tokens,
    so they are not added twice.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


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
