"""
Chosen answers: which answer of a chain is returned, and the file that it is written to.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import RefineConfig, SettledConfig
from ..data.disk import writing
from ..data.pairs import agree
from ..data.records import Chain, read_rows, write_json, write_jsonl
from ..scoring.scores import read_chains
from .answers import alpaca_eval_rows, message_rows
from .work_dir import WorkDir


# Of the output
FORMATS = ("jsonl", "messages", "alpaca_eval")


def choose(chain: Chain, scores: list[float | None], select: str, pairs: SettledConfig) -> int | None:
    """
    Index of the chosen answer. One that was cut off by `max_tokens`, or is empty, is chosen only if all are; among equal scores the latest
    is. Without a settled answer the rule takes the last one. `None` if there is no answer, or with `select="all"`.

    Example:

    ```python
    >>> chain = Chain("p-1", "x", [Answer(1, "1 2", 2, "stop"), Answer(2, "1 2", 2, "stop"), Answer(3, "2 1", 2, "stop")])
    >>> [choose(chain, [0.5, 1.0, 0.0], select, SettledConfig()) for select in ("last", "scores", "rule")]
    [2, 1, 1]
    ```
    """
    answers = chain.answers
    if not answers or select == "all":
        return None
    whole = [i for i, answer in enumerate(answers) if answer.finish_reason == "stop" and answer.text.strip()]
    whole = whole or list(range(len(answers)))
    if select == "scores":
        return max(whole, key=lambda i: (scores[i] is not None, scores[i] or 0.0, i))
    if select == "rule":
        before = pairs.agreement - 1
        settled = [
            i for i in whole if i >= before and all(agree(a, answers[i], pairs) for a in answers[i - before : i])
        ]
        return (settled or whole)[-1]
    return whole[-1]


Choice = tuple[dict[str, Any], Chain, list[float | None], int | None]


def choices(work: WorkDir, config: RefineConfig) -> Iterator[Choice]:
    """Of each prompt: its row, its chain, the scores of the answers, and the index of the chosen one."""
    scored = read_rows(work.scores) if config.scores.each() else None
    for prompt, chain in read_chains(work.prompts, work.answers):
        scores = [None] * len(chain.answers) if scored is None else next(scored)["scores"]
        yield prompt, chain, scores, choose(chain, scores, config.select, config.pairs)


def full_row(choice: Choice) -> dict[str, Any]:
    """A prompt with the chosen answer, its turn and its score, and all answers, each with its score."""
    _, chain, scores, index = choice
    chosen: tuple[str | None, int | None, float | None] = (None, None, None)
    if index is not None:
        chosen = (chain.answers[index].text, chain.answers[index].turn, scores[index])
    made = chain.to_row()
    made["answers"] = [answer | {"score": score} for answer, score in zip(made["answers"], scores, strict=True)]
    return {
        "prompt_id": made.pop("prompt_id"),
        "prompt": chain.prompt,
        **dict(zip(("answer", "turn", "score"), chosen, strict=True)),
        **made,
    }


def formatted(made: Iterator[Choice], file_format: str, name: str, select: str) -> Iterator[dict[str, Any]]:
    """Rows of a file in one of [`FORMATS`]; with `select="all"`, the last two have a row for each answer."""
    for choice in made:
        prompt, chain, _, index = choice
        if file_format == "jsonl":
            yield full_row(choice)
            continue
        for i in range(len(chain.answers)) if select == "all" else [] if index is None else [index]:
            one = Chain(chain.prompt_id, chain.prompt, [chain.answers[i]])
            generator = f"{name}-y{i + 1}" if select == "all" else f"{name}-{select}"
            if file_format == "messages":
                yield from message_rows([one], 1, generator)
            else:
                yield from alpaca_eval_rows([one], [prompt], 1, generator)


def write_output(work: WorkDir, config: RefineConfig, output: Path, file_format: str, name: str) -> None:
    rows = formatted(choices(work, config), file_format, name, config.select)
    with writing(output):
        if file_format == "alpaca_eval":
            write_json(output, list(rows))
        else:
            write_jsonl(output, rows)


def summary(work: WorkDir, config: RefineConfig) -> str:
    """How many of the answers of each turn were chosen, their mean scores, and how many prompts have none."""
    chosen, means, empty = Counter(), {}, 0
    for _, chain, scores, index in choices(work, config):
        empty += not chain.answers
        if index is not None:
            chosen[index + 1] += 1
        for turn, score in enumerate(scores, start=1):
            if score is not None:
                means.setdefault(turn, []).append(score)
    parts = ["chosen: " + ", ".join(f"y{turn} {chosen[turn]:,}" for turn in sorted(chosen))] if chosen else []
    if means:
        parts.append("mean scores: " + ", ".join(f"y{t} {sum(s) / len(s):.3g}" for t, s in sorted(means.items())))
    parts += [f"{empty:,} prompts have no answer"] if empty else []
    return "; ".join(parts)
