"""
Scores: a number for every answer, from a verifier (a Python function the recipe names), a reward model
(`reward_model.py`), a judge (`judge.py`), or a weighted sum of several.

What a scorer finds out is kept by content in one file of the run, so that nothing is scored twice: `score` adds what is
missing there, and `scores` reads it back. `None` leaves an answer without a score.
"""

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..recipe import RecipeError
from ..recipe_values import show
from .config import ScorerConfig
from .disk import writing
from .records import Answer, Chain, as_completion, read_jsonl, recover_jsonl, sha256, to_line


Progress = Callable[[int, int], None]


class ScoreCache:
    """
    What the scorers have found out so far, by content.

    Args:
        path (`Path`):
            A `.jsonl` file that is only ever appended to. A torn last line is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self.reload()

    def reload(self) -> None:
        """Read what another process has added."""
        self._rows = {row["key"]: row for row in recover_jsonl(self.path)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows with a `key`, and whatever the scorer reads back."""
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(to_line, rows))
        self._rows |= {row["key"]: row for row in rows}


def content_key(*content: Any) -> str:
    """SHA-256 of who scores and what is scored."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class ScoreTask:
    """One file of answers to score."""

    prompts: Path
    answers: Path

    def __post_init__(self):
        self.rows = read_jsonl(self.prompts)
        self.chains = load_chains(self.rows, self.answers)
        self.columns = other_columns(self.rows)

    def __iter__(self) -> Iterator[tuple[Chain, dict[str, Any]]]:
        """Each chain with the other columns of its prompt."""
        return zip(self.chains, self.columns, strict=True)


def other_columns(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows hold besides the prompt, the same columns for all."""
    names = sorted({key for row in prompts for key in row} - {"prompt", "prompt_id"})
    return [{name: row.get(name) for name in names} for row in prompts]


def load_chains(prompts: list[dict[str, Any]], answers: Path) -> list[Chain]:
    rows = {row["prompt_id"]: row for row in read_jsonl(answers)}
    return [Chain.from_row(rows[row["prompt_id"]], row["prompt"]) for row in prompts]


class Scorer(Protocol):
    """What the loop needs of a verifier, a reward model and a judge."""

    name: str
    weight: float

    def check(self, files: list[list[dict[str, Any]]]) -> None:
        """Try it on the first prompt of each file before any work is done; [`RecipeError`] if that fails."""

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, log: Path, progress: Progress) -> list[str]:
        """Add to the cache what is missing for these tasks. Returns lines that the user should read."""

    def scores(self, chain: Chain, columns: dict[str, Any], cache: ScoreCache) -> list[float | None]:
        """The scores of a chain's answers."""


def score_rows(task: ScoreTask, scorers: list[Scorer], cache: ScoreCache) -> list[dict[str, Any]]:
    """
    The weighted sum of what the scorers say of each answer; `None` where one of them says nothing.

    Returns:
        `list[dict]`: a row per chain with `prompt_id`, `scores`, one per answer, and `by_scorer`, each scorer's own.
    """
    rows = []
    for chain, columns in task:
        by_scorer = {scorer.name: scorer.scores(chain, columns, cache) for scorer in scorers}
        scores: list[float | None] = []
        for parts in zip(*by_scorer.values(), strict=True):
            weighted = None if None in parts else sum(s.weight * p for s, p in zip(scorers, parts, strict=True))
            scores.append(weighted)
        rows.append(
            {
                "prompt_id": chain.prompt_id,
                "scores": scores if scorers else [None] * len(chain.answers),
                "by_scorer": by_scorer,
            }
        )
    return rows


class AnswerScorer:
    """A scorer that looks at one answer at a time: the part that verifiers and reward models share."""

    def __init__(self, config: ScorerConfig):
        self.name = config.name
        self.weight = config.weight

    def key(self, chain: Chain, answer: Answer, columns: dict[str, Any]) -> str:
        raise NotImplementedError

    def missing(self, tasks: list[ScoreTask], cache: ScoreCache) -> dict[str, tuple[Chain, Answer, dict[str, Any]]]:
        """The answers without an entry in the cache, by key; equal ones once."""
        found: dict[str, tuple[Chain, Answer, dict[str, Any]]] = {}
        for task in tasks:
            for chain, columns in task:
                for answer in chain.answers:
                    key = self.key(chain, answer, columns)
                    if key not in cache:
                        found.setdefault(key, (chain, answer, columns))
        return found

    def scores(self, chain: Chain, columns: dict[str, Any], cache: ScoreCache) -> list[float | None]:
        return [cache[self.key(chain, answer, columns)]["score"] for answer in chain.answers]


class Verifier(AnswerScorer):
    """
    A Python function with TRL's reward-function signature, called once per file of answers.

    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `verifier`.
    """

    def __init__(self, config: ScorerConfig):
        super().__init__(config)
        self._function = load_verifier(config.verifier)
        file, _, function = config.verifier.rpartition(":")
        self._identity = {"verifier": function, "sha256": sha256(Path(file))}

    def key(self, chain: Chain, answer: Answer, columns: dict[str, Any]) -> str:
        return content_key(self._identity, chain.prompt, answer.text, columns)

    def check(self, files: list[list[dict[str, Any]]]) -> None:
        """Score an empty answer, which is one that a policy may give."""
        for rows in files:
            chain = Chain(rows[0]["prompt_id"], rows[0]["prompt"])
            call_verifier(self._function, [(chain, Answer(1, "", 0, "stop"), other_columns(rows)[0])])

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, log: Path, progress: Progress) -> list[str]:
        for task in tasks:
            missing = self.missing([task], cache)
            if missing:
                scores = call_verifier(self._function, list(missing.values()))
                cache.add([{"key": key, "score": score} for key, score in zip(missing, scores, strict=True)])
        return []


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
