"""
EleutherAI's lm-evaluation-harness on a round's policy: `lm_eval` with the round's model, adapter, data type and quantization, and the
user's own arguments.
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
from .state import chosen_round


def lm_eval(config: AriesConfig, number: int | str | None, tasks: str, args: Sequence[str]) -> int:
    """
    Run `lm_eval` on a trained round, by default the last, and return its exit code. The user's `args` come last and win; without
    `--output_path`, results go to the round's `lm_eval/`.

    Raises:
        [`RecipeError`]: `lm_eval` is not installed, the round is not trained, or its policy is not what the run made.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            'lm-evaluation-harness is not installed. Install the extra `eval`: pip install -e ".[eval]", or '
            'pip install "lm-eval[hf]>=0.4.8".'
        )
    run = RunDir(Path(config.output_dir))
    trained = [n for n in range(config.rounds + 1) if is_trained(run, config, n)]
    number = chosen_round(run, config, number, trained, "trained")
    check_policy(run, config, number)
    policy, output = policy_after(run, config, number), str(run.round(number).lm_eval)
    command = lm_eval_command(policy, config.model, config.trust_remote_code, tasks, output)
    return run_launcher(command[0], [*command[1:], *args])


def is_trained(run: RunDir, config: AriesConfig, number: int) -> bool:
    """Whether the policy after the round exists; before round 1 it may be the recipe's model."""
    policy = policy_after(run, config, number)
    path = policy.adapter or policy.model
    return path == config.model["model_name_or_path"] or Path(path).exists()


def lm_eval_command(
    policy: Policy, model: dict[str, Any], trust_remote_code: bool, tasks: str, output_path: str
) -> list[str]:
    """
    The module and the command line for a policy; `model` is the recipe's section.

    Raises:
        [`RecipeError`]: a path has a comma, which separates the arguments in `--model_args`.
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
