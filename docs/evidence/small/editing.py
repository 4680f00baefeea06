"""
A task on which a refinement has to read the draft: twelve digits to sort, of which an answer does a part and the next one goes on.

An edit is some passes of bubble sort over a list, four or two. SFT teaches to answer a question with one edit of its digits, and to refine
a draft with one edit of the draft, so that an answer is as sorted as its draft and one edit make it. Model, tokenizer and prompts are the
quickstart's.
"""

import random
from pathlib import Path

from .quickstart_task import prepare as quickstart


DIGITS = 12


def edit(digits: list[str], passes: int) -> list[str]:
    """So many passes of bubble sort: of neighbours in the wrong order, the greater one is carried on."""
    digits = list(digits)
    for _ in range(passes):
        for i in range(len(digits) - 1):
            if digits[i] > digits[i + 1]:
                digits[i], digits[i + 1] = digits[i + 1], digits[i]
    return digits


def sft_rows(
    rng: random.Random, questions: list[list[str]], passes: int, count: int, direct_share: float
) -> list[dict]:
    """Questions with one edit of their digits, and drafts that 1 to 5 edits have made, with one edit more."""
    rows = []
    for index in range(count):
        question = questions[index % len(questions)]
        draft = None if rng.random() < direct_share else edit(question, passes * rng.randint(1, 5))
        target = edit(draft or question, passes)
        rows.append(
            {
                "prompt": quickstart.user_message(question),
                "completion": [{"role": "assistant", "content": " ".join(target)}],
                "draft": draft and " ".join(draft),
            }
        )
    return rows


def prepare(output: Path, seed: int, passes: int, sft: int, train: int = 6000, evaluation: int = 500) -> None:
    """The files of the quickstart's `prepare.py`, with these SFT rows."""
    tokenizer = quickstart.build_tokenizer()
    quickstart.build_model(tokenizer, seed).save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    rng = random.Random(seed)
    everything = quickstart.problems(rng, DIGITS, 4000 + train + evaluation)
    quickstart.write_jsonl(output / "sft.jsonl", sft_rows(rng, everything[:4000], passes, sft, direct_share=0.3))
    quickstart.write_jsonl(output / "train.jsonl", quickstart.prompt_rows(everything[4000 : 4000 + train]))
    quickstart.write_jsonl(output / "eval.jsonl", quickstart.prompt_rows(everything[4000 + train :]))
