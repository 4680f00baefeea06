"""
Evaluation: how good a policy's answers are, turn by turn, on held-out prompts.
"""

import math
from typing import Any

from .records import Chain


def evaluation_metrics(chains: list[Chain], scores: list[list[float | None]], turns: int) -> dict[str, Any]:
    """
    Mean score, its standard error, and length of the answers y1..y_turns.

    Args:
        chains (`list[Chain]`), scores (`list[list[float | None]]`):
            The answers and their scores, aligned.
        turns (`int`):
            Answers per chain.

    Returns:
        `dict`: `turns`, a list with, for each turn, `score` (mean over the answers that have one), `standard_error`,
        `scored` (how many those are), `answers`, `tokens` (mean) and `truncated` (how many); and `prompts`.
    """
    per_turn = []
    for turn in range(1, turns + 1):
        answers = [chain.answers[turn - 1] for chain in chains if len(chain.answers) >= turn]
        values = [s[turn - 1] for s in scores if len(s) >= turn and s[turn - 1] is not None]
        mean = sum(values) / len(values) if values else None
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else None
        per_turn.append(
            {
                "turn": turn,
                "score": mean,
                "standard_error": None if variance is None else math.sqrt(variance / len(values)),
                "scored": len(values),
                "answers": len(answers),
                "tokens": sum(a.tokens for a in answers) / len(answers) if answers else None,
                "truncated": sum(a.finish_reason == "length" for a in answers),
            }
        )
    return {"prompts": len(chains), "turns": per_turn}
