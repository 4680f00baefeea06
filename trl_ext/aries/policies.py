"""
Policies: which model or adapter is the policy after a round. It is what the round's training made, unless the guard left the round
untrained or the health check set it aside.

In: the run directory. Out: paths; nothing is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from ..recipe import RecipeError
from .checks.gates import policy_findings, policy_stop_message
from .config import AriesConfig
from .data.records import read_json
from .run_dir import RoundDir, RunDir


@dataclass
class Policy:
    """A model, and the LoRA adapter on it."""

    model: str
    adapter: str | None


def policy_after(run: RunDir, config: AriesConfig, number: int) -> Policy:
    """
    The policy after a round. A round that the guard skipped keeps the one before it; before round 1, without SFT, it is the model as it
    came.
    """
    base = config.model["model_name_or_path"]
    if is_skipped(run.round(number)):
        return policy_after(run, config, number - 1)
    if number == 0 and config.sft is None:
        return Policy(base, None)
    made = str(product(run.round(number), config))
    return Policy(base, made) if config.model.get("use_peft") else Policy(made, None)


def product(round_dir: RoundDir, config: AriesConfig) -> Path:
    """What the round's training makes: a model or an adapter."""
    return round_dir.adapter if config.model.get("use_peft") else round_dir.model


def is_skipped(round_dir: RoundDir) -> bool:
    """Whether the guard left the round untrained."""
    if not (round_dir.pairs.exists() and round_dir.guard.exists()):
        return False
    return read_json(round_dir.guard)["decision"] == "skipped"


def is_decided(round_dir: RoundDir, config: AriesConfig) -> bool:
    """Whether the policy after the round is known."""
    return product(round_dir, config).exists() or is_skipped(round_dir)


def set_aside(round_dir: RoundDir, config: AriesConfig) -> None:
    """Move what the round's training made to a place where no stage uses it."""
    round_dir.set_aside.mkdir(exist_ok=True)
    product(round_dir, config).rename(_aside(round_dir, config))


def take_back(run: RunDir, config: AriesConfig, number: int) -> bool:
    """
    Whether a policy that was set aside is taken back, because the recipe now has other bounds.

    Raises:
        [`RecipeError`]: it is beyond the new bounds too.
    """
    round_dir = run.round(number)
    aside = _aside(round_dir, config)
    if not aside.exists():
        return False
    found = policy_findings(read_json(round_dir.health), config.health)
    if found:
        raise degenerate(run, config, number, found)
    aside.rename(product(round_dir, config))
    return True


def degenerate(run: RunDir, config: AriesConfig, number: int, found: list[str]) -> RecipeError:
    """The error that ends a run whose policy was set aside."""
    last_good = policy_after(run, config, number - 1)
    aside = str(_aside(run.round(number), config))
    return RecipeError(policy_stop_message(number, found, aside, last_good.adapter or last_good.model))


def _aside(round_dir: RoundDir, config: AriesConfig) -> Path:
    return round_dir.set_aside / product(round_dir, config).name
