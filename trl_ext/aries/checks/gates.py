"""
Gates: whether a round may be trained on, and whether what it trained may continue.

Before training, the scores compare the round's chosen answers with its rejected ones. In a rule-based round the scores take no part in
the selection, so the comparison shows when refining no longer improves. A best-over-worst round was selected by the same scores, so it
always passes: the gate sees neither a wrong scorer nor a policy that got worse. With `evaluation.scores` the scorers that judge compare
the pairs of some chains instead, in either kind of round. No pair is dropped; `pairs.guard` decides about the round.

After training, KL, length and diversity of the policy's direct answers are compared with the initial policy's, within the bounds of
`health`.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from operator import sub
from typing import Any

import numpy as np

from ..config import HealthConfig, PairsConfig
from ..data.pairs import Pair
from ..data.records import Chain
from ..scoring.evaluation import difference_interval, distinct


RESAMPLES = 1000
# Warn from this ratio of mean chosen to mean rejected tokens on. Our choice
LONG_CHOSEN_RATIO = 1.5
# `pairs.guard` -> decision about a round whose chosen answers are not better
DECISIONS = {"stop": "stopped", "skip": "skipped", "warn": "warned"}


class PairsMeasure:
    """
    Compares the chosen answers of a round with the rejected ones. It keeps the scores of pairs and no text.

    Args:
        judged (`dict[str, list[float | None]]`, *optional*):
            Scores of the answers of some chains, by prompt: pairs of other chains are not compared. Default: the scores that selected.
    """

    def __init__(self, judged: dict[str, list[float | None]] | None = None):
        self._judged = judged
        self._chosen, self._rejected, self._prompt_ids = array("d"), array("d"), []
        self._chosen_tokens = self._rejected_tokens = 0

    def add(self, pair: Pair) -> None:
        self._chosen_tokens += pair.chosen.tokens
        self._rejected_tokens += pair.rejected.tokens
        chosen, rejected = self._scores(pair)
        if chosen is not None and rejected is not None:
            self._chosen.append(chosen)
            self._rejected.append(rejected)
            self._prompt_ids.append(pair.chain.prompt_id)

    def _scores(self, pair: Pair) -> tuple[float | None, float | None]:
        if self._judged is None:
            return pair.chosen_score, pair.rejected_score
        turns = (answer.turn for answer in pair.chain.answers)
        scores = dict(zip(turns, self._judged.get(pair.chain.prompt_id, ()), strict=False))
        return scores.get(pair.chosen.turn), scores.get(pair.rejected.turn)

    def measured(self) -> dict[str, Any]:
        """
        Returns:
            `dict`: `compared` (pairs with both scores), `chosen_score`, `rejected_score` and `difference` (their means, `None` without such pairs),
            `interval` (the difference's 95 % interval over prompts, `None` for fewer than two) and `length_ratio` (mean chosen over mean rejected
            tokens of all pairs, `None` if the rejected have no tokens).
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


def mean_interval(values: Sequence[float], prompt_ids: list[str]) -> list[float] | None:
    """
    95 % interval of a mean difference, the same for the same values. Whole prompts are resampled, since the pairs of one chain are not
    independent; with one pair per prompt and scores of 0 and 1, it is [`~aries.scoring.evaluation.comparison_interval`].
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
    What happens to the round: `"trained"`, or what `pairs.guard` says if the chosen answers do not score higher on average, or if the rule's
    own evidence speaks against them. Without scores and such findings the round is trained on.
    """
    return DECISIONS[guard] if scores_lower(measured) or measured.get("findings") else "trained"


def scores_lower(measured: dict[str, Any]) -> bool:
    """Whether the chosen answers do not score higher than the rejected ones."""
    return measured["difference"] is not None and measured["difference"] <= 0


def reasons(measured: dict[str, Any]) -> str:
    """What speaks against training on the round, in words."""
    by_scores = [pair_findings(measured)] if scores_lower(measured) else []
    return "; ".join([*by_scores, *measured.get("findings", [])])


def rule_findings(evidence: dict[str, Any], first: dict[str, Any] | None, config: PairsConfig) -> list[str]:
    """
    What of [`~aries.data.pairs.rule_evidence`] has fallen below its bound since round 1, in words. `first` is round 1's, `None` in round 1
    itself.
    """
    found = []
    for key, what, meaning in (
        ("settled", "of the chains settled", "refining goes astray"),
        (
            "changed",
            "of the settled chains end with another answer than their draft",
            "refining adds less than it did",
        ),
    ):
        bound, before, now = getattr(config, f"min_{key}"), (first or {}).get(key), evidence[key]
        if bound is not None and before is not None and now is not None and now < bound * before:
            found.append(
                f"{now:.1%} {what}, and {before:.1%} in round 1: less than {bound:g} times as many (`pairs.min_{key}`), so {meaning}"
            )
    return found


