"""
Scores: a number for every answer, from a verifier (a Python function the recipe names), a reward model
(`reward_model.py`), a judge (`judge.py`), or a weighted sum of several.

What a scorer finds out is kept by content in one file of the run, so that nothing is scored twice: `score` adds what is
missing there, and `scores` reads it back. `None` leaves an answer without a score.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import mul
from pathlib import Path
from typing import Any, Protocol

from ..recipe import RecipeError
from ..recipe_values import show
from .config import ScorerConfig
from .disk import writing
from .records import (
    Answer,
    Chain,
    as_completion,
    blocks,
    encoder,
    read_jsonl,
    read_rows,
    recover_jsonl,
    sha256,
    to_line,
)


Progress = Callable[[int, int], None]
Block = list[tuple[Chain, dict[str, Any]]]  # chains, each with the other columns of its prompt

# Chains whose answers a scorer is given together. [house]
CHAINS_AT_ONCE = 100

_encode_key = encoder(sort_keys=True)


class ScoreCache:
    """
    What the scorers have found out so far, by content. In memory are the scores and verdicts, about 100 bytes each; what else a
    row has stays in the file.

    Args:
        path (`Path`):
            A `.jsonl` file that is only ever appended to. A torn last line is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.reload()

    def reload(self) -> None:
        """Read what another process has added."""
        self._found: dict[int, Any] = {}
        self._enter(recover_jsonl(self.path))

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
    60 bits of a [`content_key`], the most that a small `int` has: a quarter of the memory of the text. That any two of four million
    answers have the same is 1 to 140,000.
    """
    return int(key[:15], 16)


def content_key(*content: Any) -> str:
    """SHA-256 of who scores and what is scored."""
    return hashlib.sha256(_encode_key(content).encode("utf-8", "surrogatepass")).hexdigest()


def answer_keys(before: tuple[Any, ...], texts: Iterable[str], after: tuple[Any, ...] = ()) -> Iterator[str]:
    """`content_key(*before, text, *after)` of each text. What they have in common is encoded once."""
    start, end = _encode_key(before)[:-1] + ", ", _encode_key(after)[1:]
    end = ", " + end if after else end
    for text in texts:
        content = f"{start}{_encode_key(text)}{end}"
        yield hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class ScoreTask:
    """One file of answers to score."""

    prompts: Path
    answers: Path

    def __post_init__(self):
        self.columns = other_columns(read_rows(self.prompts))

    def __iter__(self) -> Iterator[tuple[Chain, dict[str, Any]]]:
        """Each chain with the other columns of its prompt, read from the files as it goes."""
        for prompt, chain in read_chains(self.prompts, self.answers):
            yield chain, {name: prompt.get(name) for name in self.columns}


def chains_of(tasks: list[ScoreTask]) -> Iterator[tuple[Chain, dict[str, Any]]]:
    return (item for task in tasks for item in task)


def other_columns(prompts: Iterable[dict[str, Any]]) -> list[str]:
    """What the rows hold besides the prompt; not every row needs to have all of it."""
    return sorted({key for row in prompts for key in row} - {"prompt", "prompt_id"})


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
                f"{answers}:{number}: line {number} of {prompts} has another prompt. Take both files back as they were, or "
                f"delete {answers} and all that was made after it."
            )
        yield prompt, Chain.from_row(row, prompt["prompt"])


class Scorer(Protocol):
    """What the loop needs of a verifier, a reward model and a judge."""

    name: str
    weight: float

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """Try it on the first prompt of each file before any work is done; [`RecipeError`] if that fails."""

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, log: Path, progress: Progress) -> list[str]:
        """Add to the cache what takes a process or a server to find out. Returns lines that the user should read."""

    def scores(self, block: Block, cache: ScoreCache) -> list[list[float | None]]:
        """The scores of the answers of each chain."""


def score_rows(task: ScoreTask, scorers: list[Scorer], cache: ScoreCache) -> Iterator[dict[str, Any]]:
    """
    The weighted sum of what the scorers say of each answer; `None` where one of them says nothing.

    Yields:
        `dict`: of each chain `prompt_id`, `scores`, one per answer, and `by_scorer`, each scorer's own.
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
    """A scorer that looks at one answer at a time: the part that verifiers and reward models share."""

    def __init__(self, config: ScorerConfig):
        self.name = config.name
        self.weight = config.weight

    def keys(self, chain: Chain, columns: dict[str, Any]) -> Iterator[str]:
        """Of each answer of a chain, its key in the cache."""
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


