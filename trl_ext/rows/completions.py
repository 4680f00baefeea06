"""
Rows of a prompt and one completion, for SFT; `pairs.py` is the same for pairs.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..recipe_values import RecipeError, show
from .formats import shared_length
from .judge import Findings, Judge, template_options


def judge_completions(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    vocabulary: int | None = None,
    max_length: int | None = None,
) -> tuple[list[dict[str, Any]], Findings]:
    """
    Judge rows with a `prompt` and a `completion`, before and after rendering.

    Args:
        rows (iterable of `dict`):
            The rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that renders them.
        what (`str`):
            What the rows are called in the findings, in the plural.
        vocabulary (`int`, *optional*):
            Number of the model's embeddings.
        max_length (`int`, *optional*):
            Length at which sequences are cut off, in tokens.

    Returns:
        `tuple[list[dict], Findings]`: the usable rows, and the findings.

    Raises:
        [`RecipeError`]: the template fails on a row.
    """
    judge = Judge(tokenizer, Findings(what), vocabulary)
    usable = []
    for number, row in enumerate(rows, start=1):
        if not judge.row(number, row["prompt"], [row["completion"]], row):
            continue
        try:
            prompt, completion = rendered(row, tokenizer)
        except Exception as error:  # the template's own code
            raise RecipeError(
                f"row {number:,} of the {what} cannot be rendered: {type(error).__name__}: {error}. Its `prompt` is "
                f"{show(row['prompt'])}. Change the row, or remove it."
            ) from error
        if judge.row_ids(number, np.array(prompt), [np.array(completion)], max_length):
            usable.append(row)
    return usable, judge.findings


def rendered(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion, as TRL's trainers render them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
    else:
        options = {"tokenize": True, "return_dict": True, **template_options(row)}
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"]
    start = shared_length(ids, whole)
    return ids[:start], whole[start:]
