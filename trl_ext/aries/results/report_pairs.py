"""
Pairs: what each round was trained on, as a report shows it. In: `pairs.jsonl`, row by row. Out: which turns met, and a few pairs.
"""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.records import read_rows
from .report_data import RoundRecord, RunRecord
from .report_samples import messages, shorten, word_diff


PAIRS = 8  # of each round
READ_PAIRS = 20_000  # of each round: a file may have millions, and its prompts are in random order
SHOWN_CHARACTERS = 2000  # of a text
SOURCES = ("prompt_id", "chosen_turn", "rejected_turn")


def pairs_of(path: Path) -> Iterator[dict[str, Any]]:
    """The first row of each pair: its rows follow one another, the direct one first."""
    before = None
    for row in read_rows(path):
        source = [row.get(key) for key in SOURCES]
        if source != before or None in source:
            yield row
        before = source


def round_pairs(round_: RoundRecord, seed: int) -> dict[str, Any]:
    """
    Returns:
        `dict`: `pairs`, how many were looked at, at most [`READ_PAIRS`]; `chosen` and `rejected`, the turns that occur; `counts`, a row for each chosen turn with the number of
        pairs by rejected turn; `shown`, pairs drawn at random with a seed.
    """
    draw, total = random.Random(f"{seed} {round_.number}"), 0
    turns, drawn = Counter(), []
    for total, row in enumerate(islice(pairs_of(round_.files.pairs), READ_PAIRS), start=1):
        turns[row.get("chosen_turn"), row.get("rejected_turn")] += 1
        if total <= PAIRS:
            drawn.append((total, row))
        elif (place := draw.randrange(total)) < PAIRS:  # each pair is as likely as any other
            drawn[place] = (total, row)
    turns = Counter({key: count for key, count in turns.items() if None not in key})
    chosen, rejected = (sorted({key[side] for key in turns}) for side in (0, 1))
    return {
        "round": round_,
        "pairs": total,
        "chosen": chosen,
        "rejected": rejected,
        "counts": [[turns[one, other] for other in rejected] for one in chosen],
        "shown": [shown(row) for _, row in sorted(drawn, key=lambda entry: entry[0])],
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A pair, with the words that only one of its answers has."""
    texts = {side: shorten(answer_text(row[side]), SHOWN_CHARACTERS) for side in ("chosen", "rejected")}
    parts = word_diff(texts["rejected"][0].lstrip(), texts["chosen"][0].lstrip())
    own = {"chosen": "new", "rejected": "old"}
    return {
        "prompt_id": row.get("prompt_id"),
        "messages": messages(row["prompt"], SHOWN_CHARACTERS),
        "sides": [
            {
                "name": side,
                "turn": row.get(f"{side}_turn"),
                "score": row.get(f"{side}_score"),
                "parts": [(kind, text) for kind, text in parts if kind in ("same", own[side])],
                "left_out": texts[side][1],
            }
            for side in texts
        ],
    }


def answer_text(answer: Any) -> str:
    """The text of an answer: a completion or its messages."""
    return answer if isinstance(answer, str) else "\n".join(str(message.get("content") or "") for message in answer)


def pair_samples(run: RunRecord) -> list[dict[str, Any]]:
    """[`round_pairs`] of each round that has pairs."""
    return [
        round_pairs(round_, run.resolved["seed"])
        for round_ in run.rounds
        if round_.drops and round_.files.pairs.exists()
    ]
