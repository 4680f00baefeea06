"""
Drafts: the first request of a chain is its prompt. Here prompts become token ids and requests get their seeds.
"""

import hashlib

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...recipe import RecipeError
from ...recipe_values import show
from ..data.records import Prompt, as_completion


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    Token ids of a prompt, rendered as TRL renders it for training. A rendered template already holds its special tokens,
    so they are not added twice.

    Raises:
        [`RecipeError`]: the chat template does not accept the messages.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    except (TemplateError, TypeError) as error:  # what a template raises, and what it runs into
        raise RecipeError(
            f"the tokenizer's chat template does not accept the messages {show(prompt)}: {error}. Change their roles or "
            "contents."
        ) from error


def render_row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> str:
    """A training row, prompt and answer, as text with special tokens. Plain text ends in the EOS token that TRL puts there."""
    if isinstance(prompt, str):
        return prompt + text + tokenizer.eos_token
    return tokenizer.apply_chat_template([*prompt, *as_completion(prompt, text)], tokenize=False)


def full_text_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a chat template does not give a thought back as it was generated, so that `pairs.learn: full_text` would teach something else."""
    prompt = [{"role": "user", "content": "A question."}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = "<think>\nA thought.\n</think>\n\nAn answer."
    if start.rstrip().endswith("<think>"):  # the template begins the thought, and the model goes on
        text = text.removeprefix("<think>\n")
    row = render_row(tokenizer, prompt, text)
    if row.startswith(start + text):
        return None
    found = row.removeprefix(start) if row.startswith(start) else row
    return f"the chat template turns {show(text)} into {show(found)}, so the thought would not be learned as it is generated"


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
