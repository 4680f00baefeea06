"""
Policies: the model and adapter after a round, what they are asked to answer, and which others they might be mistaken for.

A round's policy is what its training made, unless the guard left the round untrained. It answers the evaluation prompts and the
prompts of the next round, which trains on those answers. `answering` is the number of the round whose policy answers; the round that
is made meanwhile is the next one. After the last round there is no next one, and the policy answers the evaluation prompts alone.

In: the run directory. Out: paths; nothing is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    The policy after a round. A round that the guard skipped keeps the one that it started from; before round 1, without SFT, it is the
    recipe's model.
    """
    base = config.model["model_name_or_path"]
    if is_skipped(run.round(number)):
        return start_policy(run, config, number)
    if number == 0 and config.sft is None:
        return Policy(base, None)
    made = str(product(run.round(number), config))
    return Policy(base, made) if config.model.get("use_peft") else Policy(made, None)


def start_policy(run: RunDir, config: AriesConfig, number: int) -> Policy:
    """The policy that a round's training starts from."""
    return policy_after(run, config, base_round(run, number))


def base_round(run: RunDir, number: int) -> int:
    """The round whose policy round `number` starts from: the one before or, if that was rolled back, the one that it started from."""
    before = number - 1
    return base_round(run, before) if is_rolled_back(run.round(before)) else before


def answering_round(run: RunDir, answering: int) -> int:
    """
    The round whose policy answers what round `answering`'s is to answer: its own, until it is rolled back. Then only the next round's prompts
    are left.
    """
    return base_round(run, answering + 1)


def learning_rate_factor(run: RunDir, number: int) -> float:
    """One half for each round before this one that was rolled back."""
    return 0.5 ** sum(is_rolled_back(run.round(n)) for n in range(1, number))


def is_rolled_back(round_dir: RoundDir) -> bool:
    """Whether the next round does not start from this one's policy, which has become worse."""
    return (read_json(round_dir.setback) or {}).get("decision") == "rolled_back"


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


@dataclass
class Answers:
    """Prompts that a policy answers, and its answers."""

    prompts: Path
    answers: Path
    is_evaluation: bool


@dataclass
class Scored:
    """
    Answers, who scores them, and their scores.

    Args:
        answers ([`Answers`]):
            The answers.
        by (`str`):
            The section of the recipe that names the scorers, of [`~aries.config.AriesConfig.scorers`].
        scores (`Path`):
            The file of the scores.
        chains (`int`, *optional*):
            Only the first ones are scored.
    """

    answers: Answers
    by: str
    scores: Path
    chains: int | None = None


def answers_of(run: RunDir, config: AriesConfig, answering: int) -> list[Answers]:
    """What the policy of round `answering` answers: the evaluation prompts, then those of the next round if there is one."""
    own = run.round(answering)
    found = [Answers(run.evaluation_prompts, own.evaluation, is_evaluation=True)]
    if answering < config.rounds:
        made = run.round(answering + 1)
        found.append(Answers(made.prompts, made.answers, is_evaluation=False))
    return found


def scored(run: RunDir, config: AriesConfig, answering: int) -> list[Scored]:
    """
    Who scores what of these answers. If `evaluation.scores` names judges of its own, they score the evaluation, beside those that select, and
    a few chains of the next round for the guard.
    """
    own, made, judging = run.round(answering), run.round(answering + 1), config.judging
    evaluation, *others = answers_of(run, config, answering)
    found = [Scored(evaluation, judging, own.evaluation_scores)]
    if judging != "scores" and config.scorers["scores"]:
        found.append(Scored(evaluation, "scores", own.selecting_scores))
    for answers in others:
        found.append(Scored(answers, "scores", made.scores))
        if judging != "scores" and config.pairs.guard_samples:
            found.append(Scored(answers, judging, made.guard_scores, config.pairs.guard_samples))
    return found


def unscored(run: RunDir, config: AriesConfig, answering: int) -> list[Scored]:
    return [file for file in scored(run, config, answering) if not file.scores.exists()]


def needs_samples(run: RunDir, config: AriesConfig, answering: int) -> bool:
    """Whether the policy must still be sampled for the parity check."""
    return bool(config.parity.samples) and not run.round(answering).samples.exists()


@dataclass
class Comparison:
    """
    A policy, and those that it might be mistaken for.

    Args:
        number (`int`):
            The round that made it.
        policies (`dict[str, Policy]`):
            `"policy"`, and the others by their names in [`~aries.generation.policy_identity.POLICY_NAMES`].
        tolerance (`float`, *optional*):
            `parity.tolerance`.
        quantization (`str`, *optional*):
            `generation.quantization`.
        trained_on (`dict`, *optional*):
            The section `model`, if the policy is trained on an NF4 base and sampled on another.
        revision (`str`, *optional*), trust_remote_code (`bool`), use_cpu (`bool`):
            How models are loaded.
    """

    number: int
    policies: dict[str, Policy]
    tolerance: float | None = None
    quantization: str | None = None
    trained_on: dict[str, Any] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    use_cpu: bool = False


def comparison(run: RunDir, config: AriesConfig, answering: int) -> Comparison:
    """The policy of round `answering`, the model without its adapter, the initial policy and the one of the round before."""
    policy = policy_after(run, config, answering)
    policies = {"policy": policy}
    if policy.adapter is not None:
        policies["base"] = Policy(policy.model, None)
    policies["initial"] = policy_after(run, config, 0)
    if answering > 0:
        policies["previous"] = policy_after(run, config, answering - 1)
    return Comparison(
        answering,
        policies,
        config.parity.tolerance,
        config.generation.quantization,
        trained_on=config.model if config.trained_on_nf4_sampled_at_full_precision else None,
        revision=config.model.get("model_revision"),
        trust_remote_code=config.trust_remote_code,
        use_cpu=bool(config.training.get("use_cpu")),
    )