class Verifier(AnswerScorer):
    """
    A Python function with TRL's reward-function signature, called for the answers of [`CHAINS_AT_ONCE`] chains at a time.

    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `verifier`.
    """

    def __init__(self, config: ScorerConfig):
        super().__init__(config)
        self._function = load_verifier(config.verifier)
        file, _, function = config.verifier.rpartition(":")
        self._identity = {"verifier": function, "sha256": sha256(Path(file))}

    def keys(self, chain: Chain, columns: dict[str, Any]) -> Iterator[str]:
        return answer_keys((self._identity, chain.prompt), (answer.text for answer in chain.answers), (columns,))

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """Score an empty answer, which is one that a policy may give."""
        for rows in files:
            chain = Chain(rows[0]["prompt_id"], rows[0]["prompt"])
            columns = {name: rows[0].get(name) for name in other_columns(rows)}
            call_verifier(self._function, [(chain, Answer(1, "", 0, "stop"), columns)])

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, log: Path, progress: Progress) -> list[str]:
        return []  # `scores` calls the function

    def scores(self, block: Block, cache: ScoreCache) -> list[list[float | None]]:
        keys = [list(self.keys(chain, columns)) for chain, columns in block]
        missing = {
            key: (chain, answer, columns)  # equal answers once
            for (chain, columns), of_chain in zip(block, keys, strict=True)
            for answer, key in zip(chain.answers, of_chain, strict=True)
            if key not in cache
        }
        if missing:
            scores = call_verifier(self._function, list(missing.values()))
            cache.add([{"key": key, "score": score} for key, score in zip(missing, scores, strict=True)])
        return [[cache[key] for key in of_chain] for of_chain in keys]


def load_verifier(reference: str) -> Callable[..., list[float | None]]:
    """
    Import `path/to/file.py:function`, from that file and nowhere else.

    Raises:
        [`RecipeError`]: no such file or function, or the file fails to import.
    """
    file, separator, name = reference.rpartition(":")
    path = Path(file)
    if not separator or not path.is_file():
        raise RecipeError(
            f"`scores.verifier`: {reference!r} names no file (looked in {Path.cwd()}). Write `path/to/file.py:function`."
        )
    spec = importlib.util.spec_from_file_location(f"trl_ext_verifier_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code: whatever it raises is reported with its place
        raise RecipeError(f"`scores.verifier`: importing {path} failed: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    if name not in functions:
        raise RecipeError(f"`scores.verifier`: {path} has no function `{name}`; it has {functions}.")
    return getattr(module, name)


def call_verifier(
    function: Callable[..., list[float | None]], answers: list[tuple[Chain, Answer, dict[str, Any]]]
) -> list[float | None]:
    """
    Score answers in one call.

    Args:
        function (`Callable`):
            TRL's reward-function signature.
        answers (`list[tuple]`):
            Answers, each with its chain before it and the other columns of its prompt, the same for all, after it.

    Raises:
        [`RecipeError`]: it raises, returns another number of scores, or one that is not a finite number.
    """
    columns = sorted(answers[0][2])
    name = function.__name__
    try:
        scores = function(
            prompts=[chain.prompt for chain, _, _ in answers],
            completions=[as_completion(chain.prompt, answer.text) for chain, answer, _ in answers],
            **{column: [values[column] for _, _, values in answers] for column in columns},
        )
    except (Exception, SystemExit) as error:  # user code: whatever it raises is reported with its place
        raise RecipeError(
            f"the scorer `{name}` raised {type(error).__name__}: {error}. It is called as {name}(prompts=[...], "
            f"completions=[...], {', '.join(f'{c}=[...]' for c in columns)}); add `**kwargs` for the columns it does not "
            "use. An answer may be empty."
        ) from error
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        found = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise RecipeError(f"the scorer `{name}` returned {found} for {len(answers)} answers. Return a list.")
    for (chain, answer, _), score in zip(answers, scores, strict=True):
        # A whole number may be beyond every float
        if score is not None and not (isinstance(score, int | float) and abs(score) <= sys.float_info.max):
            raise RecipeError(
                f"the scorer `{name}` returned {show(score)} for answer {answer.turn} of {chain.prompt_id}. Return a finite "
                "number, or None to leave an answer without a score."
            )
    return [None if score is None else float(score) for score in scores]
