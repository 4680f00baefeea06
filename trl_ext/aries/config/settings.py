"""Sampling of each turn of a chain, as a recipe resolves to it."""

from dataclasses import replace

from .generation import SAMPLING_KEYS, STOP_KEYS, DraftsConfig
from .refine import RefineConfig
from .run import AriesConfig


def sampling_by_turn(config: AriesConfig | RefineConfig) -> list[DraftsConfig]:
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
