"""
Health: whether a run has come to something that should not be trained on any further.

Counts and measured numbers in, findings out, each a sentence with what was measured, what is allowed and the key that says so. Two
things are looked at: how many rows had to be left out, and what has become of a round's policy beside the one before round 1. Losses
and weights that are no numbers are for `training.py`, and the pairs' scores for `guard.py`.
"""

from collections.abc import Iterable
from typing import Any

from .config import HealthConfig
from .evaluation import distinct
from .records import Chain


def share_finding(what: str, dropped: dict[str, int], total: int, config: HealthConfig) -> str | None:
    """
    Whether too much was left out.

    Args:
        what (`str`):
            What the rows are, in the plural.
        dropped (`dict[str, int]`):
            Counts by reason, of the reasons that are faults.
        total (`int`):
            All rows.
        config ([`~aries.config.HealthConfig`]):
            Its `max_dropped`.

    Example:

    ```python
    >>> share_finding("chains", {"prompt_too_long": 3}, 4, HealthConfig())
    '3 of 4 chains cannot be used (3 prompt_too_long), more than `health.max_dropped` (0.5) allows'
    ```
    """
    count = sum(dropped.values())
    if config.max_dropped is None or count <= config.max_dropped * total:
        return None
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items()) if n)
    return f"{count:,} of {total:,} {what} cannot be used ({reasons}), more than `health.max_dropped` ({config.max_dropped:g}) allows"


def examine(chains: list[Chain], initial: list[Chain], kl_per_token: float | None) -> dict[str, Any]:
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


def findings(measured: dict[str, Any], config: HealthConfig) -> list[str]:
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


def stop_message(number: int, found: list[str], product: str, last_good: str) -> str:
    """The error that ends a run: the diagnosis, where the policies are, and the ways out."""
    return (
        f"the policy of round {number} has degenerated: {'; '.join(found)}. It is set aside in {product}, and the last good policy is "
        f"{last_good}. Ways out, under another `output_dir`: a lower `training.learning_rate`, fewer steps or a larger "
        "`training.beta`; an NLL term (`loss_type: [sigmoid, sft]`); another scorer, if this one likes such answers. Or go on in this "
        "one with other bounds, such as `--health.max_kl null`."
    )