def pair_findings(measured: dict[str, Any]) -> str:
    """The measurements in words."""
    interval = measured["interval"]
    spread = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    return (
        f"the chosen answers score {measured['chosen_score']:.3f} on average and the rejected ones "
        f"{measured['rejected_score']:.3f} (difference {measured['difference']:+.3f}{spread}, {measured['compared']:,} pairs{by(measured)})"
    )


def by(measured: dict[str, Any]) -> str:
    """Who compared, if not the scorers that also select."""
    return ", by `evaluation.scores`" if measured.get("by") == "evaluation.scores" else ""


def pair_lines(measured: dict[str, Any], decision: str) -> list[str]:
    """The lines to print about a round, if any. A round that ends the run also has [`pairs_stop_message`]."""
    lines = []
    if measured["compared"] == 0 and decision == "trained":
        lines.append(
            f"no scores{by(measured)}, so the guard cannot tell whether the chosen answers are better. "
            + (
                "Raise `pairs.guard_samples`."
                if by(measured)
                else "Set `scores.verifier` or `scores.reward_model`; rule-based selection does not use them."
            )
        )
    elif decision == "skipped":
        lines.append(f"{reasons(measured)}: left untrained.")
    elif decision == "warned":
        lines.append(f"{reasons(measured)}: training on it anyway will likely make the policy worse.")
    ratio = measured["length_ratio"]
    if ratio is not None and ratio > LONG_CHOSEN_RATIO:
        lines.append(
            f"the chosen answers are {ratio:.2f} times as long as the rejected ones on average, so the round also teaches length. "
            "`pairs.max_length_ratio` drops the most uneven pairs."
        )
    return lines


def pairs_stop_message(number: int, measured: dict[str, Any], selection: str) -> str:
    """The error that ends a run: what was measured, why training would make the policy worse, and what to do."""
    fixes = {
        "rule_based": "`pairs.selection: best_over_worst`, which selects by these scores; a lower "
        "`training.learning_rate`, if refining got worse over the rounds; or fewer `rounds`, to end with the last policy",
        "best_over_worst": "another scorer, or a larger `pairs.min_margin`",
    }[selection]
    if scores_lower(measured):
        what = "would train the policy away from its better answers"
    else:
        what = "would train the policy on refinements that no longer help, by the rule's own evidence"
    return (
        f"round {number} {what}: {reasons(measured)}. A preference loss "
        "makes the chosen answers more likely than the rejected ones, whichever are better. Under another `output_dir`, try "
        f"{fixes}. Or continue this run with `--pairs.guard skip`, which leaves the round untrained, or `--pairs.guard warn`, "
        "which trains on it anyway."
    )


# The policy that a round has trained


def measure_policy(chains: list[Chain], initial: list[Chain], kl_per_token: float | None) -> dict[str, Any]:
    """
    Compare a policy's direct answers with the initial policy's, on the same prompts.

    Args:
        chains, initial (`list[Chain]`):
            Evaluation chains of the round and of round 0.
        kl_per_token (`float`, *optional*):
            KL to the initial policy in nats per token, `None` if it was not estimated.

    Returns:
        `dict`: `kl_per_token`; `length`, the mean tokens, 0 for a prompt without an answer; `diversity`, the answers' `distinct_2`; and
        `length_ratio` and `diversity_ratio` over round 0's, `None` if round 0 has none.
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
    """The measurements beyond their bounds, in words. What was not measured is not judged."""
    found = []
    kl, length, diversity = (measured[key] for key in ("kl_per_token", "length_ratio", "diversity_ratio"))
    if config.max_kl is not None and kl is not None and not kl <= config.max_kl:  # NaN is beyond every bound
        found.append(
            f"its KL to the initial policy is {kl:.3g} nats per token, more than `health.max_kl` ({config.max_kl:g}): it has moved "
            "far from the initial policy, as collapsing policies do"
        )
    if config.min_length is not None and length is not None and not length >= config.min_length:
        found.append(
            f"its direct answers have {measured['length']:.3g} tokens on average, {length:.2g} times round 0's, less than "
            f"`health.min_length` ({config.min_length:g}): they have collapsed in length"
        )
    if config.min_diversity is not None and diversity is not None and not diversity >= config.min_diversity:
        found.append(
            f"its direct answers have {measured['diversity']:.3g} different pairs of words per pair, {diversity:.2g} times round "
            f"0's, less than `health.min_diversity` ({config.min_diversity:g}): they repeat themselves or one another"
        )
    return found


def policy_stop_message(number: int, found: list[str], product: str, last_good: str) -> str:
    """The error that ends a run: what is wrong with the policy, where it is, and what to do."""
    return (
        f"the policy of round {number} has degenerated: {'; '.join(found)}. It is set aside in {product}, and the last good policy is "
        f"{last_good}. Under another `output_dir`, try a lower `training.learning_rate`, fewer steps, a larger `training.beta`, an NLL "
        "term (`loss_type: [sigmoid, sft]`), or another scorer if this one likes such answers. Or continue this run with other bounds, "
        "such as `--health.max_kl null`."
    )
