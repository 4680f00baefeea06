"""
Evaluation: how good a policy's answers are, turn by turn, on held-out prompts.

In: the chains of one round, their scores, and the scores of the rounds to compare with. Out: the numbers of `metrics.json`.
The protocol is SRPO's (https://huggingface.co/papers/2406.01660): every quantity after 0, 1, ... refinements, with confidence
intervals over prompts; but its win rates are against gold answers, ours against an earlier round. A share has Wilson's interval and a
win rate Agresti and Min's, which have a width even if all answers are right; any other mean has a bootstrap interval, which has none
if all its values are the same. Nothing here reads a clock, so a round evaluated again has the same metrics.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..data.pairs import similarity
from ..data.records import Answer, Chain


CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal distribution's quantile for it

# Values drawn at once by the bootstrap: 32 MiB of indices
_CHUNK = 2**22

# Win rates of a turn, and the round that each is over
COMPARED = {"win_rate_previous": "the round before", "win_rate_round_0": "round 0"}

Scores = list[list[float | None]]  # of each chain, of each of its answers
Interval = Callable[[Sequence[float]], list[float] | None]


def evaluation_metrics(
    chains: list[Chain],
    scores: Scores,
    turns: int,
    *,
    initial: Scores | None = None,
    previous: Scores | None = None,
    binary: bool = True,
    correct_score: float | None = None,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Score, comparison with earlier rounds, effect of refining, length and diversity of the answers y1..y_turns.

    Args:
        chains (`list[Chain]`), scores (`list[list[float | None]]`):
            The answers and their scores, aligned.
        turns (`int`):
            Answers per chain.
        initial, previous (`list[list[float | None]]`, *optional*):
            Scores of round 0 and of the round before, on the same prompts.
        binary (`bool`, *optional*, defaults to `True`):
            Whether all scores of the rounds before are 0 or 1: what is right is the same in a run.
        correct_score (`float`, *optional*):
            Score from which an answer is right. Default: 1 if all scores, those of the rounds before too, are 0 or 1; otherwise no answer
            is right or wrong.
        bootstrap_samples (`int`, *optional*, defaults to `10000`), seed (`int`, *optional*, defaults to `0`):
            For the intervals of mean scores other than 0 and 1; see [`bootstrap_interval`].

    Returns:
        `dict`: `prompts`, `correct_score` (the one in force), and `turns`, a list with, for each turn, `turn`, `score`
        (mean over the answers that have one), `standard_error`, `interval`, `scored` (how many those are), `answers`,
        `correct`, `win_rate_round_0`, `win_rate_previous` (see [`win_rate`]), `changes`, `flips` (see [`changes`] and
        [`flips`]), `tokens` (mean), `token_quartiles`, `truncated` (how many), `truncated_share`, `distinct_1`,
        `distinct_2` (see [`distinct`]), `similarity` to the answer before and the share of `identical` ones.
    """
    if correct_score is None and binary and is_binary(scores):
        correct_score = 1.0
    interval = partial(mean_interval, samples=bootstrap_samples, seed=seed)
    per_turn = []
    for turn in range(1, turns + 1):
        answers = [chain.answers[turn - 1] for chain in chains if len(chain.answers) >= turn]
        column = of_turn(scores, turn)
        before = of_turn(scores, turn - 1) if turn > 1 else None
        per_turn.append(
            {
                "turn": turn,
                **score_metrics([score for score in column if score is not None], correct_score, interval),
                "answers": len(answers),
                "win_rate_round_0": None if initial is None else win_rate(column, of_turn(initial, turn)),
                "win_rate_previous": None if previous is None else win_rate(column, of_turn(previous, turn)),
                "changes": None if before is None else changes(before, column),
                "flips": None if before is None else flips(before, column, correct_score),
                **length_metrics(answers),
                "distinct_1": distinct([answer.text for answer in answers], 1),
                "distinct_2": distinct([answer.text for answer in answers], 2),
                **likeness([chain.answers[turn - 2 : turn] for chain in chains if len(chain.answers) >= turn > 1]),
            }
        )
    return {"prompts": len(chains), "correct_score": correct_score, "turns": per_turn}


