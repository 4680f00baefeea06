"""
trl-ext: token-level DPO, self-refined DPO and the ARIES loop on top of TRL.

Public names are imported on first use, so `import trl_ext` loads neither torch nor TRL, and works from an uninstalled checkout.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


_PUBLIC = {
    "ShiftedDPOTrainer": "trl_ext.trainers.shifted_dpo_trainer",
    "TDPOConfig": "trl_ext.trainers.tdpo_config",
    "TDPOTrainer": "trl_ext.trainers.tdpo_trainer",
    "SelfRefineDPOConfig": "trl_ext.trainers.self_refine_dpo_config",
    "SelfRefineDPOTrainer": "trl_ext.trainers.self_refine_dpo_trainer",
    "refine": "trl_ext.aries.results.refine",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .aries.results.refine import refine
    from .trainers.self_refine_dpo_config import SelfRefineDPOConfig
    from .trainers.self_refine_dpo_trainer import SelfRefineDPOTrainer
    from .trainers.shifted_dpo_trainer import ShiftedDPOTrainer
    from .trainers.tdpo_config import TDPOConfig
    from .trainers.tdpo_trainer import TDPOTrainer


def __getattr__(name: str):
    if name == "__version__":
        return version("trl-ext")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
