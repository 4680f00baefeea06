"""
Makes the prompts of the GSM8K recipes from `openai/gsm8k` (https://huggingface.co/datasets/openai/gsm8k, MIT licence).

    python recipes/gsm8k/prepare.py --output recipes/gsm8k/build

Out: train.jsonl (7,473 rows) and test.jsonl (1,319 rows), each with `prompt`, one user message, and `solution`, the final number of
the dataset's answer. Its worked solutions are left out: the policy learns from its own.
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset


INSTRUCTION = "Reason step by step. End with a line that has #### and the final number alone, such as #### 42"


def prompt_row(question: str, answer: str) -> dict:
    """
    Example:

    ```python
    >>> prompt_row("What is 2 + 2?", "2 + 2 = <<2+2=4>>4\\n#### 4")["solution"]
    '4'
    ```
    """
    _, separator, solution = answer.rpartition("####")
    if not separator:
        raise ValueError(f"the answer to {question!r} has no line with ####: this is not GSM8K's format.")
    return {
        "prompt": [{"role": "user", "content": f"{question.strip()}\n\n{INSTRUCTION}"}],
        "solution": solution.strip().replace(",", ""),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the prompts of the GSM8K recipes.")
    parser.add_argument("--dataset", default="openai/gsm8k", help="its id on the Hub, or a directory with a copy")
    parser.add_argument("--output", type=Path, default=Path("recipes/gsm8k/build"))
    args = parser.parse_args(argv)
    # A directory has no configurations
    name = None if Path(args.dataset).is_dir() else "main"
    args.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [prompt_row(row["question"], row["answer"]) for row in load_dataset(args.dataset, name, split=split)]
        path = args.output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
