"""
Scoring: every scorer finds out what it has to about the answers, and the sums are written down.

In: files of answers. Out: `scores.jsonl` of each, and what the scorers have found out in the run's cache, from which a killed process
goes on. It calls verifiers, which are user code, so it runs in a process of its own: the loop imports no user code and holds no
scores; what verifiers print goes to this stage's log.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..children import Reporter
from ..config import AriesConfig, GenerationConfig, ScorerConfig
from ..data.records import write_jsonl
from ..policies import Scored, unscored
from ..run_dir import RunDir
from .reward_model import RewardModel
from .scores import ScoreCache, Scorer, ScoreTask, score_rows
from .verifier import Verifier
from .watch import Watch


# Chains between two reports
REPORTED_CHAINS = 100


def score(run: RunDir, config: AriesConfig, answering: int, report: Reporter) -> None:
    """
    Score the answers of round `answering`'s policy that have no scores yet. `run` has an absolute path: a verifier may change the working
    directory.
    """
    scorers = recipe_scorers(config, Watch(run.verifier_call))
    files = [(score_task(file), file.by, file.scores) for file in unscored(run, config, answering)]
    score_files(files, scorers, ScoreCache(run.score_cache), report)


def score_files(
    files: list[tuple[ScoreTask, str, Path]], scorers: dict[str, list[Scorer]], cache: ScoreCache, report: Reporter
) -> None:
    """Score answers, each file of them by the scorers of a section, and write their scores to a file."""
    for section, named in scorers.items():
        tasks = [task for task, by, _ in files if by == section]
        for scorer in named if tasks else ():
            for note in scorer.score(tasks, cache, report):
                report.note(note)
    rows = Counted(sum(len(task) for task, _, _ in files), report)
    for task, by, output in files:
        write_jsonl(output, rows(score_rows(task, scorers[by], cache)))


def score_task(file: Scored) -> ScoreTask:
    return ScoreTask(file.answers.prompts, file.answers.answers, file.chains)


def check_scorers(scorers: Iterable[Scorer], files: list[dict[str, dict[str, Any]]]) -> None:
    """
    Try scorers on the prompts of some files.

    Args:
        files (`list[dict]`):
            For each file [`~aries.scoring.scores.each_form`] of its rows.

    Raises:
        [`RecipeError`]: one of them cannot score, or a row lacks a column that a verifier takes.
    """
    for scorer in scorers:
        if isinstance(scorer, Verifier):
            for rows in files:
                scorer.check_columns(rows)
        scorer.check([list(rows.values()) for rows in files])


def recipe_scorers(config: AriesConfig, watch: Watch) -> dict[str, list[Scorer]]:
    model = config.model
    encode = Tokenizer(model["model_name_or_path"], model.get("model_revision"), config.trust_remote_code)
    return make_scorers(config.scorers, config.generation, encode, watch)


def make_scorers(
    sections: dict[str, list[ScorerConfig]], generation: GenerationConfig, encode: "Tokenizer", watch: Watch
) -> dict[str, list[Scorer]]:
    """The scorers of each section."""
    # All paths before the first verifier is imported: it may change the directory
    sections = {name: list(map(with_absolute_paths, scorers)) for name, scorers in sections.items()}
    return {name: [make_scorer(one, generation, encode, watch) for one in each] for name, each in sections.items()}


def make_scorer(scorer: ScorerConfig, generation: GenerationConfig, encode: "Tokenizer", watch: Watch) -> Scorer:
    if scorer.verifier is not None:
        return Verifier(scorer, encode, watch)
    if scorer.judge is not None:
        from .judge import Judge  # a client for HTTP, which other scorers do not need

        return Judge(scorer)
    return RewardModel(scorer, generation)


def with_absolute_paths(scorer: ScorerConfig) -> ScorerConfig:
    if scorer.verifier is not None:
        file, _, name = scorer.verifier.rpartition(":")
        return replace(scorer, verifier=f"{absolute(file)}:{name}")
    if scorer.reward_model is not None:
        return replace(scorer, reward_model=absolute(scorer.reward_model))
    return scorer


def absolute(name: str) -> str:
    """A path that is valid in any working directory. What is not a path here, such as an id on the Hub, stays unchanged."""
    return str(Path(name).absolute()) if Path(name).exists() else name


class Tokenizer:
    """The policy's tokenizer as a function, loaded when it is first called: few verifiers ask for token ids."""

    def __init__(self, name: str, revision: str | None, trust_remote_code: bool):
        self._name, self._options = absolute(name), {"revision": revision, "trust_remote_code": trust_remote_code}
        self._tokenizer: Any = None

    def __call__(self, text: str) -> list[int]:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._name, **self._options)
            except (OSError, ValueError) as error:
                raise RecipeError(
                    f"`model.model_name_or_path`: the verifier asks for `completion_ids`, and the tokenizer of {self._name} cannot be "
                    f"read: {error}"
                ) from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


class Counted:
    """Passes rows on, and reports how many of all there were."""

    def __init__(self, total: int, report: Reporter):
        self._done, self._total, self._report = 0, total, report

    def __call__(self, rows: Iterator[Any]) -> Iterator[Any]:
        for row in rows:
            yield row
            self._done += 1
            if self._done % REPORTED_CHAINS == 0 or self._done == self._total:
                self._report(self._done, self._total)
