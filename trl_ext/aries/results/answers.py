"""
Answers: one turn of a round's evaluation answers, in the formats of judges and other tools. Texts are written as they were generated.
"""

from pathlib import Path
from typing import Any

from ...outputs import check_new
from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.disk import DiskError
from ..data.records import Chain, Prompt, read_jsonl, write_json, write_jsonl
from ..provenance import check_file
from ..run_dir import RunDir
from ..scoring.scores import load_chains
from .progress import RunProgress
from .state import chosen_round


def export_answers(config: AriesConfig, number: int | str | None, turn: int, file_format: str, output: Path) -> int:
    """
    Write the answers of a turn (1 is the direct answer) as `"alpaca_eval"` or `"jsonl"` to a new file, and return the exit code, 0.

    Raises:
        [`RecipeError`]: there is no such round or turn, its answers are not what the run made, or the file exists or cannot be written.
    """
    for path in (output, output.with_name(output.name + ".tmp")):  # what it is called while it is written
        check_new(path)
    run = RunDir(Path(config.output_dir))
    evaluated = [n for n in range(config.rounds + 1) if run.round(n).evaluation.exists()]
    number = chosen_round(run, config, number, evaluated, "evaluated")
    if not 1 <= turn <= config.refinements.turns:
        raise RecipeError(
            f"`--turn` must be between 1, the direct answer, and {config.refinements.turns}; got {turn}."
        )
    check_file(run, number, run.round(number).evaluation)
    prompts = read_jsonl(run.evaluation_prompts)
    chains = load_chains(prompts, run.round(number).evaluation)
    generator = f"{run.path.name}-round-{number}-y{turn}"
    try:
        if file_format == "alpaca_eval":
            write_json(output, alpaca_eval_rows(chains, prompts, turn, generator))
        else:
            write_jsonl(output, message_rows(chains, turn, generator))
    except DiskError as error:
        raise RecipeError(f"`--output`: {error}") from error
    except OSError as error:
        raise RecipeError(f"`--output`: cannot write {output}: {error.strerror}.") from error
    ended = sum(len(chain.answers) < turn for chain in chains)
    missing = f"; {ended:,} chains ended before y{turn} and have none" if ended else ""
    RunProgress(config.rounds).say(f"{len(chains) - ended:,} answers y{turn} of round {number} in {output}{missing}")
    return 0


def alpaca_eval_rows(
    chains: list[Chain], prompts: list[dict[str, Any]], turn: int, generator: str
) -> list[dict[str, str]]:
    """
    AlpacaEval's model outputs: `instruction`, `output`, `generator`, and `dataset` if the prompts have this column.

    Example:

    ```python
    >>> chain = Chain("p-1", [{"role": "user", "content": "Hi"}], [Answer(1, "Hello.", 2, "stop")])
    >>> alpaca_eval_rows([chain], [{"prompt_id": "p-1", "prompt": chain.prompt}], turn=1, generator="mine")
    [{'instruction': 'Hi', 'output': 'Hello.', 'generator': 'mine'}]
    ```
    """
    return [
        {
            "instruction": question(chain.prompt),
            "output": chain.answers[turn - 1].text,
            "generator": generator,
            **({"dataset": row["dataset"]} if "dataset" in row else {}),
        }
        for chain, row in zip(chains, prompts, strict=True)
        if len(chain.answers) >= turn
    ]


def message_rows(chains: list[Chain], turn: int, generator: str) -> list[dict[str, Any]]:
    """Whole conversations as `messages`, with `prompt_id` and `generator`. Plain text becomes a user message."""
    return [
        {
            "prompt_id": chain.prompt_id,
            "messages": [
                *([{"role": "user", "content": chain.prompt}] if isinstance(chain.prompt, str) else chain.prompt),
                {"role": "assistant", "content": chain.answers[turn - 1].text},
            ],
            "generator": generator,
        }
        for chain in chains
        if len(chain.answers) >= turn
    ]


def question(prompt: Prompt) -> str:
    """The last user message, or the whole plain-text prompt."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
