"""
Prompts: a dataset in, the fresh prompts of one round out, each with an id that leads back to its row.
"""

import random
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ...data_files import BUILDERS, is_data_file, source_arguments
from ...recipe import RecipeError
from ...rows.formats import SYSTEM, has_system, is_filled, looks_like_messages, read_text
from ..config import DatasetConfig
from .records import encode, parse_line


Rows = Sequence[dict[str, Any]]  # or a `datasets.Dataset`, which maps its files into memory


class JsonLines(Sequence):
    """
    The rows of a `.jsonl` file, exactly as written. `datasets` would turn `"2026-02-28"` into a datetime and an integer of thirty digits into
    1e30, and would add missing columns; and its import takes a second. Memory holds the lines, unparsed: as much as the file has.

    Args:
        path (`Path`):
            The file. Every line is read once, so that a bad one shows now.
        columns (`list[str]`, *optional*):
            Columns to keep. Default: all.

    Raises:
        [`RecipeError`]: a line is not a JSON object in UTF-8, or has half of a surrogate pair, which no text file can hold; the message
            names file and line.
    """

    def __init__(self, path: Path, columns: list[str] | None = None):
        self._path, self._columns = path, columns
        with open(path, "rb") as file:
            self._lines = file.readlines()
        for number, row in enumerate(self, start=1):
            try:
                encode(row).encode("utf-8")
            except UnicodeError as error:
                raise RecipeError(f"{path}:{number}: not UTF-8 text ({error}). Save the file as UTF-8.") from error

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = parse_line(self._path, index + 1, self._lines[index])
        return row if self._columns is None else {name: row[name] for name in self._columns if name in row}


def load_rows(entry: DatasetConfig, where: str) -> Rows:
    """
    Rows of a local file, a local directory or a Hub dataset, each read when it is asked for.

    Args:
        entry ([`DatasetConfig`]):
            What to load.
        where (`str`):
            The recipe key, for error messages.

    Raises:
        [`RecipeError`]: the data does not exist, or has no rows.
    """
    try:
        is_file = is_data_file(entry.path)
        if is_file and Path(entry.path).suffix in (".jsonl", ".ndjson"):
            rows = JsonLines(Path(entry.path).expanduser(), entry.columns)
        else:
            rows = load_dataset(entry, is_file)
    except RecipeError as error:
        raise RecipeError(f"`{where}`: {error}") from error
    except OSError as error:
        raise RecipeError(f"`{where}`: cannot read {entry.path}: {error.strerror}. Check the file.") from error
    if not rows:
        raise RecipeError(f"`{where}`: {entry.path} has no rows.")
    return rows


def load_dataset(entry: DatasetConfig, is_file: bool) -> "datasets.Dataset":  # noqa: F821
    """An entry as `datasets` reads it."""
    import datasets

    given = {key: getattr(entry, key) for key in ("name", "data_dir", "data_files", "split")}
    source = source_arguments(entry.path) | ({"split": "train"} if is_file else given)
    try:
        loaded = datasets.load_dataset(**source)
        return loaded if entry.columns is None else loaded.select_columns(entry.columns)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise RecipeError(
            f"cannot load {entry.path!r}, split {entry.split!r}: {error}{cause}. Name a file "
            f"({', '.join(BUILDERS)}), a directory of them, or a dataset id on the Hub."
        ) from error


def load_mixture(entries: list[DatasetConfig], where: str) -> list[tuple[str, Rows, int]]:
    """
    Path and rows of each dataset, and how many of them are taken. If they have a `fraction`, that is as many as TRL's `get_dataset`
    takes: the first rows of each, in these proportions, as many as possible.
    """
    loaded = [(entry, load_rows(entry, where)) for entry in entries]
    if entries[0].fraction is None:
        return [(entry.path, rows, len(rows)) for entry, rows in loaded]
    whole = sum(entry.fraction for entry in entries)
    total = min(len(rows) * whole / entry.fraction for entry, rows in loaded)
    return [(entry.path, rows, round(total * entry.fraction / whole)) for entry, rows in loaded]


