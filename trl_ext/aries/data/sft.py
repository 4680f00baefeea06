"""
SFT rows: direct and refinement targets, `−[log π(y_w|x) + log π(y_w|x, y_l, z)]` (https://huggingface.co/papers/2502.05605)
as rows of a TRL prompt-completion dataset.
"""

from collections import Counter
from typing import Any

from jinja2 import Template

from ...recipe import RecipeError
from ...rows.formats import read_text
from .prompts import in_trl_form, is_messages, prompt_problem
from .templates import refinement_prompt


def sft_row(row: dict[str, Any], template: Template) -> dict[str, Any]:
    """The row that is trained on: to answer directly, or, if there is a `draft`, to refine it under the refinement template."""
    draft = row.get("draft")
    prompt = row["prompt"] if draft is None else refinement_prompt(row["prompt"], [draft], template)
    return {"prompt": prompt, "completion": row["completion"]}


def usable_sft_rows(rows: list[dict[str, Any]], dataset: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """
    The rows that can be trained on, in TRL's form, and the number of others by reason. `rows.completions` judges what depends on the
    tokenizer.

    Raises:
        [`RecipeError`]: a row does not have the form of an SFT row; the message names the first.
    """
    usable, dropped = [], Counter()
    for number, row in enumerate(rows, start=1):
        row = in_trl_form(row)
        if "completion" in row:
            row["completion"] = read_text(row["completion"], [])
        problem = prompt_problem(row) or target_problem(row)
        if problem:
            raise RecipeError(f"`sft.dataset`: {dataset}, row {number}: {problem}")
        if is_empty(row["completion"]):
            dropped["empty_completion"] += 1
        else:
            usable.append(row)
    return usable, dict(dropped)


def target_problem(row: dict[str, Any]) -> str | None:
    """What makes `completion` or `draft` unusable, or `None`. An empty completion is left out later, and counted."""
    completion = row.get("completion")
    if "completion" not in row:
        return f"no column `completion`; its columns are {sorted(row)}. Rename the column that holds the answer."
    if completion is not None and type(completion) is not type(row["prompt"]):
        return "`completion` must be of the prompt's kind: text for text, a list of messages for messages."
    if isinstance(completion, list) and not is_messages(completion):
        return "`completion` must be a list of messages with `role` and `content`."
    if not isinstance(row.get("draft"), str | None):
        return "`draft` must be text, or null for a row to answer directly."
    return None


def is_empty(completion: str | list[dict[str, Any]] | None) -> bool:
    """Whether a completion has nothing to learn: no text in any of its messages."""
    texts = [completion] if isinstance(completion, str) else [message["content"] for message in completion or []]
    return not any(text.strip() if isinstance(text, str) else text for text in texts)
