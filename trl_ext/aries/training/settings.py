"""
The settings of a training: the trainer, the keys of its config, the policies that it starts from and is compared with, its rows.

In: the recipe and the run directory. Out: dataclasses; nothing is loaded, and neither torch nor TRL is imported.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import LOOP_KEYS, AriesConfig
from ..policies import Policy, is_skipped, learning_rate_factor, policy_after, product, start_policy
from ..run_dir import RunDir


@dataclass
class TrainerSettings:
    """
    Args:
        trainer (`str`):
            `"sft"`, or a value of `training.trainer`.
        config (`dict`):
            Keys of the trainer's config.
        objective_alpha (`float`, *optional*):
            α of the squared objective.
    """

    trainer: str
    config: dict[str, Any]
    objective_alpha: float | None = None


@dataclass
class Training:
    """
    Args:
        settings ([`TrainerSettings`]):
            The trainer, and how it trains.
        model (`dict`):
            Keys of TRL's `ModelConfig`.
        policy ([`~aries.policies.Policy`]), reference ([`~aries.policies.Policy`]):
            What is trained, and what it is compared with.
        rows (`Path`), output (`Path`):
            What it learns, and where the policy goes.
        max_dropped (`float`, *optional*):
            `health.max_dropped`.
        learning_rate_factor (`float`, *optional*, defaults to `1.0`):
            What the learning rate is multiplied by, after rounds that were rolled back.
        earlier (`list[Path]`, *optional*):
            Rows of earlier rounds, of which it learns those for refining too.
    """

    settings: TrainerSettings
    model: dict[str, Any]
    policy: Policy
    reference: Policy
    rows: Path
    output: Path
    max_dropped: float | None
    learning_rate_factor: float = 1.0
    earlier: list[Path] = field(default_factory=list)


def trainer_settings(config: AriesConfig, number: int, output_dir: str) -> TrainerSettings:
    """
    The trainer of a round, from the recipe's `training` section, or of the SFT, which is round 0, from its `sft` section.

    What a section does not set, the loop chooses: a seed for each round, no progress bars in the log, a loss logged as it is even if it is
    not a number, and room for whatever the engine can generate.
    """
    section = config.sft if number == 0 else config.training
    defaults = {
        "seed": config.seed + number,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "max_length": config.generation.max_model_len,
    }
    own = {key: value for key, value in section.items() if key not in ("dataset", *LOOP_KEYS)}
    keys = {**defaults, **own, "output_dir": output_dir}
    if number == 0:
        return TrainerSettings("sft", keys)
    return TrainerSettings(config.loop.trainer, keys, config.loop.alpha)


def training_of(run: RunDir, config: AriesConfig, number: int) -> Training:
    """A round's preference training, or the SFT, which is round 0."""
    round_dir = run.round(number)
    if number == 0:
        policy = reference = Policy(config.model["model_name_or_path"], None)
    else:
        policy = start_policy(run, config, number)
        reference = policy_after(run, config, 0) if config.loop.reference == "initial" else policy
    earlier = map(run.round, range(max(1, number - config.pairs.earlier_rounds), number))
    return Training(
        trainer_settings(config, number, str(round_dir.training)),
        config.model,
        policy,
        reference,
        rows=round_dir.sft if number == 0 else round_dir.pairs,
        output=product(round_dir, config),
        max_dropped=config.health.max_dropped,
        learning_rate_factor=learning_rate_factor(run, number),
        earlier=[round_.pairs for round_ in earlier if not is_skipped(round_)],
    )