class Prompts(Sequence):
    """
    Rows of a mixture, in the datasets' order, each with a `prompt_id` of its own (a column of this name moves to
    `dataset_prompt_id`): the dataset's name, and the row's number in the mixture. A slice is a list.

    Args:
        mixture (`list[tuple]`):
            From [`load_mixture`].
        samples (`int`, *optional*):
            Only the first ones.
    """

    def __init__(self, mixture: list[tuple[str, Rows, int]], samples: int | None = None):
        self._mixture, self._samples = mixture, samples

    def __len__(self) -> int:
        return min(sum(count for _, _, count in self._mixture), self._samples or sys.maxsize)

    def __getitem__(self, index: int | slice) -> Any:
        numbers = range(len(self))[index]
        return self._row(numbers) if isinstance(index, int) else [self._row(number) for number in numbers]

    def _find(self, number: int) -> tuple[str, Rows, int]:
        """A dataset's path and rows, and which of them this is."""
        place = number
        for path, rows, count in self._mixture:
            if place < count:
                return path, rows, place
            place -= count
        raise IndexError(number)

    def _row(self, number: int) -> dict[str, Any]:
        path, rows, place = self._find(number)
        row = in_trl_form(rows[place])
        columns = {"dataset_prompt_id" if name == "prompt_id" else name: row[name] for name in row}
        return {"prompt_id": f"{Path(path).stem}-{number + 1:07d}", **columns}

    def placed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row behind its place, such as `"train.jsonl, row 7"`."""
        for number, row in enumerate(self):
            path, _, place = self._find(number)
            yield f"{path}, row {place + 1}", row


def load_prompts(entries: list[DatasetConfig], where: str, samples: int | None = None) -> Prompts:
    """
    The prompts, the first `samples` or all, after a check of every row.

    Raises:
        [`RecipeError`]: a row without `prompt`, with an empty one, with messages that do not end with the user's, or text
        among messages.
    """
    return checked_prompts(load_mixture(entries, where), where, samples)


def checked_prompts(mixture: list[tuple[str, Rows, int]], where: str, samples: int | None = None) -> Prompts:
    """[`load_prompts`] of rows that are loaded already, each list with its name and how many of it are taken."""
    kind = None
    for path, rows, count in mixture:
        for number, row in enumerate(map(in_trl_form, islice(rows, count)), start=1):
            problem = prompt_problem(row)
            if problem:
                raise RecipeError(f"`{where}`: {path}, row {number}: {problem}")
            kind = kind or type(row["prompt"])
            if type(row["prompt"]) is not kind:
                raise RecipeError(
                    f"`{where}`: {path}, row {number}: text and messages are mixed. Make all prompts one kind."
                )
    return Prompts(mixture, samples)


def in_trl_form(row: dict[str, Any]) -> dict[str, Any]:
    """
    The row with its prompt in TRL's form: ShareGPT's turns, JSON in text and parts of text become messages, and a column `system` beside
    them their system message.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, (str, list)):
        return row
    prompt = read_text(prompt, [])
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if is_messages(prompt) and prompt and system and not has_system(prompt):
        prompt = [{"role": "system", "content": system}, *prompt]
    return {**row, "prompt": prompt}


def prompt_problem(row: dict[str, Any]) -> str | None:
    """What makes a row unusable as a prompt, or `None`."""
    if "prompt" not in row:
        return f"no column `prompt`; its columns are {sorted(row)}. Rename the column that holds the question."
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if looks_like_messages(prompt):
            return "the text looks like messages, but is not JSON. Save the data as JSON lines or Parquet, which keep lists."
        return None if prompt.strip() else f"the prompt is empty{_beside(row)}."
    if not prompt or not is_messages(prompt):
        return "`prompt` must be text or a non-empty list of messages with `role` and `content`."
    if prompt[-1]["role"] != "user":
        return f"the messages must end with the user's, these end with the {prompt[-1]['role']}'s."
    if not isinstance(prompt[-1]["content"], str) or not prompt[-1]["content"].strip():
        return "the last user message must be non-empty text."
    return None


def _beside(row: dict[str, Any]) -> str:
    """Names the columns beside an empty prompt that look like one."""
    names = [f"`{name}`" for name in ("question", "instruction", "query", "messages") if is_filled(row.get(name))]
    return f", and {' and '.join(names)} holds text: rename it to `prompt`" if names else ""


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages that chat templates take: content is text, parts, or null."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and "content" in message
        and isinstance(message["content"], str | list | None)
        for message in value
    )


def prompts_per_round(rows: int, per_round: int | None, rounds: int) -> int:
    """
    How many prompts a round takes.

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


def select_prompts(prompts: Prompts, round_number: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """The prompts of a round (from 1): a slice of one seeded shuffle, so that no two rounds share a row."""
    order = array("q", range(len(prompts)))  # a list would take five times the memory
    random.Random(seed).shuffle(order)
    return (prompts[number] for number in order[(round_number - 1) * size : round_number * size])
