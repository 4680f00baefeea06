"""
Scores: a number for every answer, from a verifier (`verifier.py`), a reward model (`reward_model.py`), a judge (`judge.py`), or a
weighted sum of several.

What a scorer finds out is kept by content in one file of the run, so that nothing is scored twice: `score` adds what is
missing there, and `scores` reads it back. `None` leaves an answer without a score.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from operator import mul
from pathlib import Path
from typing import Any, Protocol

from ...recipe import RecipeError
from ..config import ScorerConfig
from ..data.disk import writing
from ..data.records import Answer, Chain, blocks, encode, read_jsonl, read_rows, recover_jsonl, to_line


Progress = Callable[[int, int], None]
Block = list[tuple[Chain, dict[str, Any]]]  # chains, each with the other columns of its prompt

# Chains whose answers a scorer is given together; our choice
CHAINS_AT_ONCE = 100


class ScoreCache:
    """
    What the scorers have found out so far, by content. Memory holds the scores and verdicts, about 100 bytes each; whatever else a
    row has stays in the file.

    Args:
        path (`Path`):
            A `.jsonl` file that is only ever appended to. A torn last line is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[int, Any] = {}
        self._enter(recover_jsonl(path))

    def __contains__(self, key: str) -> bool:
        return short(key) in self._found

    def __getitem__(self, key: str) -> Any:
        """A score or a verdict."""
        return self._found[short(key)]

    def __len__(self) -> int:
        return len(self._found)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows with a `key` and a `score` or `verdict`."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(to_line, rows))
        self._enter(rows)

    def _enter(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._found[short(row["key"])] = row["verdict"] if "verdict" in row else row["score"]


def short(key: str) -> int:
    """
    The first 60 bits of a [`content_key`], which take a quarter of the memory of the text. Any two of four million answers have the same
    with a probability of 1 in 140,000.
    """
    return int(key[:15], 16)


def content_key(*content: Any) -> str:
    """SHA-256 of who scores and what is scored."""
    return hashlib.sha256(encode(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class ScoreTask:
    """One file of answers to score."""

    prompts: Path
    answers: Path
    chains: int | None = None  # only the first ones

    def __post_init__(self):
        self.columns = other_columns(read_rows(self.prompts))

    def __iter__(self) -> Iterator[tuple[Chain, dict[str, Any]]]:
        """Each chain with the other columns of its prompt, read from the files as it goes."""
        for prompt, chain in islice(read_chains(self.prompts, self.answers), self.chains):
            yield chain, {name: prompt.get(name) for name in self.columns}

    def __len__(self) -> int:
        with open(self.answers, "rb") as file:
            return sum(1 for _ in islice(file, self.chains))


def chains_of(tasks: list[ScoreTask]) -> Iterator[tuple[Chain, dict[str, Any]]]:
    return (item for task in tasks for item in task)


def other_columns(prompts: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the columns besides the prompt; a row may lack some of them."""
    return sorted({key for row in prompts for key in row} - {"prompt", "prompt_id"})


def each_form(prompts: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The first of the prompts, and the first one with each other set of columns, by their places."""
    found = {}
    for place, row in prompts:
        found.setdefault(frozenset(row), (place, row))
    return dict(found.values())


def load_chains(prompts: list[dict[str, Any]], answers: Path) -> list[Chain]:
    rows = {row["prompt_id"]: row for row in read_jsonl(answers)}
    return [Chain.from_row(rows[row["prompt_id"]], row["prompt"]) for row in prompts]


def read_chains(prompts: Path, answers: Path) -> Iterator[tuple[dict[str, Any], Chain]]:
    """
    [`load_chains`] one by one: each prompt's row, and its chain.

    Raises:
        [`RecipeError`]: the files do not have the same prompts in the same order.
    """
    rows = zip_longest(read_rows(prompts), read_rows(answers), fillvalue={"prompt_id": None})
    for number, (prompt, row) in enumerate(rows, start=1):
        if prompt["prompt_id"] != row["prompt_id"]:
            raise RecipeError(
                f"{answers}:{number}: line {number} of {prompts} has another prompt. Restore both files, or delete {answers} and "
                "all that was made after it."
            )
        yield prompt, Chain.from_row(row, prompt["prompt"])


class Scorer(Protocol):
    """A verifier, a reward model or a judge."""

    name: str
    weight: float

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """Try it on the first prompt of each file, before any work is done; [`RecipeError`] if that fails."""

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, progress: Progress) -> list[str]:
        """Add to the cache what takes a process or a server to find out, and return lines that the user should read."""

    def scores(self, block: Block, cache: ScoreCache) -> list[list[float | None]]:
        """The scores of the answers of each chain."""


def score_rows(task: ScoreTask, scorers: list[Scorer], cache: ScoreCache) -> Iterator[dict[str, Any]]:
    """
    The weighted sum of the scorers' scores of each answer; `None` if one of them gives none.

    Yields:
        `dict`: for each chain `prompt_id`, `scores`, one per answer, and `by_scorer`, each scorer's own.
    """
    names, weights = [scorer.name for scorer in scorers], [scorer.weight for scorer in scorers]
    for block in blocks(task, CHAINS_AT_ONCE):
        found = [scorer.scores(block, cache) for scorer in scorers]
        for number, (chain, _) in enumerate(block):
            each = [scores[number] for scores in found]  # by scorer, then by answer
            sums = [None if None in parts else sum(map(mul, weights, parts)) for parts in zip(*each, strict=True)]
            yield {
                "prompt_id": chain.prompt_id,
                "scores": sums if scorers else [None] * len(chain.answers),
                "by_scorer": dict(zip(names, each, strict=True)),
            }


class AnswerScorer:
    """A scorer that looks at one answer at a time: what verifiers and reward models share."""

    def __init__(self, config: ScorerConfig):
        self.name = config.name
        self.weight = config.weight

    def keys(self, chain: Chain, columns: dict[str, Any]) -> Iterator[str]:
        """The key in the cache of each answer of a chain."""
        raise NotImplementedError

    def missing(
        self, chains: Iterable[tuple[Chain, dict[str, Any]]], cache: ScoreCache
    ) -> Iterator[tuple[str, tuple[Chain, Answer, dict[str, Any]]]]:
        """The answers without an entry in the cache, with their keys."""
        for chain, columns in chains:
            for answer, key in zip(chain.answers, self.keys(chain, columns), strict=True):
                if key not in cache:
                    yield key, (chain, answer, columns)

    def scores(self, block: Block, cache: ScoreCache) -> list[list[float | None]]:
        return [[cache[key] for key in self.keys(chain, columns)] for chain, columns in block]
