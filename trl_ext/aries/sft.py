"""
SFT rows: direct and refinement targets, `−[log π(y_w|x) + log π(y_w|x, y_l, z)]` (https://huggingface.co/papers/2502.05605)
as rows of a TRL prompt-completion dataset.
"""

from typing import Any

from jinja2 import Template

from ..recipe import RecipeError
from .prompts import prompt_problem
from .refinements import refinement_prompt


def sft_row(row: dict[str, Any], template: Template) -> dict[str, Any]:
    """A row to answer directly, or, where it has a `draft`, to refine it under the refinement template."""
    draft = row.get("draft")
    prompt = row["prompt"] if draft is None else refinement_prompt(row["prompt"], [draft], template)
    return {"prompt": prompt, "completion": row["completion"]}


def check_sft_rows(rows: list[dict[str, Any]], dataset: str) -> None:
    """
    Raises:
        [`RecipeError`]: names the first row that cannot be trained on.
    """
    for number, row in enumerate(rows, start=1):
        problem = prompt_problem(row)
        if problem is None and not row.get("completion"):
            problem = f"no `completion`; its columns are {sorted(row)}."
        if problem is None and type(row["completion"]) is not type(row["prompt"]):
            problem = "`completion` must be of the prompt's kind: text for text, a list of messages for messages."
        if problem is None and not isinstance(row.get("draft"), str | None):
            problem = "`draft` must be text, or null for a row to answer directly."
        if problem:
            raise RecipeError(f"`sft.dataset`: {dataset}, row {number}: {problem}")
