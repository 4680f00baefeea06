"""
The best round of a run: the one whose answers have the highest mean score on the evaluation prompts, by the scores that judge.

It is chosen from what is reported, so its score is a little too good: that of the best of several rounds. Only a difference from the last
round beyond its paired interval counts as one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import AriesConfig
from ..data.records import read_json
from ..run_dir import RunDir
from ..scoring.evaluation import both_scored, difference_interval, of_turn
from ..scoring.round_metrics import read_scores
from .tables import policy_name


@dataclass
class Best:
    """
    The best of some rounds, and how it compares with the last of them.

    Args:
        number (`int`), name (`str`):
            The round, and what to call its policy.
        turn (`int`):
            The turn whose scores are compared: `evaluation.best_turn`.
        score (`float`), interval (`list[float]`, *optional*):
            Its mean score, with the 95 % interval.
        scored (`int`), prompts (`int`):
            How many of the prompts have a score.
        last (`int`), last_score (`float`, *optional*):
            The last round, and its mean score.
        difference (`float`, *optional*), difference_interval (`list[float]`, *optional*):
            By how much it is better than the last round, paired over prompts; `None` if it is the last one.
    """

    number: int
    name: str
    turn: int
    score: float
    interval: list[float] | None
    scored: int
    prompts: int
    last: int
    last_score: float | None = None
    difference: float | None = None
    difference_interval: list[float] | None = None

    @property
    def clear(self) -> bool:
        """Whether it is better than the last round beyond the interval."""
        return self.difference_interval is not None and self.difference_interval[0] > 0

    def __str__(self) -> str:
        some = "" if self.scored == self.prompts else f" on {self.scored:,} of {self.prompts:,} prompts"
        found = f"{self.name}: y{self.turn} scores {self.score:.3f}{bracketed(self.interval)}{some}"
        if self.difference is None:
            return found
        return (
            f"{found}, {'more' if self.clear else 'not clearly more'} than the last round's {self.last_score:.3f} "
            f"(difference {self.difference:+.3f}{bracketed(self.difference_interval)})"
        )


def bracketed(interval: list[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


def best_round(run: RunDir, config: AriesConfig, among: Iterable[int] | None = None) -> Best | None:
    """
    Args:
        among (iterable of `int`, *optional*):
            The rounds to choose from, those that have been evaluated by default.

    Returns:
        [`Best`] or `None`: the later one of equals; `None` without scores that compare rounds.
    """
    if not config.compares_rounds:
        return None
    turn, found = config.evaluation.best_turn, {}
    for number in range(config.rounds + 1) if among is None else among:
        metrics = read_json(run.round(number).metrics)
        if metrics is not None and metrics["turns"][turn - 1]["score"] is not None:
            found[number] = metrics["turns"][turn - 1]
    if not found:
        return None
    last = max(found)
    best = max(found, key=lambda number: (found[number]["score"], number))
    name = policy_name(best, config.sft is not None)
    score, interval, scored = (found[best].get(key) for key in ("score", "interval", "scored"))
    prompts = read_json(run.round(best).metrics)["prompts"]
    chosen = Best(best, name, turn, score, interval, scored, prompts, last)
    if best != last:
        chosen.last_score = found[last]["score"]
        columns = (of_turn(read_scores(run.round(number).evaluation_scores), turn) for number in (last, best))
        differences = [better - other for other, better in both_scored(*columns)]
        if differences:
            chosen.difference = sum(differences) / len(differences)
            samples, seed = config.evaluation.bootstrap_samples, config.seed
            chosen.difference_interval = difference_interval(differences, samples, seed)
    return chosen
