"""
Prompts: a dataset in, the fresh prompts of one round out, each with an id that leads back to its row.
"""

import os
import random
from pathlib import Path
from typing import Any

from ..recipe import RecipeError
from .records import read_jsonl


FILE_LOADERS = {".json": "json", ".parquet": "parquet"}


def load_rows(dataset: str, split: str, where: str) -> list[dict[str, Any]]:
    """
    Rows of a local file, a local directory or a Hub dataset.

    Args:
        dataset (`str`), split (`str`):
            As in a recipe's `prompts` section.
        where (`str`):
            The recipe key, for error messages.

    Raises:
        [`RecipeError`]: nothing there, or no rows.
    """
    path = Path(dataset)
    if path.suffix in (".jsonl", *FILE_LOADERS) and not os.path.isfile(path):
        raise RecipeError(f"`{where}`: no file {path} (looked in {Path.cwd()}). Check the path.")
    if path.suffix == ".jsonl":
        try:
            rows = read_jsonl(path, to_write=True)
        except OSError as error:
            raise RecipeError(f"`{where}`: cannot read {path}: {error.strerror}. Check the file.") from error
    else:
        import datasets

        if path.suffix in FILE_LOADERS:
            source = {"path": FILE_LOADERS[path.suffix], "data_files": str(path), "split": "train"}
        else:
            source = {"path": dataset, "split": split}
        try:
            loaded = datasets.load_dataset(**source)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise RecipeError(
                f"`{where}`: cannot load {dataset!r}, split {split!r}: {error}{cause}. Name a .jsonl, .json or .parquet "
                "file, a directory of them, or a dataset id on the Hub."
            ) from error
        rows = loaded.to_list()
    if not rows:
        raise RecipeError(f"`{where}`: {dataset} has no rows.")
    return rows


def load_prompts(dataset: str, split: str, where: str) -> list[dict[str, Any]]:
    """
    Rows with a usable `prompt`, in the dataset's order, each with a `prompt_id` of its own (a column of this name moves to
    `dataset_prompt_id`).

    Raises:
        [`RecipeError`]: a row without `prompt`, with an empty one, with messages that do not end with the user's, or text
        among messages.
    """
    rows = load_rows(dataset, split, where)
    for number, row in enumerate(rows, start=1):
        problem = prompt_problem(row)
        if problem:
            raise RecipeError(f"`{where}`: {dataset}, row {number}: {problem}")
        if type(row["prompt"]) is not type(rows[0]["prompt"]):
            raise RecipeError(
                f"`{where}`: {dataset}, row {number}: text and messages are mixed. Make all prompts one kind."
            )
    prompts = []
    for number, row in enumerate(rows, start=1):
        columns = {"dataset_prompt_id" if key == "prompt_id" else key: value for key, value in row.items()}
        prompts.append({"prompt_id": f"{Path(dataset).stem}-{number:07d}", **columns})
    return prompts


def prompt_problem(row: dict[str, Any]) -> str | None:
    """What makes a row unusable as a prompt, or `None`."""
    if "prompt" not in row:
        return f"no column `prompt`; its columns are {sorted(row)}. Rename the column that holds the question."
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is empty."
    if not prompt or not is_messages(prompt):
        return "`prompt` must be text or a non-empty list of messages with `role` and `content`."
    if prompt[-1]["role"] != "user":
        return f"the messages must end with the user's, these end with the {prompt[-1]['role']}'s."
    if not isinstance(prompt[-1]["content"], str) or not prompt[-1]["content"].strip():
        return "the last user message must be non-empty text."
    return None


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, in the form that chat templates take: content is text, parts, or nothing."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and "content" in message
        and isinstance(message["content"], str | list | None)
        for message in value
    )


def prompts_per_round(rows: int, per_round: int | None, rounds: int) -> int:
    """
    Size of a round.

    Raises:
        [`RecipeError`]: the dataset is too small for fresh prompts in every round.
    """
    size = rows // rounds if per_round is None else per_round
    if size == 0 or size * rounds > rows:
        raise RecipeError(
            f"`prompts.per_round`: {rounds} rounds of {max(size, 1)} fresh prompts need {max(size, 1) * rounds} rows, and "
            f"the dataset has {rows}. Lower `prompts.per_round` or `rounds`, or add prompts."
        )
    return size


def select_prompts(rows: list[dict[str, Any]], round_number: int, size: int, seed: int) -> list[dict[str, Any]]:
    """The prompts of a round (from 1): a slice of one seeded shuffle, so that no round sees another's."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order[(round_number - 1) * size : round_number * size]]
