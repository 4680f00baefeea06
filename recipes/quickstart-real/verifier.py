"""
The quickstart's task on a real model: one sentence about a thing, under two constraints that a program can check, in the manner of IFEval
(https://huggingface.co/papers/2311.07911).
"""

import re


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


# kind -> whether an answer satisfies it
CHECKS = {
    "count": lambda answer, n: len(words(answer)) == int(n),
    "start": lambda answer, word: words(answer)[:1] == [word],
    "end": lambda answer, word: words(answer)[-1:] == [word],
    "include": lambda answer, word: word in words(answer),
    "mark": lambda answer, mark: answer.strip().endswith(mark),
    "capitals": lambda answer, _: answer == answer.upper() and bool(words(answer)),
}


def kept(answer: str, thing: str, constraints: list[dict[str, str]]) -> list[bool]:
    """Which constraints an answer satisfies; the first one is not written in the prompt: five to twenty words, about the thing."""
    about = 5 <= len(words(answer)) <= 20 and words(thing)[-1] in words(answer)
    return [about, *(CHECKS[c["kind"]](answer, c["value"]) for c in constraints)]


def share_kept(completions, thing, constraints, **kwargs) -> list[float]:
    """The share of constraints that each answer satisfies."""
    answers = zip(completions, thing, constraints, strict=True)
    return [sum(found) / len(found) for found in (kept(answer.strip(), *of_prompt) for answer, *of_prompt in answers)]
