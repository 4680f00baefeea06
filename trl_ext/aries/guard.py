"""
The guard: what a round's pairs are worth, looked at before they are trained on.

Pairs in, one JSON object out. It compares the chosen with the rejected answers by the scores, the evaluation's measure. In a rule-based
round the scores take no part in the selection, and here it shows when refining has stopped to improve. A best-over-worst round was selected
by the same scores, so that the chosen answers are the better ones by construction: the guard passes every one, and cannot see a scorer that
is wrong, nor a policy that gets worse. Training on a round in which the rejected answers are the better ones makes the policy worse. The guard drops no pair; `pairs.guard` says what happens to the round.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from operator import sub
from typing import Any

import numpy as np

from .evaluation import difference_interval
from .pairs import Pair


RESAMPLES = 1000
# Mean chosen over mean rejected tokens from which on a round is said to teach length. [house]
LONG_CHOSEN_RATIO = 1.5
# `pairs.guard` -> what is decided about a round whose chosen answers are not the better ones
DECISIONS = {"stop": "stopped", "skip": "skipped", "warn": "warned"}


class Examination:
    """The chosen answers of a round beside the rejected ones. Of a pair, its scores are kept, and no text."""

    def __init__(self):
        self._chosen, self._rejected, self._prompt_ids = array("d"), array("d"), []
        self._chosen_tokens = self._rejected_tokens = 0

    def add(self, pair: Pair) -> None:
        self._chosen_tokens += pair.chosen.tokens
        self._rejected_tokens += pair.rejected.tokens
        if pair.chosen_score is not None and pair.rejected_score is not None:
            self._chosen.append(pair.chosen_score)
            self._rejected.append(pair.rejected_score)
            self._prompt_ids.append(pair.chain.prompt_id)

    def measured(self) -> dict[str, Any]:
        """
        Returns:
            `dict`: `compared` (pairs with both scores), `chosen_score`, `rejected_score` and `difference` (means over them, `None`
            without any), `interval` (the difference's 95 % interval over prompts, `None` for fewer than two of them) and
            `length_ratio` (mean chosen over mean rejected tokens, of all pairs; `None` where the rejected have no tokens).
        """
        measured: dict[str, Any] = {"compared": len(self._prompt_ids), "chosen_score": None, "rejected_score": None}
        measured |= {"difference": None, "interval": None}
        if self._prompt_ids:
            differences = array("d", map(sub, self._chosen, self._rejected))
            means = {"chosen_score": self._chosen, "rejected_score": self._rejected, "difference": differences}
            # `fsum`: differences that cancel out are 0, not a rounding error of either sign
            measured |= {name: math.fsum(values) / len(values) for name, values in means.items()}
            measured["interval"] = mean_interval(differences, self._prompt_ids)
        ratio = self._chosen_tokens / self._rejected_tokens if self._rejected_tokens > 0 else None
        return measured | {"length_ratio": ratio}


def examine(pairs: Iterable[Pair]) -> dict[str, Any]:
    """What an [`Examination`] of these pairs measures."""
    examination = Examination()
    for pair in pairs:
        examination.add(pair)
    return examination.measured()


def mean_interval(values: Sequence[float], prompt_ids: list[str]) -> list[float] | None:
    """
    95 % interval of a mean difference: by resampling whole prompts, since the pairs of one chain are not independent, or, with one pair of
    each and scores of 0 and 1, by [`~aries.evaluation.comparison_interval`]. The same values give the same interval.
    """
    _, prompts = np.unique(prompt_ids, return_inverse=True)
    sums, counts = np.bincount(prompts, weights=values), np.bincount(prompts)
    if len(sums) < 2:
        return None
    one_each = counts.max() == 1  # then there is nothing to add up
    if one_each and set(values) <= {-1, 0, 1}:
        return difference_interval(values, RESAMPLES, seed=0)
    generator = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = generator.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / (len(drawn) if one_each else counts[drawn].sum())
    return np.percentile(means, [2.5, 97.5]).tolist()


def decide(measured: dict[str, Any], guard: str) -> str:
    """
    What happens to the round: `"trained"`, or, where the chosen answers do not score higher on average, what `pairs.guard`
    makes of it. Without scores there is nothing to see, and the round is trained on.
    """
    if measured["difference"] is None or measured["difference"] > 0:
        return "trained"
    return DECISIONS[guard]


def findings(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    interval = measured["interval"]
    spread = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    return (
        f"the chosen answers score {measured['chosen_score']:.3f} on average and the rejected ones "
        f"{measured['rejected_score']:.3f} (difference {measured['difference']:+.3f}{spread}, {measured['compared']:,} pairs)"
    )


def report(measured: dict[str, Any], decision: str) -> list[str]:
    """The lines to print about a round, none where all is well. A round that ends the run has [`stop_message`] besides."""
    lines = []
    if measured["compared"] == 0:
        lines.append(
            "no scores, so the guard cannot see whether the chosen answers are the better ones. With `scores.verifier` or "
            "`scores.reward_model` it can; rule-based selection goes on without using them."
        )
    elif decision == "skipped":
        lines.append(f"{findings(measured)}: left untrained.")
    elif decision == "warned":
        lines.append(f"{findings(measured)}: training on it all the same will likely make the policy worse.")
    ratio = measured["length_ratio"]
    if ratio is not None and ratio > LONG_CHOSEN_RATIO:
        lines.append(
            f"the chosen answers are {ratio:.2f} times as long as the rejected ones on average, so the round teaches "
            "length as well. `pairs.max_length_ratio` leaves out the most uneven pairs."
        )
    return lines


def stop_message(number: int, measured: dict[str, Any], selection: str) -> str:
    """The error that ends a run: what was measured, why training would make it worse, and the ways out."""
    ways = {
        "rule_based": "`pairs.selection: best_over_worst`, which selects by these scores; a lower "
        "`training.learning_rate`, if refining got worse in the rounds before; fewer `rounds`, to end with the last policy",
        "best_over_worst": "another scorer; a larger `pairs.min_margin`",
    }[selection]
    return (
        f"round {number} would train the policy away from its better answers: {findings(measured)}. A preference loss "
        "raises the chosen answers over the rejected ones, whichever are better. Ways out, under another `output_dir`: "
        f"{ways}. Or go on in this one with `--pairs.guard skip`, which leaves the round untrained, or "
        "`--pairs.guard warn`, which trains on it all the same."
    )
