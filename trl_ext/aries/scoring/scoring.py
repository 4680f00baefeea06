"""
The process that scores: it calls verifiers and judges, waits for reward models, and writes down the sums.

In: files of answers. Out: `scores.jsonl` of each, and what the scorers have found out in the run's cache, from which a killed process
goes on. The loop imports nobody's code and holds no scores; what verifiers print goes to this stage's log.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...recipe import RecipeError
from ..children import ChildError, Reporter, child_main, run_child
from ..config import GenerationConfig, JudgeConfig, ScorerConfig
from ..data.records import write_jsonl
from .reward_model import RewardModel
from .scores import ScoreCache, Scorer, ScoreTask, score_rows
from .verifier import Verifier, Watch, what_ended


# Chains between two reports
REPORTED_CHAINS = 100


def run_scoring(
    job: dict[str, Any], log: Path, on_progress: Callable[[int, int], None], on_note: Callable[[str], None]
) -> None:
    """
    Run this module on a job of `jobs.py`. Paths in it become absolute, since a verifier may change the directory.

    Raises:
        [`RecipeError`]: a scorer is not what it should be, ends the process, or takes longer than its `timeout`.
        [`~aries.children.ChildError`]: a server or a reward model failed, or the process was killed.
    """
    log = log.absolute()
    call = log.with_suffix(".call")
    call.unlink(missing_ok=True)
    failure = None
    try:
        run_child(
            "trl_ext.aries.scoring.scoring",
            job | {"log": str(log), "call": str(call)},
            log,
            on_progress,
            on_note=on_note,
        )
    except ChildError as error:
        failure = error
    ended = what_ended(call)
    call.unlink(missing_ok=True)
    if ended is not None:
        what, where = ended
        if where is not None:
            raise RecipeError(
                f"{what}: it took longer than its `timeout`, and was in {where}. Mend it there, or raise `scores.timeout`, in seconds for "
                "one call with the answers of up to 100 chains. What was scored before is kept."
            )
        if failure is None:
            raise RecipeError(
                f"{what}: it ended its process, with exit code 0. Let it return, or raise an error. Its output is in {log}."
            )
        raise ChildError(f"{what}: {failure}") from failure
    if failure is not None:
        raise failure
    if not all(Path(task["scores"]).exists() for task in job["tasks"]):
        raise ChildError(
            f"the process that scores ended before its work was done, with exit code 0. Its output is in {log}."
        )


def main(job: dict[str, Any], report: Reporter) -> None:
    """The child process: try all scorers, or score what has no scores yet."""
    generation, watch = GenerationConfig(**job["generation"]), Watch(Path(job["call"]))
    tokenizer = Tokenizer(**job["tokenizer"])
    scorers = [make_scorer(settings, generation, tokenizer, watch) for settings in job["scorers"]]
    for scorer in scorers if job["check"] else ():
        scorer.check([[row] for row in job["check"]])
    if not job["tasks"]:
        return
    cache = ScoreCache(Path(job["cache"]))
    tasks = [(ScoreTask(Path(task["prompts"]), Path(task["answers"])), Path(task["scores"])) for task in job["tasks"]]
    for scorer in scorers:
        for note in scorer.score([task for task, _ in tasks], cache, Path(job["log"]), report):
            report.note(note)
    rows = Counted(sum(map(count_lines, (task.answers for task, _ in tasks))), report)
    for task, scores in tasks:
        write_jsonl(scores, rows(score_rows(task, scorers, cache)))


def make_scorer(settings: dict[str, Any], generation: GenerationConfig, encode: "Tokenizer", watch: Watch) -> Scorer:
    judge = settings["judge"]
    config = ScorerConfig(**settings | {"judge": judge and JudgeConfig(**judge)})
    if config.verifier is not None:
        return Verifier(config, encode, watch)
    if judge is not None:
        from .judge import Judge

        return Judge(config)
    return RewardModel(config, generation)


class Tokenizer:
    """The policy's tokenizer as a function, loaded when it is first called: few verifiers ask for token ids."""

    def __init__(self, **source: Any):
        self._source = source
        self._tokenizer: Any = None

    def __call__(self, text: str) -> list[int]:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(**self._source)
            except (OSError, ValueError) as error:
                name = self._source["pretrained_model_name_or_path"]
                raise RecipeError(
                    f"`model.model_name_or_path`: the verifier asks for `completion_ids`, and the tokenizer of {name} cannot be read: {error}"
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


def count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    child_main(main)
