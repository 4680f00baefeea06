"""
Gates: whether a round may be trained on, and whether what it trained may go on.

Before training, the round's pairs: the scores, which are also the evaluation's measure, compare the chosen with the rejected answers. In a
rule-based round the scores take no part in the selection, so the comparison shows when refining no longer improves. A best-over-worst
round was selected by the same scores: its chosen answers are the better ones by construction, and the gate passes it. It cannot see
that a scorer is wrong or that a policy gets worse. No pair is dropped; `pairs.guard` says what happens to the round.

After training, the policy beside the one before round 1: KL, length and diversity of its direct answers, within the bounds of `health`.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from operator import sub
from typing import Any

import numpy as np

from ..config import HealthConfig
from ..data.pairs import Pair
from ..data.records import Chain
from ..scoring.evaluation import difference_interval, distinct


RESAMPLES = 1000
# From this ratio of mean chosen to mean rejected tokens on, a round is said to teach length. Our choice
LONG_CHOSEN_RATIO = 1.5
# `pairs.guard` -> what is decided about a round whose chosen answers are not the better ones
DECISIONS = {"stop": "stopped", "skip": "skipped", "warn": "warned"}


class PairsMeasure:
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


def measure_pairs(pairs: Iterable[Pair]) -> dict[str, Any]:
    """What a [`PairsMeasure`] of these pairs measures."""
    measure = PairsMeasure()
    for pair in pairs:
        measure.add(pair)
    return measure.measured()


def mean_interval(values: Sequence[float], prompt_ids: list[str]) -> list[float] | None:
    """
    95 % interval of a mean difference: by resampling whole prompts, since the pairs of one chain are not independent, or, with one pair of
    each and scores of 0 and 1, by [`~aries.scoring.evaluation.comparison_interval`]. The same values give the same interval.
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


def pair_findings(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    interval = measured["interval"]
    spread = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    return (
        f"the chosen answers score {measured['chosen_score']:.3f} on average and the rejected ones "
        f"{measured['rejected_score']:.3f} (difference {measured['difference']:+.3f}{spread}, {measured['compared']:,} pairs)"
    )


def pair_lines(measured: dict[str, Any], decision: str) -> list[str]:
    """The lines to print about a round, none where all is well. A round that ends the run has [`pairs_stop_message`] besides."""
    lines = []
    if measured["compared"] == 0:
        lines.append(
            "no scores, so the guard cannot see whether the chosen answers are the better ones. With `scores.verifier` or "
            "`scores.reward_model` it can; rule-based selection goes on without using them."
        )
    elif decision == "skipped":
        lines.append(f"{pair_findings(measured)}: left untrained.")
    elif decision == "warned":
        lines.append(f"{pair_findings(measured)}: training on it all the same will likely make the policy worse.")
    ratio = measured["length_ratio"]
    if ratio is not None and ratio > LONG_CHOSEN_RATIO:
        lines.append(
            f"the chosen answers are {ratio:.2f} times as long as the rejected ones on average, so the round teaches "
            "length as well. `pairs.max_length_ratio` leaves out the most uneven pairs."
        )
    return lines


def pairs_stop_message(number: int, measured: dict[str, Any], selection: str) -> str:
    """The error that ends a run: what was measured, why training would make it worse, and the ways out."""
    ways = {
        "rule_based": "`pairs.selection: best_over_worst`, which selects by these scores; a lower "
        "`training.learning_rate`, if refining got worse in the rounds before; fewer `rounds`, to end with the last policy",
        "best_over_worst": "another scorer; a larger `pairs.min_margin`",
    }[selection]
    return (
        f"round {number} would train the policy away from its better answers: {pair_findings(measured)}. A preference loss "
        "raises the chosen answers over the rejected ones, whichever are better. Ways out, under another `output_dir`: "
        f"{ways}. Or go on in this one with `--pairs.guard skip`, which leaves the round untrained, or "
        "`--pairs.guard warn`, which trains on it all the same."
    )


# The policy that a round has trained


def measure_policy(chains: list[Chain], initial: list[Chain], kl_per_token: float | None) -> dict[str, Any]:
    """
    Measure a policy beside the one before round 1, by their direct answers to the same prompts.

    Args:
        chains, initial (`list[Chain]`):
            The evaluation chains of the round and of round 0.
        kl_per_token (`float`, *optional*):
            KL to the initial policy, in nats per token; `None` where it was not estimated.

    Returns:
        `dict`: `kl_per_token`; `length` and `diversity`, the mean tokens (a prompt without an answer has 0) and the `distinct_2` of the
        direct answers, and `length_ratio` and `diversity_ratio`, both over round 0's; `None` where round 0 has nothing to compare
        with.
    """
    length, diversity = direct_length(chains), direct_diversity(chains)
    initial_length, initial_diversity = direct_length(initial), direct_diversity(initial)
    return {
        "kl_per_token": kl_per_token,
        "length": length,
        "length_ratio": length / initial_length if initial_length else None,
        "diversity": diversity,
        "diversity_ratio": diversity / initial_diversity if initial_diversity and diversity is not None else None,
    }


def direct_length(chains: list[Chain]) -> float:
    return sum(answer.tokens for answer in direct_answers(chains)) / len(chains)


def direct_diversity(chains: list[Chain]) -> float | None:
    return distinct([answer.text for answer in direct_answers(chains)], 2)


def direct_answers(chains: Iterable[Chain]) -> list:
    return [chain.answers[0] for chain in chains if chain.answers]


def policy_findings(measured: dict[str, Any], config: HealthConfig) -> list[str]:
    """What is beyond its bound, none where the policy is well. What was not measured is not judged."""
    found = []
    kl, length, diversity = (measured[key] for key in ("kl_per_token", "length_ratio", "diversity_ratio"))
    if config.max_kl is not None and kl is not None and not kl <= config.max_kl:  # NaN is beyond every bound
        found.append(
            f"its KL to the initial policy is {kl:.3g} nats per token, more than `health.max_kl` ({config.max_kl:g}): it has gone "
            "far from the policy it started from, as policies do that collapse"
        )
    if config.min_length is not None and length is not None and not length >= config.min_length:
        found.append(
            f"its direct answers have {measured['length']:.3g} tokens on average, {length:.2g} times round 0's, less than "
            f"`health.min_length` ({config.min_length:g}): they have collapsed in length"
        )
    if config.min_diversity is not None and diversity is not None and not diversity >= config.min_diversity:
        found.append(
            f"its direct answers have {measured['diversity']:.3g} different pairs of words per pair, {diversity:.2g} times round "
            f"0's, less than `health.min_diversity` ({config.min_diversity:g}): they repeat themselves or each other"
        )
    return found


def policy_stop_message(number: int, found: list[str], product: str, last_good: str) -> str:
    """The error that ends a run: the diagnosis, where the policies are, and the ways out."""
    return (
        f"the policy of round {number} has degenerated: {'; '.join(found)}. It is set aside in {product}, and the last good policy is "
        f"{last_good}. Ways out, under another `output_dir`: a lower `training.learning_rate`, fewer steps or a larger "
        "`training.beta`; an NLL term (`loss_type: [sigmoid, sft]`); another scorer, if this one likes such answers. Or go on in this "
        "one with other bounds, such as `--health.max_kl null`."
    )
