"""
`trl-ext aries init`: a directory with a task that runs as it stands, to be replaced file by file with one's own.

The task is one that a program can check: to put five words in alphabetical order. Its rows are made here, the same ones every time; the
recipe, the verifier and the README are the templates beside this file.
"""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..outputs import check_new


DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
WORDS = """\
apple bridge candle dragon engine forest garden harbor island jacket kettle ladder market needle orange pencil quarry river sailor
temple umbrella valley window yellow anchor bottle castle desert eagle fabric guitar hammer insect jungle kitten lemon mirror nephew
oyster parrot quiver rocket silver tunnel uncle violet wizard zebra""".split()
WORDS_OF_A_PROMPT = 5
# Rows of each file. No two prompts have the same words.
SFT_ROWS, PROMPTS, EVALUATION_PROMPTS = 128, 192, 48


def init(directory: Path, model: str = DEFAULT_MODEL, text: bool = False) -> int:
    """
    Write the task's files into a new directory, and print what to type next.

    Args:
        directory (`Path`):
            The directory to make.
        model (`str`, *optional*, defaults to `"Qwen/Qwen2.5-0.5B-Instruct"`):
            Path or id of the model to train.
        text (`bool`, *optional*, defaults to `False`):
            Whether prompts are plain text, for a model without a chat template, and not messages.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`~recipe.RecipeError`]: the directory exists and is not empty.
    """
    check_new(directory, "init")
    values = {"directory": directory.as_posix(), "name": directory.resolve().name, "model": model, "text": text}
    values |= {"gpu": has_gpu(), "rounds": 2, "per_round": PROMPTS // 2}
    templates = Environment(
        loader=PackageLoader("trl_ext.new_task", ""),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "verifier.py", "README.md"):
        rendered = templates.get_template(f"{name}.jinja").render(values)
        (directory / name).write_text(rendered, encoding="utf-8")
    for name, rows in make_rows(text).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(lines, encoding="utf-8")
    print((directory / "README.md").read_text(encoding="utf-8"), end="")  # noqa: T201
    return 0


def has_gpu() -> bool:
    """Whether `nvidia-smi` lists a GPU, as `make install` asks it."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def make_rows(text: bool) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, by its name."""
    problems = make_problems()
    sft = []
    for index, (words, ordered) in enumerate(islice(problems, SFT_ROWS // 2)):
        draft = list(ordered)
        at = index % (WORDS_OF_A_PROMPT - 1)
        draft[at], draft[at + 1] = draft[at + 1], draft[at]
        row = {"prompt": as_prompt(words, text), "completion": as_completion(ordered, text)}
        row |= {"answer": ", ".join(ordered)}  # with it, `try-verifier` can score the rows
        sft += [row, row | {"draft": ", ".join(draft)}]
    prompts, evaluation = (
        [
            {"prompt": as_prompt(words, text), "answer": ", ".join(ordered)}
            for words, ordered in islice(problems, count)
        ]
        for count in (PROMPTS, EVALUATION_PROMPTS)
    )
    return {"sft.jsonl": sft, "prompts.jsonl": prompts, "evaluation.jsonl": evaluation}


def make_problems() -> Iterator[tuple[list[str], list[str]]]:
    """Words in any order and in the right one, without end; no set of words comes twice."""
    generator, seen = random.Random(0), set()
    while True:
        words = generator.sample(WORDS, WORDS_OF_A_PROMPT)
        ordered = sorted(words)
        if words != ordered and tuple(ordered) not in seen:
            seen.add(tuple(ordered))
            yield words, ordered


def as_prompt(words: list[str], text: bool) -> str | list[dict[str, str]]:
    if text:
        return f"Words: {', '.join(words)}\nIn alphabetical order:"
    return [{"role": "user", "content": f"Put these words in alphabetical order: {', '.join(words)}."}]


def as_completion(ordered: list[str], text: bool) -> str | list[dict[str, str]]:
    answer = ", ".join(ordered)
    return f" {answer}" if text else [{"role": "assistant", "content": answer}]