def selecting_metrics(
    scores: Scores,
    turns: int,
    initial: Scores | None,
    previous: Scores | None,
    bootstrap_samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """
    What the scorers that select say of the same answers, beside those that judge.

    Returns:
        `list[dict]`: for each turn `turn`, `score`, `interval`, `scored`, `win_rate_round_0` and `win_rate_previous`, as in
        [`evaluation_metrics`].
    """
    per_turn = []
    for turn in range(1, turns + 1):
        column = of_turn(scores, turn)
        values = [score for score in column if score is not None]
        per_turn.append(
            {
                "turn": turn,
                "score": sum(values) / len(values) if values else None,
                "interval": mean_interval(values, bootstrap_samples, seed),
                "scored": len(values),
                "win_rate_round_0": None if initial is None else win_rate(column, of_turn(initial, turn)),
                "win_rate_previous": None if previous is None else win_rate(column, of_turn(previous, turn)),
            }
        )
    return per_turn


def partings(metrics: dict[str, Any]) -> list[str]:
    """
    The turns whose answers win against an earlier round's by the scores that select, and lose by those that judge: both 95 % intervals lie
    beyond one half. That is Goodhart's law at work: the scores that select are being exploited.
    """
    lines, said = [], []
    for key, before in COMPARED.items():
        rates = {
            judging["turn"]: (selecting[key], judging[key])
            for judging, selecting in zip(metrics["turns"], metrics.get("selecting", []), strict=False)
            if judging[key] and selecting[key] and judging[key]["interval"] and selecting[key]["interval"]
        }
        parted = {
            turn: (selected, judged)
            for turn, (selected, judged) in rates.items()
            if judged["interval"][1] < 0.5 < selected["interval"][0]
        }
        if parted and parted not in said:  # in round 1 both comparisons are the same
            said.append(parted)
            turn, (selected, judged) = list(parted.items())[-1]
            lines.append(
                f"what selects is being exploited: by `scores` {in_words(parted)} against the same answers of {before}, and by "
                f"`evaluation.scores` {'it loses' if len(parted) == 1 else 'they lose'}: y{turn} wins {selected['win_rate']:.2f} of the "
                f"comparisons by the one, {judged['win_rate']:.2f} by the other, where 0.5 is no change"
            )
    return lines


def in_words(turns: Iterable[int]) -> str:
    """
    Example:

    ```python
    >>> in_words([2, 3]), in_words([1])
    ('y2, y3 win', 'y1 wins')
    ```
    """
    names = [f"y{turn}" for turn in turns]
    return f"{', '.join(names)} win{'s' * (len(names) == 1)}"


def ceiling(metrics: dict[str, Any], scores: Scores) -> str | None:
    """What to say of a policy whose direct answers all have the same score; `None` if they differ."""
    values = [score for score in of_turn(scores, 1) if score is not None]
    if len(values) < 2 or len(set(values)) > 1:
        return None
    if metrics.get("correct_score") is not None and values[0] >= metrics["correct_score"]:
        return (
            f"all {len(values):,} direct answers of the initial policy are right: it is at the ceiling of these scores, and no round can do "
            "measurably better. Take harder prompts, or a finer score"
        )
    return (
        f"all {len(values):,} direct answers of the initial policy have the same score, {values[0]:g}: these scores cannot tell good answers "
        "from bad ones yet. Take other prompts, or a finer score"
    )


def lost_turns(metrics: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """
    The turns whose answers have become worse. They lose against the same turn of the round before, or of round 0: the 95 % interval of their
    win rate ends below one half.

    Args:
        metrics (`dict`):
            From [`evaluation_metrics`].

    Returns:
        `dict`: by the round that something was lost to, the turns and their win rates; in round 1 both are round 0, and only the first is reported.
    """
    lost: dict[str, dict[int, dict[str, Any]]] = {}
    for key, before in COMPARED.items():
        rates = {turn["turn"]: turn[key] for turn in metrics["turns"] if turn[key] and turn[key]["interval"]}
        worse = {turn: rate for turn, rate in rates.items() if rate["interval"][1] < 0.5}
        if worse and worse not in lost.values():
            lost[before] = worse
    return lost


def setbacks(metrics: dict[str, Any]) -> list[str]:
    """[`lost_turns`] in words, a line for each round that something was lost to."""
    lines = []
    for before, worse in lost_turns(metrics).items():
        turn, rate = list(worse.items())[-1]
        low, high = rate["interval"]
        lines.append(
            f"{', '.join(f'y{turn}' for turn in worse)} lose{'s' * (len(worse) == 1)} against the same answers of {before}: y{turn} wins "
            f"{rate['win_rate']:.2f} of the comparisons, 95 % interval {low:.2f} to {high:.2f}, where 0.5 is no change"
        )
    return lines


def of_turn(scores: Scores, turn: int) -> list[float | None]:
    """Scores of one turn's answers; `None` if a chain has none."""
    return [chain_scores[turn - 1] if len(chain_scores) >= turn else None for chain_scores in scores]


def is_binary(scores: Scores) -> bool:
    """Whether all scores are 0 or 1, as an exact verifier's are."""
    return {score for chain_scores in scores for score in chain_scores if score is not None} in ({0}, {1}, {0, 1})


def mean_interval(values: Sequence[float], samples: int, seed: int) -> list[float] | None:
    """95 % interval of a mean over prompts: [`share_interval`] of scores that are 0 or 1, [`bootstrap_interval`] of any other."""
    if set(values) <= {0, 1}:
        return share_interval(sum(values), len(values))
    return bootstrap_interval(values, samples, seed)


def difference_interval(differences: Sequence[float], samples: int, seed: int) -> list[float] | None:
    """
    95 % interval of the mean of paired differences: [`comparison_interval`] of those between scores of 0 or 1, otherwise
    [`bootstrap_interval`].
    """
    if set(differences) <= {-1, 0, 1}:
        counts = [sum(value == sign for value in differences) for sign in (1, 0, -1)]
        return comparison_interval(*counts)
    return bootstrap_interval(differences, samples, seed)


def share_interval(count: float, total: int) -> list[float] | None:
    """
    Wilson's 95 % score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Returns:
        `list[float]` or `None`: low and high, within [0, 1]; `None` for fewer than two of them.

    Example:

    ```python
    >>> low, high = share_interval(100, 100)
    >>> round(low, 3), high
    (0.963, 1.0)
    ```
    """
    if total < 2:
        return None
    share, z2 = count / total, Z**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return [0.0 if count == 0 else center - half, 1.0 if count == total else center + half]


def comparison_interval(wins: int, ties: int, losses: int) -> list[float] | None:
    """
    95 % interval of (wins − losses) / all for paired comparisons: that of a share if there are no ties, otherwise Agresti and Min's, half an
    observation added to each cell of the table of pairs (2005, https://doi.org/10.1002/sim.1781).

    Returns:
        `list[float]` or `None`: low and high, within [−1, 1]; `None` for fewer than two comparisons.
    """
    total = wins + ties + losses
    if ties == 0 or total < 2:
        share = share_interval(wins, total)
        return share and [2 * bound - 1 for bound in share]
    total += 2  # ties are two of the four cells
    difference, discordant = (wins - losses) / total, (wins + losses + 1) / total
    half = Z * math.sqrt((discordant - difference**2) / total)
    return [max(-1.0, difference - half), min(1.0, difference + half)]


def bootstrap_interval(values: Sequence[float], samples: int, seed: int) -> list[float] | None:
    """
    Percentile bootstrap of a mean: the middle 95 % of the means of `samples` resamples, drawn with replacement.

    Args:
        values (sequence of `float`):
            One per prompt: prompts are what is resampled.
        samples (`int`), seed (`int`):
            How many resamples, and the seed that draws them.

    Returns:
        `list[float]` or `None`: low and high; `None` for fewer than two values. Equal values have an interval of no width.

    Example:

    ```python
    >>> bootstrap_interval([0.0, 1.0, 1.0, 1.0], samples=10_000, seed=0)
    [0.25, 1.0]
    ```
    """
    if len(values) < 2:
        return None
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(array))
    means = []
    for start in range(0, samples, rows):
        indices = generator.integers(len(array), size=(min(rows, samples - start), len(array)))
        means.append(array[indices].mean(axis=1))
    return np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()


def score_metrics(values: list[float], correct_score: float | None, interval: Interval) -> dict[str, Any]:
    mean = sum(values) / len(values) if values else None
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else None
    return {
        "score": mean,
        "standard_error": None if variance is None else math.sqrt(variance / len(values)),
        "interval": interval(values),
        "scored": len(values),
        "correct": sum(v >= correct_score for v in values) / len(values)
        if values and correct_score is not None
        else None,
    }


def win_rate(column: list[float | None], other: list[float | None]) -> dict[str, Any] | None:
    """
    How often an answer scores higher than another policy's answer to the same prompt; a tie is half a win.

    Returns:
        `dict` or `None`: `win_rate`, its `interval`, `wins`, `ties`, `losses`; `None` if no prompt has both scores.
    """
    pairs = both_scored(other, column)
    if not pairs:
        return None
    # 1 for a win, 1/2 for a tie, 0 for a loss
    points = [((new > old) - (new < old) + 1) / 2 for old, new in pairs]
    counts = {"wins": points.count(1.0), "ties": points.count(0.5), "losses": points.count(0.0)}
    interval = comparison_interval(**counts)
    return {
        "win_rate": sum(points) / len(points),
        "interval": None if interval is None else [(bound + 1) / 2 for bound in interval],
        **counts,
    }


def changes(before: list[float | None], after: list[float | None]) -> dict[str, int]:
    """How many answers score higher, lower and the same as the answer they refine."""
    pairs = both_scored(before, after)
    return {
        "improved": sum(new > old for old, new in pairs),
        "worsened": sum(new < old for old, new in pairs),
        "same": sum(new == old for old, new in pairs),
    }


def flips(before: list[float | None], after: list[float | None], correct_score: float | None) -> dict[str, int] | None:
    """How many answers set a wrong one right, and how many spoil a right one; `None` if right is not defined."""
    if correct_score is None:
        return None
    pairs = [(old >= correct_score, new >= correct_score) for old, new in both_scored(before, after)]
    return {"wrong_to_right": pairs.count((False, True)), "right_to_wrong": pairs.count((True, False))}


def both_scored(before: list[float | None], after: list[float | None]) -> list[tuple[float, float]]:
    return [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]


def length_metrics(answers: list[Answer]) -> dict[str, Any]:
    tokens = [answer.tokens for answer in answers]
    truncated = sum(answer.finish_reason == "length" for answer in answers)
    return {
        "tokens": sum(tokens) / len(tokens) if tokens else None,
        "token_quartiles": np.quantile(tokens, [0.25, 0.5, 0.75]).tolist() if tokens else None,
        "truncated": truncated,
        "truncated_share": truncated / len(answers) if answers else None,
    }


def distinct(texts: list[str], n: int) -> float | None:
    """
    Distinct-n (https://huggingface.co/papers/1510.03055): different n-grams of words over all n-grams of all texts. Low values
    mean that answers repeat themselves or each other; longer answers alone lower it too.
    """
    words = [text.split() for text in texts]
    ngrams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def likeness(refinements: list[list[Answer]]) -> dict[str, float | None]:
    """How alike an answer and the one it refines are: mean similarity of their words, and share of identical texts."""
    pairs = [(draft.text, answer.text) for draft, answer in refinements]
    if not pairs:
        return {"similarity": None, "identical": None}
    return {
        "similarity": sum(1.0 if a == b else similarity(a, b) for a, b in pairs) / len(pairs),
        "identical": sum(a == b for a, b in pairs) / len(pairs),
    }
