"""
Cost: the generated tokens, the seconds and the memory of a round. They are kept apart from the metrics, which hold no clock times.
"""

from collections.abc import Iterable
from typing import Any

from ..data.records import Chain


PEAKS = ("peak_memory", "peak_gpu_memory")


def round_cost(
    events: list[dict[str, Any]],
    number: int,
    chains: Iterable[Chain],
    evaluation: Iterable[Chain],
    discarded: int = 0,
) -> dict[str, Any]:
    """
    What `cost.json` holds.

    Args:
        events (`list[dict]`), number (`int`):
            The run's event log, and the round.
        chains (iterable of [`Chain`]), evaluation (iterable of [`Chain`]):
            Its answers, and its policy's answers to the evaluation prompts.
        discarded (`int`, *optional*, defaults to `0`):
            Tokens of answers that were not used, because the policy that gave them was rolled back.

    Returns:
        `dict`: `generated_tokens` of `drafts`, `refinements` and `evaluation`, without critiques, whose tokens are not recorded, and `discarded`
        if any were; and `stages`, for each stage of the round its name, the `seconds` of its finished runs, how many were `interrupted`,
        whose time is unknown, and if known the `peak_memory` and `peak_gpu_memory` of its largest process in bytes.
    """
    drafts = refinements = 0
    for chain in chains:
        generated = [*chain.answers, *chain.unanswered]
        drafts += sum(answer.tokens for answer in generated if answer.turn == 1)
        refinements += sum(answer.tokens for answer in generated if answer.turn > 1)
    return {
        "generated_tokens": {
            "drafts": drafts,
            "refinements": refinements,
            "evaluation": sum(a.tokens for chain in evaluation for a in (*chain.answers, *chain.unanswered)),
            **({"discarded": discarded} if discarded else {}),
        },
        "stages": stage_times(events, number),
    }


def stage_times(events: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The `stages` of [`round_cost`]."""
    stages: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["round"] != number or event["event"] not in ("start", "end"):
            continue
        stage = stages.setdefault(event["stage"], {"stage": event["stage"], "seconds": 0.0, "interrupted": 0})
        if event["event"] == "start":
            stage["interrupted"] += 1  # until its end is found
        else:
            stage["interrupted"] -= 1
            stage["seconds"] = round(stage["seconds"] + event["seconds"], 3)
            stage |= {key: max(event[key], stage.get(key, 0)) for key in PEAKS if key in event}
    return list(stages.values())
