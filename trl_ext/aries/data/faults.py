"""
Faults: why rows and chains cannot be used, and whether there are too many.
"""

from ..config import HealthConfig
from .records import Chain


# Why a chain gives no pair, apart from the recipe's own choices. `health.max_dropped` bounds their share
FAULTS = (
    "prompt_too_long",
    "no_answer_found",
    "request_failed",
    "fewer_than_two_scores",
    "fewer_than_two_answers",
    "all_answers_truncated",
    "last_answer_truncated",
    "empty_answer",
)


def fault(chain: Chain, selection: str) -> str | None:
    """The one of [`FAULTS`] that keeps a finished chain from giving a pair whatever its scores, or `None`."""
    if len(chain.answers) < 2:
        return chain.stopped or "fewer_than_two_answers"
    last = chain.answers[-1]
    if selection == "rule_based" and last.finish_reason != "stop":
        return "last_answer_truncated"
    if selection == "rule_based" and chain.stopped is not None:
        return chain.stopped
    eligible = [last] if selection == "rule_based" else [a for a in chain.answers if a.finish_reason == "stop"]
    if not eligible:
        return "all_answers_truncated"
    return None if any(answer.text.strip() for answer in eligible) else "empty_answer"


def share_finding(what: str, dropped: dict[str, int], total: int, config: HealthConfig | None) -> str | None:
    """
    A sentence that says how much was left out if that is too much, else `None`.

    Args:
        what (`str`):
            What the rows are, in the plural.
        dropped (`dict[str, int]`):
            Counts by fault.
        total (`int`):
            Number of rows, used and left out.
        config ([`~aries.config.HealthConfig`] or `None`):
            Its `max_dropped`. `None` if there is no recipe: then its default is too much, and the sentence does not name the key.

    Example:

    ```python
    >>> share_finding("chains", {"prompt_too_long": 3}, 4, HealthConfig())
    '3 of 4 chains cannot be used (3 prompt_too_long), more than `health.max_dropped` (0.5) allows'
    ```
    """
    count, bound = sum(dropped.values()), (config or HealthConfig()).max_dropped
    if bound is None or count <= bound * total:
        return None
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items()) if n)
    allowed = "" if config is None else f", more than `health.max_dropped` ({bound:g}) allows"
    return f"{count:,} of {total:,} {what} cannot be used ({reasons}){allowed}"
