"""
EleutherAI's lm-evaluation-harness on a round's policy: which model, adapter, data type and quantization the round has, and
whatever else the user says, in one command line of `lm_eval`.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...processes import run_launcher
from ...recipe import RecipeError
from ..config import AriesConfig
from ..policies import Policy, policy_after
from ..provenance import check_policy
from ..run_dir import RunDir


def lm_eval(config: AriesConfig, number: int | None, tasks: str, args: Sequence[str]) -> int:
    """
    Evaluate a round's policy on tasks of lm-evaluation-harness.

    Args:
        config ([`AriesConfig`]):
            Names the run.
        number (`int`, *optional*):
            The round. Default: the last that has been trained.
        tasks (`str`):
            As `lm_eval` takes them, separated by commas.
        args (sequence of `str`):
            More for `lm_eval`, which takes its last word: `--output_path` is this round's `lm_eval/` otherwise.

    Returns:
        `int`: exit code of `lm_eval`.

    Raises:
        [`RecipeError`]: `lm_eval` is not installed, or the round has not been trained, or its policy is not what the run made.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            'lm-evaluation-harness is not installed. Install the extra `eval`: pip install -e ".[eval]", or '
            'pip install "lm-eval[hf]>=0.4.8".'
        )
    run = RunDir(Path(config.output_dir))
    trained = [n for n in range(config.rounds + 1) if is_trained(run, config, n)]
    if not trained:
        raise RecipeError(f"{run.path} has no trained round yet. `trl-ext aries run` makes them.")
    number = trained[-1] if number is None else number
    if number not in trained:
        raise RecipeError(f"`--round`: {number} has not been trained; there are {', '.join(map(str, trained))}.")
    check_policy(run, config, number)
    policy, output = policy_after(run, config, number), str(run.round(number).lm_eval)
    command = lm_eval_command(policy, config.model, config.trust_remote_code, tasks, output)
    return run_launcher(command[0], [*command[1:], *args])


def is_trained(run: RunDir, config: AriesConfig, number: int) -> bool:
    """Whether there is a policy after the round; the one before round 1 may be the model as it came."""
    policy = policy_after(run, config, number)
    path = policy.adapter or policy.model
    return path == config.model["model_name_or_path"] or Path(path).exists()


def lm_eval_command(
    policy: Policy, model: dict[str, Any], trust_remote_code: bool, tasks: str, output_path: str
) -> list[str]:
    """
    The module of `lm_eval` and its command line for a policy.

    Args:
        policy ([`~aries.policies.Policy`]):
            Model and adapter.
        model (`dict`):
            The recipe's `model` section.
        trust_remote_code (`bool`), tasks (`str`), output_path (`str`):
            Passed on.

    Raises:
        [`RecipeError`]: a path has a comma, which separates the arguments of `--model_args`.
    """
    from trl import ModelConfig

    settings = ModelConfig(**model)
    quantized = settings.load_in_4bit or settings.load_in_8bit
    model_args: dict[str, Any] = {"pretrained": policy.model}
    if policy.adapter is not None:
        model_args["peft"] = policy.adapter
    if policy.model == settings.model_name_or_path and settings.model_revision != "main":
        model_args["revision"] = settings.model_revision
    model_args["dtype"] = settings.dtype or "auto"
    if settings.load_in_4bit:
        model_args |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": settings.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": settings.use_bnb_nested_quant,
            "bnb_4bit_compute_dtype": settings.dtype,  # as TRL trains it
        }
    elif settings.load_in_8bit:
        model_args["load_in_8bit"] = True
    if trust_remote_code:
        model_args["trust_remote_code"] = True
    for value in (policy.model, policy.adapter):
        if value is not None and "," in value:
            raise RecipeError(f"{value}: `lm_eval` cannot take a path with a comma. Move the run or the model.")
    return [
        "trl_ext.aries.results.harness_quantized" if quantized else "lm_eval",
        "--model",
        "hf-bitsandbytes" if quantized else "hf",
        "--model_args",
        ",".join(f"{key}={value}" for key, value in model_args.items()),
        "--tasks",
        tasks,
        "--output_path",
        output_path,
    ]
