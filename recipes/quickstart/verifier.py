"""
Scorers of the quickstart: is the list of digits sorted?

In: a round's prompts and answers, with the `solution` column of the prompts file. Out: one score per answer, as in any TRL
reward function. The whole answer is compared word by word; nothing is searched for inside a longer text.
"""

Completion = str | list[dict[str, str]]


def _words(completion: Completion) -> list[str]:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.split()


def exact_match(prompts: list, completions: list[Completion], solution: list[str], **kwargs) -> list[float]:
    """
    Score an answer `1.0` when it is the solution, `0.0` otherwise.

    Args:
        prompts (`list`):
            Prompts of the answers; not used.
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Answers, as plain text or as messages, of which the last one counts.
        solution (`list[str]`):
            The sorted digits, separated by spaces.

    Returns:
        `list[float]`: One score per answer.

    Example:

    ```python
    >>> exact_match([None] * 2, ["1 1 3", [{"role": "assistant", "content": "1 3 1"}]], solution=["1 1 3", "1 1 3"])
    [1.0, 0.0]
    ```
    """
    return [
        float(_words(completion) == right.split()) for completion, right in zip(completions, solution, strict=True)
    ]


def partial_match(prompts: list, completions: list[Completion], solution: list[str], **kwargs) -> list[float]:
    """
    Score an answer by the share of its positions that are right, between `0.0` and `1.0`.

    The share is of the longer of answer and solution, so words missing and words too many both cost. Arguments are those of
    [`exact_match`].

    Example:

    ```python
    >>> partial_match([None] * 2, ["1 3 1 4", "1 1"], solution=["1 1 3 4", "1 1 3 4"])
    [0.5, 0.5]
    ```
    """
    scores = []
    for completion, right in zip(completions, solution, strict=True):
        got, want = _words(completion), right.split()
        scores.append(sum(a == b for a, b in zip(got, want, strict=False)) / max(len(got), len(want)))
    return scores
