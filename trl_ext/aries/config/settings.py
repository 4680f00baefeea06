"""
What a recipe resolves to, for each turn of a chain and for each training.
"""

from dataclasses import replace
from typing import Any

from .generation import SAMPLING_KEYS, STOP_KEYS, DraftsConfig
from .run import LOOP_KEYS, AriesConfig


def sampling_by_turn(config: AriesConfig) -> list[DraftsConfig]:
    """
    Sampling of the answers y1, y2, ...: the drafts', unless `refinements` says something else.
    """
    sampling = [config.drafts]
    for index in range(config.refinements.turns - 1):
        values = {key: getattr(config.refinements, key) for key in SAMPLING_KEYS}
        own = {key: value[index] if isinstance(value, list) else value for key, value in values.items()}
        own |= {key: getattr(config.refinements, key) for key in STOP_KEYS}
        sampling.append(replace(config.drafts, **{key: value for key, value in own.items() if value is not None}))
    return sampling


def loop_settings(config: AriesConfig, number: int) -> dict[str, Any]:
    """
    Keys that a trainer's section may set and otherwise takes from the loop: a seed of the round's own, no progress bars in
    the log, a loss that is NaN logged as NaN, and room for whatever the engine can generate.
    """
    return {
        "seed": config.seed + number,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "max_length": config.generation.max_model_len,
    }


def trainer_settings(config: AriesConfig, number: int, output_dir: str) -> dict[str, Any]:
    """Trainer of a round and the keys of its config, from the recipe's `training` section."""
    settings = {key: value for key, value in config.training.items() if key not in LOOP_KEYS}
    return {
        "trainer": config.loop.trainer,
        "objective_alpha": config.loop.alpha,
        "config": {**loop_settings(config, number), **settings, "output_dir": output_dir},
    }


def sft_settings(config: AriesConfig, output_dir: str) -> dict[str, Any]:
    """The same for the recipe's `sft` section."""
    settings = {key: value for key, value in config.sft.items() if key != "dataset"}
    return {
        "trainer": "sft",
        "config": {**loop_settings(config, 0), **settings, "output_dir": output_dir},
    }
