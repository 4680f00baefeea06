"""
Jobs: what the loop hands to its child processes, plain dicts of what the recipe and the run directory say. Nothing is run or written here.

A round's prompts are answered by the policy of the round before, and so are the evaluation prompts; after the last round, for these alone,
`number` is one more than there are rounds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..launch import Launch
from ..recipe import Recipe
from .config import AriesConfig, ScorerConfig, sampling_by_turn, sft_settings, trainer_settings
from .data.records import encode
from .policies import Policy, policy_after, product
from .run_dir import RunDir
from .scoring.scores import other_columns


# vLLM accepts these as the largest LoRA rank
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def preflight_job(
    run: RunDir, config: AriesConfig, recipe: Recipe, launch: Launch | None, conversational: bool
) -> dict[str, Any]:
    """Every setting, to be constructed; and the files of prompts, where none has been taken from them yet."""
    return {
        "recipe": {**asdict(recipe), "path": str(recipe.path), "locations": list(recipe.locations.items())},
        "training": trainer_settings(config, 1, str(run.round(1).training)),
        "sft": config.sft and sft_settings(config, str(run.round(0).training)),
        "launch": launch and asdict(launch),
        "conversational": conversational,
        "max_model_len": config.generation.max_model_len,
        "adapters": [str(run.round(number).adapter) for number in range(config.rounds + 1)],
        "prompts": [] if run.round(1).prompts.exists() else prompt_files(config),
        "health": asdict(config.health),
        "learn": config.pairs.learn,
    }


def prompt_files(config: AriesConfig) -> list[dict[str, Any]]:
    """The files of prompts, and the longest prompt that leaves room for a draft."""
    sections = {"prompts": (config.prompts, None), "evaluation": (config.evaluation, config.evaluation.samples)}
    return [
        {
            "key": f"{name}.dataset",
            "datasets": [asdict(entry) for entry in section.entries()],
            "samples": samples,
            "longest": config.generation.max_model_len - config.drafts.max_tokens,
        }
        for name, (section, samples) in sections.items()
    ]


def generation_job(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """The evaluation prompts, the round's own, up to the last round, and the samples of the parity check, where it is to be made."""
    previous, current = run.round(number - 1), run.round(number)
    sampling = sampling_by_turn(config)
    evaluation_sampling = [replace(turn, temperature=config.evaluation.temperature) for turn in sampling]
    tasks = [
        {
            "prompts": str(run.evaluation_prompts),
            "answers": str(previous.evaluation),
            "sampling": [asdict(turn) for turn in evaluation_sampling],
            "seed": [config.seed, "evaluation"],  # the same in every round
            "is_evaluation": True,
        }
    ]
    if number <= config.rounds:
        tasks.append(
            {
                "prompts": str(current.prompts),
                "answers": str(current.answers),
                "sampling": [asdict(turn) for turn in sampling],
                "seed": [config.seed, number],
                "is_evaluation": False,
            }
        )
    parity = None
    if config.parity.samples and not previous.samples.exists():
        parity = {
            "prompts": str(run.evaluation_prompts),
            "answers": str(previous.samples),
            "samples": config.parity.samples,
            "sampling": asdict(config.drafts),
            "seed": [config.seed, "parity"],
        }
    policy = policy_after(run, config, number - 1)
    # A new name and id for every round: vLLM may answer from stale weights under an old one
    adapter = None if policy.adapter is None else [f"round_{number - 1:02d}", number, policy.adapter]
    return {
        "model": policy.model,
        "adapter": adapter,
        "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= config.model.get("lora_r", 16)),
        "revision": config.model.get("model_revision"),
        "trust_remote_code": config.trust_remote_code,
        "generation": asdict(config.generation),
        "tasks": [task | {"refinements": asdict(config.refinements)} for task in tasks],
        "learn": config.pairs.learn,
        "intake": {"health": asdict(config.health), "selection": config.pairs.selection},
        "parity": parity,
        "probe": str(previous.probe),
    }


