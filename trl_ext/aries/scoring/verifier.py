"""
A verifier: a Python function of the user's that scores answers, anything that TRL takes as a reward function.

In: the answers of some chains, and the columns of their prompts. Out: a number or `None` for each. It is imported and called in the
process of `scoring.py` only: it may print, change the directory, hang, or end the process, without harm to the run.
"""

import asyncio
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...recipe import RecipeError
from ...recipe_values import did_you_mean, show
from ..config import ScorerConfig
from ..data.records import Answer, Chain, as_completion, sha256
from .scores import AnswerScorer, Block, Progress, ScoreCache, ScoreTask, content_key, other_columns
from .watch import Watch


# The one module whose functions a recipe may name without a file
TRL_REWARDS = "trl.rewards"

# What a verifier is given beside the columns of the prompts, if it asks for it by name
GIVEN = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")

Scored = tuple[Chain, Answer, dict[str, Any]]  # an answer, with its chain and the other columns of its prompt
Encode = Callable[[str], list[int]]


def verifier_file(reference: str) -> Path | None:
    """
    The file of `path/to/file.py:name`, `None` for `trl.rewards:name`.

    Raises:
        [`RecipeError`]: it names neither.
    """
    file, separator, name = reference.rpartition(":")
    if file == TRL_REWARDS and name:
        return None
    if not separator or not Path(file).expanduser().is_file():
        raise RecipeError(
            f"`scores.verifier`: {reference!r} names no file (looked in {Path.cwd()}). Write `path/to/file.py:function`, or "
            f"`{TRL_REWARDS}:name` for one of TRL's."
        )
    return Path(file).expanduser().resolve()


def load_verifier(reference: str) -> Callable[..., Any]:
    """
    Import a verifier, from its file and nowhere else, or from `trl.rewards`.

    Raises:
        [`RecipeError`]: no such file or function, or the file fails to import.
    """
    path, name = verifier_file(reference), reference.rpartition(":")[2]
    if path is None:
        return load_trl_reward(name)
    # Registered under a name of its own: dataclasses look up the annotations of their module
    module_name = f"trl_ext_verifier_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code: whatever it raises is reported with its place
        del sys.modules[module_name]
        traceback.print_exception(error)
        raise RecipeError(
            f"`scores.verifier`: importing {path} failed: {type(error).__name__}: {error}{place(error, str(path))}"
        ) from error
    if not is_verifier(vars(module).get(name)):
        others = [key for key, value in vars(module).items() if is_verifier(value) and key[0] != "_"]
        own = [
            k for k in others if not inspect.isroutine(vars(module)[k]) or source_file(vars(module)[k]) == str(path)
        ]
        raise RecipeError(
            f"`scores.verifier`: {path} has no function `{name}`; it has {own}.{did_you_mean(name, own)}"
        )
    return vars(module)[name]


def load_trl_reward(name: str) -> Callable[..., Any]:
    from trl import rewards

    found = [key for key in dir(rewards) if key.endswith("_reward") and not key.startswith("get_")]
    if name in found:
        return getattr(rewards, name)
    if name in dir(rewards) and name.startswith("get_"):
        raise RecipeError(
            f"`scores.verifier`: `{TRL_REWARDS}.{name}` makes a reward function, and its numbers are yours to choose. Write a file with "
            f"`from trl.rewards import {name}` and `reward = {name}(...)`, and name it: `path/to/file.py:reward`."
        )
    raise RecipeError(
        f"`scores.verifier`: `{TRL_REWARDS}` has no reward function `{name}`; it has {', '.join(sorted(found))}."
    )


def is_verifier(value: Any) -> bool:
    """Functions, partials and objects that can be called by name; not classes, which would be instantiated instead."""
    if not callable(value) or inspect.isclass(value):
        return False
    try:
        inspect.signature(value)
    except ValueError:  # raised for some functions written in C
        return False
    return True


