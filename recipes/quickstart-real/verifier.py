"""
The task of the quickstart on a real model: one sentence about a thing that keeps to two constraints, each of which a program can check, in the
manner of IFEval (https://huggingface.co/papers/2311.07911).
"""

import re


Constraint = dict[str, str]  # `kind` and `value`


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


# Kind of constraint -> whether an answer keeps to it
CHECKS = {
    "start": lambda answer, word: words(answer)[:1] == [word],
    "end": lambda answer, word: words(answer)[-1:] == [word],
    "include": lambda answer, word: word in words(answer),
    "count": lambda answer, number: len(words(answer)) == int(number),
    "mark": lambda answer, mark: answer.endswith(mark),
    "capitals": lambda answer, _: answer.isupper(),
}


def is_about(answer: str, thing: str) -> bool:
    """Whether an answer is one line of 5 to 20 words that names the thing, by its last word."""
    return "\n" not in answer and 5 <= len(words(answer)) <= 20 and words(thing)[-1] in words(answer)


def kept(answer: str, constraints: list[Constraint]) -> list[bool]:
    """Which of the constraints an answer keeps to."""
    return [CHECKS[constraint["kind"]](answer, constraint["value"]) for constraint in constraints]


def share_kept(completions: list[str], thing: list[str], constraints: list[list[Constraint]], **kwargs) -> list[float]:
    """
    Score an answer by the share of its constraints that it keeps to; `0.0` if it is no sentence about the thing.

    Args:
        completions (`list[str]`):
            Answers. Space around them does not count.
        thing (`list[str]`), constraints (`list[list[dict]]`):
            Columns of the prompts.

    Returns:
        `list[float]`: One score per answer.

    Example:

    ```python
    >>> asked = [{"kind": "start", "value": "today"}, {"kind": "count", "value": "6"}]
    >>> share_kept([" Today the old river sings again.", " Today the river sings."], ["river"] * 2, [asked] * 2)
    [1.0, 0.0]
    ```
    """
    scores = []
    for completion, about, asked in zip(completions, thing, constraints, strict=True):
        answer = completion.strip()
        found = kept(answer, asked)
        scores.append(sum(found) / len(found) if is_about(answer, about) else 0.0)
    return scores