def probe_job(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """A few of the evaluation prompts, for the policies of [`comparison`]."""
    return comparison(run, config, number) | {
        "prompts": str(run.evaluation_prompts),
        "output": str(run.round(number - 1).probe),
        "dtype": config.generation.dtype,
        "max_model_len": config.generation.max_model_len,
    }


def parity_job(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """What a [`generation_job`] sampled, for the policies of [`comparison`]."""
    previous = run.round(number - 1)
    answers = [previous.samples, previous.evaluation]
    if number <= config.rounds:
        answers.append(run.round(number).answers)
    return comparison(run, config, number) | {
        "samples": str(previous.samples),
        "output": str(previous.parity),
        "answers": [str(file) for file in answers],
        "trained_on": config.model if config.trained_on_nf4_sampled_at_full_precision else None,
    }


def comparison(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """The policy, those that may be mistaken for it, and how they are loaded and compared."""
    made = number - 1  # the round that made it
    policy = policy_after(run, config, made)
    policies = {"policy": policy}
    if policy.adapter is not None:
        policies["base"] = Policy(policy.model, None)
    policies["initial"] = policy_after(run, config, 0)
    if made > 0:
        policies["previous"] = policy_after(run, config, made - 1)
    return {
        "round": made,
        "policies": {name: asdict(policy) for name, policy in policies.items()},
        "tolerance": config.parity.tolerance,
        "quantization": config.generation.quantization,
        "loading": {
            "revision": config.model.get("model_revision"),
            "trust_remote_code": config.trust_remote_code,
            "use_cpu": bool(config.training.get("use_cpu")),
        },
    }


def scoring_job(run: RunDir, config: AriesConfig, number: int | None = None) -> dict[str, Any]:
    """The scorers, and what of a round's answers and of the evaluation's has no scores yet; without a number there is nothing to score."""
    files = []
    if number is not None:
        previous, current = run.round(number - 1), run.round(number)
        files.append((run.evaluation_prompts, previous.evaluation, previous.evaluation_scores))
        if number <= config.rounds:
            files.append((current.prompts, current.answers, current.scores))
    return {
        "scorers": [scorer_settings(scorer) for scorer in config.scores.each()],
        "generation": asdict(config.generation),
        "tokenizer": {
            "pretrained_model_name_or_path": absolute(config.model["model_name_or_path"]),
            "revision": config.model.get("model_revision"),
            "trust_remote_code": config.trust_remote_code,
        },
        "cache": absolute(run.score_cache),
        "tasks": [
            dict(zip(("prompts", "answers", "scores"), map(absolute, paths), strict=True))
            for paths in files
            if not paths[-1].exists()
        ],
        "check": [],
    }


def scorer_settings(config: ScorerConfig) -> dict[str, Any]:
    settings = asdict(config)
    if config.verifier is not None:
        file, _, name = config.verifier.rpartition(":")
        settings["verifier"] = f"{absolute(file)}:{name}"
    if config.reward_model is not None:
        settings["reward_model"] = absolute(config.reward_model)
    return settings


def absolute(path: str | Path) -> str:
    """A path that holds whatever a verifier makes the working directory; what is no path here, such as an id on the Hub, as it is."""
    return str(Path(path).absolute()) if isinstance(path, Path) or Path(path).exists() else path


def first_row(prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of the prompts, with every column that any of them has, as it is read back from a run's own file."""
    return json.loads(encode(dict.fromkeys(other_columns(prompts)) | prompts[0]))


def training_job(run: RunDir, config: AriesConfig, number: int) -> dict[str, Any]:
    """The SFT, as number 0, or a round's preference training."""
    round_dir = run.round(number)
    if number == 0:
        policy = reference = Policy(config.model["model_name_or_path"], None)
        rows, settings = round_dir.sft, sft_settings(config, str(round_dir.training))
    else:
        policy = policy_after(run, config, number - 1)
        initial = config.training.get("reference", "previous") == "initial"
        reference = policy_after(run, config, 0) if initial else policy
        rows, settings = round_dir.pairs, trainer_settings(config, number, str(round_dir.training))
    return {
        "model": policy.model,
        "adapter": policy.adapter,
        "model_args": config.model,
        "reference": asdict(reference) | {"is_policy": reference == policy},
        "rows": str(rows),
        "output": str(product(round_dir, config)),
        "health": asdict(config.health),
        **settings,
    }