def verifier_name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def needed_columns(function: Callable[..., Any]) -> set[str]:
    """The columns that a verifier asks for by name."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.default is p.empty and p.kind in kinds} - set(GIVEN)


class Verifier(AnswerScorer):
    """
    A function with TRL's reward-function signature, called for the answers of [`~aries.scoring.scores.CHAINS_AT_ONCE`] chains at a time.

    Args:
        config ([`~aries.config.ScorerConfig`]):
            Its `verifier` and `timeout`.
        encode (`Callable[[str], list[int]]`, *optional*):
            Makes `completion_ids`, for a verifier that asks for them.
        watch ([`Watch`], *optional*):
            Looks after its calls.
    """

    def __init__(self, config: ScorerConfig, encode: Encode | None = None, watch: Watch | None = None):
        super().__init__(config)
        path, _, name = config.verifier.rpartition(":")
        file = verifier_file(config.verifier)
        version = {"trl": importlib.metadata.version("trl")} if file is None else {"sha256": sha256(file)}
        self._identity = {"verifier": name} | version
        self._what = f"the verifier `{name}` ({file or path})"
        self._watch, self._seconds, self._encode = watch, config.timeout, encode
        self._function = self._watched(f"importing {self._what}", load_verifier, config.verifier)

    def keys(self, chain: Chain, columns: dict[str, Any]) -> Iterator[str]:
        return (content_key(self._identity, chain.prompt, answer.text, columns) for answer in chain.answers)

    def check(self, files: list[Sequence[dict[str, Any]]]) -> None:
        """Score an empty answer, which a policy may give."""
        for rows in files:
            chain = Chain(rows[0]["prompt_id"], rows[0]["prompt"])
            columns = {name: rows[0].get(name) for name in other_columns(rows)}
            self._call([(chain, Answer(1, "", 0, "stop"), columns)])

    def check_columns(self, rows: dict[str, dict[str, Any]]) -> None:
        """
        Raises:
            [`RecipeError`]: a row, given by its place, lacks a column that the function takes and has no default for.
        """
        for place, row in rows.items():
            for column in sorted(needed_columns(self._function) - row.keys()):
                raise RecipeError(
                    f"{place}: no column `{column}`, which {self._what} takes.{did_you_mean(column, row)} Add it (`null` if the row has none), "
                    f"or give the parameter a default: `{column}=None`."
                )

    def score(self, tasks: list[ScoreTask], cache: ScoreCache, progress: Progress) -> list[str]:
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
            scores = self._call(list(missing.values()))
            cache.add([{"key": key, "score": score} for key, score in zip(missing, scores, strict=True)])
        return [[cache[key] for key in of_chain] for of_chain in keys]

    def _call(self, answers: list[Scored]) -> list[float | None]:
        several = "" if len(answers) == 1 else f"{len(answers)} answers, of which the first is "
        what = f"{self._what}, called with {several}{described(answers[0])}"
        return self._watched(what, call_verifier, self._function, answers, self._encode)

    def _watched(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        if self._watch is None:
            return function(*args)
        with self._watch.call(what, self._seconds):
            return function(*args)


def call_verifier(
    function: Callable[..., Any], answers: list[Scored], encode: Encode | None = None
) -> list[float | None]:
    """
    Score answers in one call.

    Args:
        function (`Callable`):
            What TRL takes as a reward function; it may be `async`, and return numbers of NumPy or torch.
        answers (`list[tuple]`):
            Answers, each with its chain before it and the other columns of its prompt, the same for all, after it.
        encode (`Callable[[str], list[int]]`, *optional*):
            Token ids of an answer.

    Raises:
        [`RecipeError`]: it raises, or returns the wrong number of scores, or one that is not a finite number.
    """
    name, file = verifier_name(function), source_file(function)
    values = arguments(function, answers, encode)
    try:
        inspect.signature(function).bind(**values)
    except TypeError as error:
        asked = needed_columns(function) - values.keys()
        hint = "".join(did_you_mean(column, values) for column in sorted(asked))
        raise RecipeError(f"the scorer `{name}` cannot be called: {error}.{hint} {usage(name, values)}") from error
    try:
        scores = call(function, values)
    except (Exception, SystemExit) as error:  # user code: whatever it raises is reported with its place
        traceback.print_exception(error)
        answer, error = find_failing(function, answers, encode, error)
        raise RecipeError(
            f"the scorer `{name}` raised {type(error).__name__}: {error}{place(error, file)}, for {described(answer)}. "
            f"{usage(name, values)} An answer may be empty."
        ) from error
    try:
        found = "text" if isinstance(scores, str | bytes) else f"{len(scores)} scores"
    except TypeError:
        found = f"a {type(scores).__name__}"
    if found != f"{len(answers)} scores" or isinstance(scores, dict):
        raise RecipeError(
            f"the scorer `{name}` returned {found} for {len(answers)} answers. Return a list with a number or None for each."
        )
    return [number(name, score, answer) for score, answer in zip(scores, answers, strict=True)]


def arguments(function: Callable[..., Any], answers: list[Scored], encode: Encode | None) -> dict[str, Any]:
    """
    What a verifier is called with: as TRL calls reward functions, except for the trainer's state. Token ids are made for one that
    mentions them; they are those of the answer's text, without the token that ended it.
    """
    values: dict[str, Any] = {
        column: [columns[column] for _, _, columns in answers] for column in sorted(answers[0][2])
    }
    values["prompts"] = [chain.prompt for chain, _, _ in answers]
    values["completions"] = [as_completion(chain.prompt, answer.text) for chain, answer, _ in answers]
    named = inspect.signature(function).parameters
    if encode is not None and ("completion_ids" in named or mentions_ids(source_file(function))):
        values["completion_ids"] = [encode(answer.text) for _, answer, _ in answers]
    for logger in ("log_extra", "log_metric"):
        if logger in named:
            values[logger] = lambda key, value: print(f"{key}: {value}")  # noqa: T201 (into the stage's log)
    return values


@functools.cache
def mentions_ids(file: str) -> bool:
    """Whether a file mentions token ids, which its functions may take from `**kwargs`."""
    return Path(file).is_file() and "completion_ids" in Path(file).read_text(encoding="utf-8", errors="replace")


def source_file(function: Callable[..., Any]) -> str:
    """The file that a verifier is from, empty if it is written in C."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return inspect.getfile(inspect.unwrap(function if inspect.isroutine(function) else type(function)))
    except TypeError:
        return ""


