"""
Moves a degenerated policy to where no stage takes it for the round's, and back if the recipe's bounds change.
"""

from pathlib import Path

from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.records import read_json
from ..policies import product, start_policy
from ..run_dir import RoundDir, RunDir
from .gates import policy_findings, policy_stop_message


def set_aside(round_dir: RoundDir, config: AriesConfig) -> None:
    """Move what the round's training made."""
    round_dir.set_aside.mkdir(exist_ok=True)
    product(round_dir, config).rename(_aside(round_dir, config))


def take_back(run: RunDir, config: AriesConfig, number: int) -> bool:
    """
    Move it back if it is within the bounds that the recipe has now.

    Returns:
        `bool`: whether there was one.

    Raises:
        [`RecipeError`]: it is beyond these bounds too.
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
    """The error that ends a run whose policy has been set aside."""
    last_good = start_policy(run, config, number)
    aside = str(_aside(run.round(number), config))
    return RecipeError(policy_stop_message(number, found, aside, last_good.adapter or last_good.model))


def _aside(round_dir: RoundDir, config: AriesConfig) -> Path:
    return round_dir.set_aside / product(round_dir, config).name
