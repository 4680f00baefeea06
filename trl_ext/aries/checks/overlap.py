"""
Overlap: whether the evaluation prompts are held out. Counts those that training or SFT sees too, and repeated rows.

Two hashes of each prompt are kept, and no text. Prompts are compared as they are ("exactly"), and ignoring case and white space
("folded"), which includes the former. Paraphrases are not recognised.
"""

import json
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np

from ..data.records import Prompt, read_json
from ..run_dir import RunDir


FORMS = ("exactly", "folded")


def count_overlap(
    prompts: Iterable[dict[str, Any]], evaluation: Iterable[dict[str, Any]], sft: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """
    Count overlaps and repetitions. Rows have a `prompt`; those of SFT also a `completion` and maybe a `draft`.

    Returns:
        `dict`: `evaluation_prompts`, their number; how many of them are `in_prompts` and `in_sft`; and the rows that repeat an earlier one:
        `repeated_prompts`, `repeated_evaluation_prompts` and `repeated_sft_rows` (prompt, draft and completion). All but the first are counted
        `exactly` and `folded`.

    Example:

    ```python
    >>> count_overlap([{"prompt": "2 + 2 = ?"}], [{"prompt": "2 + 2  = ?"}, {"prompt": "Why?"}], [])["in_prompts"]
    {'exactly': 0, 'folded': 1}
    ```
    """
    trained, held, targets, sft_prompts = ({form: array("Q") for form in FORMS} for _ in range(4))
    for rows, hashes in ((prompts, trained), (evaluation, held)):
        for row in rows:
            _add(hashes, row["prompt"])
    for row in sft:
        _add(sft_prompts, row["prompt"])
        _add(targets, row["prompt"], row.get("draft"), row["completion"])
    return {
        "evaluation_prompts": len(held["exactly"]),
        "in_prompts": {form: _common(held[form], trained[form]) for form in FORMS},
        "in_sft": {form: _common(held[form], sft_prompts[form]) for form in FORMS},
        "repeated_prompts": {form: _repeated(trained[form]) for form in FORMS},
        "repeated_evaluation_prompts": {form: _repeated(held[form]) for form in FORMS},
        "repeated_sft_rows": {form: _repeated(targets[form]) for form in FORMS},
    }


def _add(hashes: dict[str, array], *parts: Prompt | None) -> None:
    texts = [_text(part) for part in parts]
    for form, said in (("exactly", texts), ("folded", [" ".join(text.casefold().split()) for text in texts])):
        digest = blake2b("\0".join(said).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        hashes[form].append(int.from_bytes(digest, "little"))


def _text(prompt: Prompt | None) -> str:
    """All that is said in a prompt. A single user message counts as its text."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    turns = [(message["role"], message["content"]) for message in prompt]
    if len(turns) == 1 and turns[0][0] == "user" and isinstance(turns[0][1], str):
        return turns[0][1]
    return json.dumps(turns, default=str)


def _common(hashes: array, others: array) -> int:
    return (
        int(np.isin(np.frombuffer(hashes, np.uint64), np.frombuffer(others, np.uint64)).sum())
        if hashes and others
        else 0
    )


def _repeated(hashes: array) -> int:
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) if hashes else 0


def overlap_lines(found: dict[str, Any]) -> list[str]:
    """What [`count_overlap`] found, in words; empty without a finding."""
    total = found["evaluation_prompts"]
    lines = [
        f"{found[key]['folded']:,} of {total:,} evaluation prompts are also {where} ({found[key]['exactly']:,} of them exactly, the others "
        "ignoring case and white space): their scores do not show how the policy answers unseen prompts"
        for key, where in (("in_prompts", "among the training prompts"), ("in_sft", "among the SFT prompts"))
        if found[key]["folded"]
    ]
    for key, rows in (
        ("repeated_prompts", "training prompts repeat an earlier one"),
        ("repeated_evaluation_prompts", "evaluation prompts repeat an earlier one, and count twice"),
        ("repeated_sft_rows", "SFT rows repeat an earlier one"),
    ):
        if found[key]["folded"]:
            lines.append(f"{found[key]['folded']:,} {rows} ({found[key]['exactly']:,} exactly)")
    return lines


def prompts_kind(run: RunDir) -> str:
    """
    What to call a run's evaluation prompts: `"held-out"` if none was found among the training prompts, else `"evaluation"`.
    """
    found = read_json(run.overlap)
    return "held-out" if found and not (found["in_prompts"]["folded"] or found["in_sft"]["folded"]) else "evaluation"
