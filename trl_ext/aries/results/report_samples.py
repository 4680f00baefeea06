"""
Samples: which prompts a report shows, and what changed from answer to answer.
"""

import random
import re
from difflib import SequenceMatcher
from typing import Any

from ..data.pairs import EXACT_WORDS
from .report_data import RoundRecord, RunRecord


SAMPLES = 12
# Characters of a text that are shown; what is left out is counted
SHOWN_CHARACTERS = 4000

# Words, and single characters of scripts that put no spaces between them, each with the space before it
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"\s*(?:[{_CJK}]|[^\W{_CJK}]+|[^\w\s])|\s+")

# What happened to an answer's score: the most telling first, since a prompt is of one kind only
KINDS = (
    "worse after refining",
    "better after refining",
    "worse after training",
    "better after training",
    "no change",
    "not scored",
)


def shorten(text: str, most: int = SHOWN_CHARACTERS) -> tuple[str, int]:
    """The start of a text, and how many characters were left out."""
    return text[:most], max(0, len(text) - most)


def word_diff(before: str, after: str) -> list[tuple[str, str]]:
    """
    What turns one text into another, word by word.

    Returns:
        `list[tuple[str, str]]`: `("same" | "old" | "new", text)`. Without its old parts it is `after`; without its new parts it is `before`, up
        to white space.

    Example:

    ```python
    >>> word_diff("1 3 2", "1 2 3")
    [('same', '1'), ('new', ' 2'), ('same', ' 3'), ('old', ' 2')]
    ```
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    # Exact for a text of words; for thousands of signs, as a policy writes that has broken down, by what is rare in them
    texts = ([word.strip() for word in words] for words in (old, new))
    matcher = SequenceMatcher(None, *texts, autojunk=len(new) > EXACT_WORDS)
    parts = []
    for operation, i, k, j, m in matcher.get_opcodes():
        if operation == "equal":
            parts.append(("same", "".join(new[j:m])))
            continue
        dropped = "".join(old[i:k])
        if i == 0 < k < len(old):  # the first words: the space after them goes with them
            dropped += old[k][: -len(old[k].lstrip()) or None]
        parts += [(kind, text) for kind, text in (("old", dropped), ("new", "".join(new[j:m]))) if text]
    return parts


def kind_of(first: list[float | None], last: list[float | None], correct_score: float | None) -> str:
    """
    One of [`KINDS`]: what refining did to the last policy's answers, or else what training did to the direct answer. With a
    `correct_score`, only right and wrong count.
    """

    def worth(score: float) -> float:
        return score if correct_score is None else float(score >= correct_score)

    def compared(old: float | None, new: float | None, by: str) -> str | None:
        if old is None or new is None or worth(old) == worth(new):
            return None
        return f"{'better' if worth(new) > worth(old) else 'worse'} after {by}"

    if not last or last[0] is None:
        return "not scored"
    trained = compared(first[0], last[0], "training") if first else None
    return compared(last[0], last[-1], "refining") or trained or "no change"


def choose(kinds: list[str], seed: int, count: int = SAMPLES) -> list[int]:
    """Which prompts to show: some of each kind in turn, drawn with a seed, in the order of the kinds."""
    by_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in KINDS}
    for kind, indices in by_kind.items():
        random.Random(f"{seed} {kind}").shuffle(indices)
    ranked = [(place, KINDS.index(kind), i) for kind, indices in by_kind.items() for place, i in enumerate(indices)]
    chosen = sorted(ranked)[:count]
    return [i for _, _, i in sorted(chosen, key=lambda entry: (entry[1], entry[0]))]


def samples(run: RunRecord) -> dict[str, Any]:
    """
    Prompts with the answers of the first and of the last evaluated policy.

    Returns:
        `dict`: `kinds`, the number of prompts of each; and `shown`, a list with `prompt_id`, `kind`, `messages`, `columns` (the prompt's other
        columns) and `policies`, each with its answers.
    """
    policies = list(dict.fromkeys([run.evaluated[0], run.evaluated[-1]]))
    first, last = policies[0], policies[-1]
    correct = last.metrics.get("correct_score")
    pairs = zip(first.scores, last.scores, strict=True)
    kinds = [kind_of(before if len(policies) > 1 else [], after, correct) for before, after in pairs]
    prompts = run.prompts()
    return {
        "kinds": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        "shown": [
            {
                "prompt_id": prompts[i]["prompt_id"],
                "kind": kinds[i],
                "messages": messages(prompts[i]["prompt"]),
                "columns": {
                    key: shorten(str(value)) for key, value in prompts[i].items() if key not in ("prompt", "prompt_id")
                },
                "policies": [{"name": policy.name, "answers": answers(policy, i, correct)} for policy in policies],
            }
            for i in choose(kinds, run.resolved["seed"])
        ],
    }


def messages(prompt: Any, most: int = SHOWN_CHARACTERS) -> list[dict[str, Any]]:
    """A prompt as messages; plain text has no role."""
    rows = [{"role": None, "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": row.get("role"), "text": shorten(str(row.get("content") or ""), most)} for row in rows]


def answers(policy: RoundRecord, index: int, correct_score: float | None) -> list[dict[str, Any]]:
    """y1, y2, ... of one prompt, each with what it changed in the answer before."""
    rows, before, score_before = [], None, None
    for answer, score in zip(policy.chains[index]["answers"], policy.scores[index], strict=False):
        text, left_out = shorten(answer["text"])
        rows.append(
            {
                "turn": answer["turn"],
                "score": score,
                "verdict": verdict(score, score_before, correct_score),
                "tokens": answer["tokens"],
                "truncated": answer["finish_reason"] == "length",
                "unchanged": text == before,
                "parts": [("same", text)] if before in (None, text) else word_diff(before, text),
                "left_out": left_out,
                "critique": shorten(answer["critique"]) if answer.get("critique") else None,
            }
        )
        before, score_before = text, score
    return rows


def verdict(score: float | None, before: float | None, correct_score: float | None) -> str | None:
    """ "right" or "wrong"; if these are not defined, whether an answer is "better" or "worse" than the one before."""
    if score is None:
        return None
    if correct_score is not None:
        return "right" if score >= correct_score else "wrong"
    return None if before is None or score == before else "better" if score > before else "worse"
