"""
`trl-ext aries try-verifier`: what a recipe's verifiers say about a few answers, before anything is generated.

In: the first SFT rows, or the first prompts. Out: a line for each answer, with its score or what the verifier raised. The answers are an
empty one, which a policy may give, and every other text of the row: its completion and draft, or the columns with right answers.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...recipe import RecipeError
from ...recipe_values import show
from ...terminal import printable
from ..config import AriesConfig, DatasetConfig
from ..data.prompts import load_prompts, load_rows
from ..data.records import Answer, Chain
from ..data.sft import usable_sft_rows
from .verifier import call_verifier, load_verifier, needed_columns


ROWS = 10


def try_verifier(config: AriesConfig, console: Console | None = None) -> int:
    """
    Score the answers of the first rows with each of the recipe's verifiers, and print the scores.

    Returns:
        `int`: exit code, 0 if every answer got a score or `None`, otherwise 2.

    Raises:
        [`~recipe.RecipeError`]: the recipe has no verifier, or its file or the rows cannot be read.
    """
    verifiers = list(dict.fromkeys(scorer.verifier for scorer in config.all_scorers if scorer.verifier is not None))
    if not verifiers:
        raise RecipeError(
            "`scores.verifier` is missing. Write `path/to/file.py:function`; reward models and judges cannot be tried here."
        )
    console = console or Console(soft_wrap=True)
    failed = False
    for reference in verifiers:
        errors: dict[str, tuple[str, int]] = {}  # the first message of each kind, and how many answers raised it
        function = load_verifier(reference)
        source, rows = rows_to_try(config, needed_columns(function))
        table = Table("row", "answer", "score", title=f"{reference} on {source}", title_justify="left")
        for number, row in enumerate(rows, start=1):
            chain = Chain(f"row {number}", row["prompt"])
            columns = {key: value for key, value in row.items() if key not in ("prompt", "prompt_id", *GENERATED)}
            for name, text in answers(row):
                try:
                    with redirect_stderr(io.StringIO()):  # a traceback for each answer
                        [score] = call_verifier(function, [(chain, Answer(1, text, 0, "stop"), columns)])
                    found = "None" if score is None else f"{score:g}"
                except RecipeError as error:
                    found = type(error.__cause__ or error).__name__
                    message, count = errors.get(found, (str(error), 0))
                    errors[found], failed = (message, count + 1), True
                table.add_row(str(number), printable(f"{name}: {show(text)}"), found)
        console.print(table)
        for message, count in errors.values():
            console.print(Text(f"{count} of {table.row_count} answers. The first: {printable(message)}"))
    return 2 if failed else 0


# Columns of SFT rows that are answers, and no columns of a prompt
GENERATED = ("completion", "draft")


def rows_to_try(config: AriesConfig, needed: set[str]) -> tuple[str, Iterable[dict[str, Any]]]:
    """The first SFT rows, if they have the columns that the verifier needs, or else the first prompts."""
    dataset = (config.sft or {}).get("dataset")
    if dataset is not None:
        rows = list(islice(load_rows(DatasetConfig(dataset), "sft.dataset"), ROWS))
        usable, _ = usable_sft_rows(rows, dataset)
        if usable and all(needed <= row.keys() for row in rows):
            return dataset, usable
    entries = config.prompts.entries()
    return entries[0].path, islice(load_prompts(entries, "prompts.dataset"), ROWS)


def answers(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts to score, each with what it is."""
    yield "empty", ""
    for name, value in row.items():
        if isinstance(value, list) and name == "completion":
            value = value[-1]["content"]
        if isinstance(value, str) and name not in ("prompt", "prompt_id"):
            yield f"`{name}`", value
