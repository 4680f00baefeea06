"""
Inputs: everything a recipe names and a run reads. It is opened before any work, so that missing files show early; hashes of local files
make sure that a run continues with the same ones.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launch import Launch
from ..model_files import model_files
from ..recipe import RecipeError
from .config import AriesConfig, DatasetConfig
from .data.faults import share_finding
from .data.prompts import Prompts, load_prompts, load_rows, prompts_per_round
from .data.records import sha256
from .data.sft import usable_sft_rows
from .generation.refinements import Strategy
from .scoring.verifier import verifier_file


@dataclass
class Inputs:
    """
    What a run reads.

    Args:
        prompts ([`~aries.data.prompts.Prompts`]), round_size (`int`):
            The prompts of all rounds, and how many a round takes.
        evaluation_prompts ([`~aries.data.prompts.Prompts`]):
            The held-out prompts.
        sft_rows (`list[dict]`), sft_dropped (`dict[str, int]`):
            The rows for SFT, if any, and how many cannot be used, by reason.
    """

    prompts: Prompts
    round_size: int
    evaluation_prompts: Prompts
    sft_rows: list[dict[str, Any]]
    sft_dropped: dict[str, int]

    @property
    def conversational(self) -> bool:
        """Whether the prompts are messages rather than text."""
        return not isinstance(self.prompts[0]["prompt"], str)


def read_inputs(config: AriesConfig) -> Inputs:
    """
    Open what the recipe names.

    Raises:
        [`RecipeError`]: something is missing or cannot be used.
    """
    check_sources(config)
    Strategy(config.refinements)  # a broken template shows before a million prompts are read
    for scorer in config.all_scorers:
        if scorer.verifier is not None:
            verifier_file(scorer.verifier)
    prompts = load_prompts(config.prompts.entries(), "prompts.dataset")
    round_size = prompts_per_round(len(prompts), config.prompts.per_round, config.rounds)
    evaluation_prompts = load_prompts(config.evaluation.entries(), "evaluation.dataset", config.evaluation.samples)
    sft_rows, sft_dropped = read_sft_rows(config) if config.sft else ([], {})
    return Inputs(prompts, round_size, evaluation_prompts, sft_rows, sft_dropped)


def check_sources(config: AriesConfig) -> None:
    """
    Raises:
        [`RecipeError`]: training and evaluation read the same file, which has no splits, or the same split of a dataset.
    """
    evaluated = [_source(entry) for entry in config.evaluation.entries()]
    sections = {"prompts": config.prompts.entries(), "evaluation": config.evaluation.entries()}
    if config.sft:
        sections["sft"] = [DatasetConfig(config.sft["dataset"])]
    for section, entries in sections.items():
        for entry in entries:
            if _source(entry)[0] == "file" and "[" in entry.split:
                raise RecipeError(
                    f"`{section}`: `split: {entry.split}` has no effect on {entry.path}, since a file has no splits. Split it into two "
                    "files, or name a directory or a dataset on the Hub."
                )
            if section != "evaluation" and _source(entry) in evaluated:
                raise RecipeError(
                    f"`{section}` and `evaluation` both name {entry.path}"
                    + (", and a file has no splits" if _source(entry)[0] == "file" else f", split {entry.split!r}")
                    + ": the policy would be evaluated on its training data. Split it into two files, or name another split."
                )


def _source(entry: DatasetConfig) -> tuple:
    """Identifies the rows that an entry stands for."""
    path = Path(entry.path).expanduser()
    if os.path.isfile(path):
        return "file", path.resolve()
    others = [f"{key}={value}" for key, value in vars(entry).items() if key not in ("path", "columns", "fraction")]
    return "dataset", path.resolve() if os.path.isdir(path) else entry.path, *others


def read_sft_rows(config: AriesConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows that can be used, and how many cannot, by reason."""
    dataset = config.sft["dataset"]
    rows = load_rows(DatasetConfig(dataset), "sft.dataset")
    usable, dropped = usable_sft_rows(rows, dataset)
    finding = share_finding("rows of `sft.dataset`", dropped, len(rows), config.health)
    if finding or not usable:
        raise RecipeError(f"`sft.dataset`: {finding or 'no row can be used'}. Check {dataset}, or raise the bound.")
    return usable, dropped


def local_inputs(config: AriesConfig, launch: Launch | None) -> dict[str, Path | None]:
    """Local paths that the recipe reads, by the key that names them; `None` for what is not on this machine."""
    named = {
        "model.model_name_or_path": config.model["model_name_or_path"],
        **named_data("prompts", config.prompts.entries()),
        **named_data("evaluation", config.evaluation.entries()),
        "sft.dataset": config.sft["dataset"] if config.sft else "",
        "training.accelerate_config": "" if launch is None else launch.config_file,
    }
    for section, scores in (("scores", config.scores), ("evaluation.scores", config.evaluation.scores)):
        for scorer in [] if scores is None else scores.each():
            one = scores.scorers is None
            key = f"{section}.{scorer.kinds()[0]}" if one else f"{section}.scorers.{scorer.name}"
            if scorer.verifier is not None:
                named[key] = scorer.verifier.rpartition(":")[0]
            if scorer.reward_model is not None:
                named[key] = scorer.reward_model
    paths = {key: Path(name).expanduser() for key, name in named.items() if name}
    return {key: path if path.exists() else None for key, path in paths.items()}


def input_hashes(inputs: dict[str, Path | None]) -> dict[str, str | None]:
    """SHA-256 of what [`local_inputs`] found; for a model's directory, of the files it is loaded from."""
    return {
        key: None if path is None else sha256(path, model_files(path) if (path / "config.json").exists() else None)
        for key, path in inputs.items()
    }


def named_data(section: str, entries: list[DatasetConfig]) -> dict[str, str]:
    """What a section's datasets name that may be a local path, by key."""
    if len(entries) == 1 and not entries[0].data_files and not entries[0].data_dir:
        return {f"{section}.dataset": entries[0].path}
    named = {}
    for index, entry in enumerate(entries):
        key = f"{section}.datasets[{index}]"
        files = entry.data_files or []
        files = [files] if isinstance(files, str) else files.values() if isinstance(files, dict) else files
        named |= {f"{key}.path": entry.path, f"{key}.data_dir": entry.data_dir or ""}
        named |= {f"{key}.data_files[{number}]": file for number, file in enumerate(files)}
    return named
