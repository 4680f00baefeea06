"""
Scores: a number for every answer, from a verifier (a Python function the recipe names) or a reward model.

A scorer has TRL's reward-function signature, `(prompts, completions, **columns) -> list[float | None]`; `None` leaves an
answer without a score.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..recipe import RecipeError
from .children import child_main
from .records import Chain, as_completion, read_jsonl, write_jsonl


Scorer = Callable[..., list[float | None]]


def load_verifier(reference: str) -> Scorer:
    """
    Import `path/to/file.py:function`, from that file and nowhere else.

    Raises:
        [`RecipeError`]: no such file or function, or the file fails to import.
    """
    file, separator, name = reference.rpartition(":")
    path = Path(file)
    if not separator or not path.is_file():
        raise RecipeError(
            f"`scores.verifier`: {reference!r} names no file (looked in {Path.cwd()}). Write `path/to/file.py:function`."
        )
    spec = importlib.util.spec_from_file_location(f"trl_ext_verifier_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code: whatever it raises is reported with its place
        raise RecipeError(f"`scores.verifier`: importing {path} failed: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    if name not in functions:
        raise RecipeError(f"`scores.verifier`: {path} has no function `{name}`; it has {functions}.")
    return getattr(module, name)


def no_scores(prompts, completions, **columns) -> list[None]:
    """The scorer of rule-based runs: every answer stays without a score."""
    return [None] * len(completions)


def score_chains(chains: list[Chain], prompts: list[dict[str, Any]], scorer: Scorer) -> list[dict[str, Any]]:
    """
    Score every answer of every chain, in one call of the scorer.

    Args:
        chains (`list[Chain]`), prompts (`list[dict]`):
            The answers, and the prompt rows they belong to, whose other columns go to the scorer.
        scorer (`Callable`):
            TRL's reward-function signature.

    Returns:
        `list[dict]`: a row per chain with `prompt_id` and `scores`, one per answer.

    Raises:
        [`RecipeError`]: the scorer raises, returns another number of scores, or one that is not a finite number.
    """
    rows = {row["prompt_id"]: row for row in prompts}
    answers = [(chain, answer) for chain in chains for answer in chain.answers]
    columns = sorted({key for row in prompts for key in row} - {"prompt", "prompt_id"})
    try:
        scores = scorer(
            prompts=[chain.prompt for chain, _ in answers],
            completions=[as_completion(chain.prompt, answer.text) for chain, answer in answers],
            **{column: [rows[chain.prompt_id].get(column) for chain, _ in answers] for column in columns},
        )
    except Exception as error:  # user code: whatever it raises is reported with its place
        raise RecipeError(
            f"the scorer `{scorer.__name__}` raised {type(error).__name__}: {error}. It is called as "
            f"{scorer.__name__}(prompts=[...], completions=[...], {', '.join(f'{c}=[...]' for c in columns)}); add "
            "`**kwargs` for the columns it does not use."
        ) from error
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        found = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
        raise RecipeError(
            f"the scorer `{scorer.__name__}` returned {found} for {len(answers)} answers. Return a list."
        )
    by_chain: dict[str, list[float | None]] = {chain.prompt_id: [] for chain in chains}
    for (chain, answer), score in zip(answers, scores, strict=True):
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise RecipeError(
                f"the scorer `{scorer.__name__}` returned {score!r} for answer {answer.turn} of {chain.prompt_id}. Return a "
                "finite number, or None to leave an answer without a score."
            )
        by_chain[chain.prompt_id].append(None if score is None else float(score))
    return [{"prompt_id": chain.prompt_id, "scores": by_chain[chain.prompt_id]} for chain in chains]


def load_chains(prompts: list[dict[str, Any]], answers: Path) -> list[Chain]:
    rows = {row["prompt_id"]: row for row in read_jsonl(answers)}
    return [Chain.from_row(rows[row["prompt_id"]], row["prompt"]) for row in prompts]


def reward_model_scorer(name: str, batch_size: int, progress: Callable[[int, int], None]) -> Scorer:
    """A sequence-classification model with one output, through transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto").to(device).eval()
    if model.config.num_labels != 1:
        raise RecipeError(
            f"`scores.reward_model`: {name} has {model.config.num_labels} outputs, and a reward model has one."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def reward_model(prompts, completions, **columns) -> list[float]:
        texts = [
            p + c if isinstance(p, str) else tokenizer.apply_chat_template(p + c, tokenize=False)
            for p, c in zip(prompts, completions, strict=True)
        ]
        # A rendered template already has its special tokens
        special = {"add_special_tokens": bool(prompts) and isinstance(prompts[0], str)}
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt", **special)
            scores += model(**batch.to(device)).logits[:, 0].float().tolist()
            progress(len(scores), len(texts))
        return scores

    return reward_model


def main(job: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    """The child process of a reward model: scores the chains of each task."""
    scorer = reward_model_scorer(job["reward_model"], job["batch_size"], progress)
    for task in job["tasks"]:
        prompts = read_jsonl(Path(task["prompts"]))
        chains = load_chains(prompts, Path(task["answers"]))
        write_jsonl(Path(task["scores"]), score_chains(chains, prompts, scorer))


if __name__ == "__main__":
    child_main(main)
