"""
Prompts: a dataset in, the fresh prompts of one round out, each with an id that leads back to its row.
"""

import random
from pathlib import Path
from typing import Any

from ..data_files import BUILDERS, builder_arguments, is_data_file
from ..recipe import RecipeError
from .config import DatasetConfig
from .records import read_jsonl


def load_rows(entry: DatasetConfig, where: str) -> list[dict[str, Any]]:
    """
    Rows of a local file, a local directory or a Hub dataset.

    Args:
        entry ([`DatasetConfig`]):
            What to load.
        where (`str`):
            The recipe key, for error messages.

    Raises:
        [`RecipeError`]: nothing there, or no rows.
    """
    try:
        is_file = is_data_file(entry.path)
        if is_file and Path(entry.path).suffix == ".jsonl":
            rows = read_jsonl(Path(entry.path).expanduser(), to_write=True)
            if entry.columns is not None:
                rows = [{column: row[column] for column in entry.columns if column in row} for row in rows]
        else:
            rows = load_dataset(entry, is_file).to_list()
    except RecipeError as error:
        raise RecipeError(f"`{where}`: {error}") from error
    except OSError as error:
        raise RecipeError(f"`{where}`: cannot read {entry.path}: {error.strerror}. Check the file.") from error
    if not rows:
        raise RecipeError(f"`{where}`: {entry.path} has no rows.")
    return rows


def load_dataset(entry: DatasetConfig, is_file: bool) -> "datasets.Dataset":  # noqa: F821
    """What `datasets` makes of an entry."""
    import datasets

    if is_file:
        source = builder_arguments(entry.path) | {"split": "train"}
    else:
        source = {key: getattr(entry, key) for key in ("path", "name", "data_dir", "data_files", "split")}
    try:
        loaded = datasets.load_dataset(**source)
        return loaded if entry.columns is None else loaded.select_columns(entry.columns)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise RecipeError(
            f"cannot load {entry.path!r}, split {entry.split!r}: {error}{cause}. Name a file "
            f"({', '.join(BUILDERS)}), a directory of them, or a dataset id on the Hub."
        ) from error


def load_mixture(entries: list[DatasetConfig], where: str) -> list[tuple[DatasetConfig, list[dict[str, Any]]]]:
    """
    The rows of each dataset. Where they have a `fraction`, as many as TRL's `get_dataset` takes: the first of each, in these
    proportions, as many as there can be.
    """
    loaded = [(entry, load_rows(entry, where)) for entry in entries]
    if entries[0].fraction is None:
        return loaded
    whole = sum(entry.fraction for entry in entries)
    total = min(len(rows) * whole / entry.fraction for entry, rows in loaded)
    return [(entry, rows[: round(total * entry.fraction / whole)]) for entry, rows in loaded]


def load_prompts(entries: list[DatasetConfig], where: str) -> list[dict[str, Any]]:
    """
    Rows with a usable `prompt`, in the datasets' order, each with a `prompt_id` of its own (a column of this name moves to
    `dataset_prompt_id`): the dataset's name, and the row's number in the mixture.

    Raises:
        [`RecipeError`]: a row without `prompt`, with an empty one, with messages that do not end with the user's, or text
        among messages.
    """
    prompts: list[dict[str, Any]] = []
    for entry, rows in load_mixture(entries, where):
        for number, row in enumerate(rows, start=1):
            problem = prompt_problem(row)
            if problem:
                raise RecipeError(f"`{where}`: {entry.path}, row {number}: {problem}")
            columns = {"dataset_prompt_id" if key == "prompt_id" else key: value for key, value in row.items()}
            prompts.append({"prompt_id": f"{Path(entry.path).stem}-{len(prompts) + 1:07d}", **columns})
            if type(row["prompt"]) is not type(prompts[0]["prompt"]):
                raise RecipeError(
                    f"`{where}`: {entry.path}, row {number}: text and messages are mixed. Make all prompts one kind."
                )
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
