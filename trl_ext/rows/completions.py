"""
Rows of a prompt and one completion: what `pairs.py` is for pairs, for SFT.
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
            What renders them.
        what (`str`):
            The rows, in the plural, for the findings.
        vocabulary (`int`, *optional*):
            Rows of the model's embeddings.
        max_length (`int`, *optional*):
            Where sequences are cut off.

    Returns:
        `tuple[list[dict], Findings]`: the rows that can be used, and what was found.

    Raises:
        [`RecipeError`]: a row that the template fails on.
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
                f"row {number:,} of the {what} cannot be rendered: {type(error).__name__}: {error}. There `prompt` is "
                f"{show(row['prompt'])}. Change the row, or leave it out."
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
