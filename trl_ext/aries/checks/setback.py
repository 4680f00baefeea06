"""
What happens when a round's policy loses against an earlier one: `health.on_setback`.

A round that is rolled back stays as it is, with its policy and its evaluation. The next one starts from the policy that this one started
from, with half the learning rate. What the lost policy answered to the next round's prompts is moved to that round's `rolled_back/`, and
the policy that the run goes on with answers them instead.
"""

from pathlib import Path

from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.records import read_json, write_json
from ..policies import base_round, is_skipped, learning_rate_factor, start_policy
from ..provenance import forget
from ..run_dir import RoundDir, RunDir
from ..scoring.scores import read_chains


# `health.on_setback` -> decision about a round whose answers have become worse
DECISIONS = {"warn": "warned", "stop": "stopped", "roll_back": "rolled_back"}


def decide_setback(run: RunDir, config: AriesConfig, number: int, found: list[str]) -> str | None:
    """
    Decide about a round before it is closed, and write `setback.json`. Nothing is done about it yet.

    Args:
        found (`list[str]`):
            The setbacks of the round, in words.

    Returns:
        `str` or `None`: the decision, `None` if there is no setback of this round's own.
    """
    round_dir = run.round(number)
    if not found or is_skipped(round_dir):
        round_dir.setback.unlink(missing_ok=True)
        return None
    decision = DECISIONS[config.health.on_setback]
    if decision == "stopped" and number == config.rounds:
        decision = "warned"  # there is nothing left to stop
    files, tokens = [], 0
    if decision == "rolled_back":
        files = [path.name for path in learned_from(run.round(number + 1)) if path.exists()]
        tokens = generated_tokens(run.round(number + 1)) if files else 0
    discarded = {"files": files, "tokens": tokens}
    write_json(round_dir.setback, {"decision": decision, "setbacks": found, "discarded": discarded})
    return decision


def learned_from(round_dir: RoundDir) -> list[Path]:
    """What a round learns from, the answers first: as long as they are there, what follows belongs to them."""
    return [round_dir.answers, round_dir.scores, round_dir.guard_scores]


def generated_tokens(round_dir: RoundDir) -> int:
    chains = (chain for _, chain in read_chains(round_dir.prompts, round_dir.answers))
    return sum(answer.tokens for chain in chains for answer in (*chain.answers, *chain.unanswered))


def discard_answers(run: RunDir, number: int) -> bool:
    """
    If a closed round was rolled back, move away what its policy answered for the next one. A kill leaves the rest to the next start.

    Returns:
        `bool`: whether there was anything to move.
    """
    found, made = read_json(run.round(number).setback), run.round(number + 1)
    files = found["discarded"]["files"] if found and found["decision"] == "rolled_back" else []
    left = [name for name in files if not (made.rolled_back / name).exists()]
    if left:
        forget(run, number + 1, left)
        made.rolled_back.mkdir(exist_ok=True)
        for name in left:
            (made.path / name).rename(made.rolled_back / name)
    return bool(left)


def discarded_tokens(run: RunDir, number: int) -> int:
    """How many tokens were generated for a round by a policy that was then rolled back."""
    found = read_json(run.round(number - 1).setback) if number > 0 else None
    return found["discarded"]["tokens"] if found else 0


def stopped(run: RunDir, config: AriesConfig, number: int, found: list[str]) -> RecipeError:
    """The error that ends a run whose policy has become worse."""
    before = start_policy(run, config, number)
    return RecipeError(
        f"the policy of round {number} has become worse: {'; '.join(found)}. The run is stopped, and the policy that it was trained from is "
        f"{before.adapter or before.model}. Under another `output_dir`, try a lower `training.learning_rate`, fewer steps, or a larger "
        "`training.beta`. Or continue this run with `--health.on_setback roll_back`, which goes on from that policy with half the learning "
        "rate, or with `--health.on_setback warn`."
    )


def rolled_back(run: RunDir, config: AriesConfig, number: int) -> str:
    """What to say of a round that is rolled back."""
    if number == config.rounds:
        return f"rolled back: the run's policy is that of round {base_round(run, number + 1)}"
    return (
        f"rolled back: the next round starts from the policy of round {base_round(run, number + 1)}, with the learning rate times "
        f"{learning_rate_factor(run, number + 1):g}"
    )
