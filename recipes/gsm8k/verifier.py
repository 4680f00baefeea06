"""
Scorer of the GSM8K recipes: is the final number right?

In: a round's prompts and answers, with the `solution` column that `prepare.py` writes. Out: one score per answer, as in any
TRL reward function. The final number is the one that the prompt asks for, after `####`, or in `\\boxed{}`; numbers elsewhere in an
answer do not count, so an answer that was cut off is wrong.
"""

import re
from decimal import Decimal


Completion = str | list[dict[str, str]]

FINAL_NUMBER = re.compile(r"(?:####|\\boxed\{)[\s*\\$]*(-?[\d,]*\.?\d+)")


def final_number(text: str) -> Decimal | None:
    """
    The last number after `####` or in a box, without its thousands separators.

    Example:

    ```python
    >>> final_number("4 + 996 = 1000\\n#### 1,000")
    Decimal('1000')
    ```
    """
    found = FINAL_NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def correct_number(prompts: list, completions: list[Completion], solution: list[str], **kwargs) -> list[float]:
    """
    Score an answer `1.0` when its final number is the solution, `0.0` otherwise.

    Args:
        prompts (`list`):
            Prompts of the answers; not used.
        completions (`list[str]` or `list[list[dict[str, str]]]`):
            Answers, as plain text or as messages, of which the last one counts.
        solution (`list[str]`):
            The right numbers.

    Returns:
        `list[float]`: One score per answer.

    Example:

    ```python
    >>> correct_number([None] * 3, ["So #### 18.0", "\\\\boxed{18}", "It is 18."], solution=["18"] * 3)
    [1.0, 1.0, 0.0]
    ```
    """
    texts = (completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions)
    return [float(final_number(text) == Decimal(right)) for text, right in zip(texts, solution, strict=True)]