def call(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    found = function(**values)
    if inspect.isawaitable(found):
        found = event_loop().run_until_complete(found)
    return list(found) if isinstance(found, Iterator) else found


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all calls, as in TRL: a client that a verifier keeps belongs to the loop it was first used in."""
    return asyncio.new_event_loop()


def find_failing(
    function: Callable[..., Any], answers: list[Scored], encode: Encode | None, error: BaseException
) -> tuple[Scored, BaseException]:
    """The answer that a verifier fails on, found by bisection, and its error alone; the first one if it fails on all of them or on none."""
    found = answers
    while len(found) > 1:
        half = found[: len(found) // 2]
        try:
            call(function, arguments(function, half, encode))
        except (Exception, SystemExit) as of_half:
            found, error = half, of_half
        else:
            found = found[len(half) :]
    try:
        call(function, arguments(function, found, encode))
    except (Exception, SystemExit) as of_one:
        return found[0], of_one
    return answers[0], error


def place(error: BaseException, file: str) -> str:
    """The last line of the verifier's file that an error passed through, with a leading ` at `; empty if it came from elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at {file}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""


def described(scored: Scored) -> str:
    chain, answer, columns = scored
    values = "".join(f", {name} = {show(value)}" for name, value in columns.items())
    return f"answer {answer.turn} of {chain.prompt_id}, {show(answer.text)}, to {show(chain.prompt)}{values}"


def usage(name: str, values: dict[str, Any]) -> str:
    shown = ", ".join(f"{key}=[...]" for key in values if key not in ("log_extra", "log_metric"))
    return f"It is called as {name}({shown}); add `**kwargs` for what it does not use."


def number(name: str, score: Any, scored: Scored) -> float | None:
    """A score as a `float`."""
    if score is None:
        return None
    try:
        value = float("nan") if isinstance(score, str | bytes) or np.ndim(score) > 0 else float(score)
    except (TypeError, ValueError, OverflowError):  # not a number, or an integer beyond every float
        value = float("nan")
    if not abs(value) <= sys.float_info.max:
        chain, answer, _ = scored
        shown = show(float(score) if isinstance(score, float) else score)  # NumPy's are floats that name their type
        raise RecipeError(
            f"the scorer `{name}` returned {shown} for answer {answer.turn} of {chain.prompt_id}. Return a finite "
            "number, or None to leave an answer without a score."
        )
    return value
