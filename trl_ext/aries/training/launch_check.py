"""
Checks, before any work is done, that the accelerate configuration of a recipe can do what the rest of the recipe asks for; and, in each
process, that accelerate does it.
"""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from ...launch import Launch


KNOWN = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")


def launch_problem(
    launch: Launch, model: Mapping[str, Any], sections: list[Mapping[str, Any]], gpus: int
) -> str | None:
    """
    Args:
        launch ([`~launch.Launch`]):
            How the training is launched.
        model (`Mapping[str, Any]`), sections (`list[Mapping[str, Any]]`):
            The recipe's `model`, and the settings of what is launched: `training`, and `sft` if there is one.
        gpus (`int`):
            How many there are.

    Returns:
        `str`, *optional*: what cannot work, and how to fix it.
    """
    try:
        config = load_config_from_file(launch.config_file)
        if not isinstance(config, ClusterConfig):
            raise ValueError("its `compute_environment` is not LOCAL_MACHINE")
        kind = config.distributed_type.value
        stage, gathers = zero_stage(config)
    except Exception as error:  # each library raises its own for a broken file
        return f"{launch.config_file} cannot be read: {error}. Write one with `accelerate config --config_file FILE`."
    processes = launch.num_processes or config.num_processes
    on_cpu = [bool(section.get("use_cpu")) for section in sections]
    if kind not in KNOWN:
        return f"{launch.config_file} has `distributed_type: {kind}`; known types are {', '.join(KNOWN)}. On CPUs, use ddp."
    if config.num_machines > 1:
        return (
            f"{launch.config_file} has `num_machines: {config.num_machines}`, but the loop trains on its own machine "
            "only. Set it to 1, or train on a round's pairs.jsonl with `trl-ext tdpo` or `self-refine-dpo`."
        )
    if kind == "NO" and processes > 1:
        return f"{launch.config_file} is for one process, and `num_processes` is {processes}. Use ddp, or remove it."
    if any(on_cpu) and kind in ("FSDP", "DEEPSPEED"):
        return (
            f"accelerate trains with {kind} on GPUs only, and a section has `use_cpu: true`. Remove that, or use ddp."
        )
    if not all(on_cpu) and processes > gpus:
        return (
            f"{processes} processes need a GPU each, and there are {gpus}. Set `training.num_processes`, or `use_cpu`."
        )
    if kind == "FSDP" and config.fsdp_config.get("fsdp_version", 1) != 2:
        return f"{launch.config_file} is for the first version of FSDP. Use fsdp2, or set `fsdp_version: 2`."
    if stage == 3 and not gathers:
        return (
            f"{launch.config_file} does not gather weights for saving, so the round's policy would be lost. Set "
            "`zero3_save_16bit_model: true`, or `stage3_gather_16bit_weights_on_model_save` in DeepSpeed's own file."
        )
    if (kind == "FSDP" or stage == 3) and (model.get("load_in_4bit") or model.get("load_in_8bit")):
        return (
            "a quantized base cannot be sharded. Use ddp or deepspeed_zero2, so that each GPU holds the whole quantized base, "
            "or shard a base of 16 bits: remove `load_in_4bit` and `load_in_8bit`."
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: `pip install deepspeed`, or use ddp or fsdp2."
    return None


def zero_stage(config: ClusterConfig) -> tuple[int | None, bool]:
    """ZeRO's stage, `None` without DeepSpeed, and whether sharded weights are gathered for saving."""
    settings = config.deepspeed_config
    if config.distributed_type.value != "DEEPSPEED":
        return None, False
    if "deepspeed_config_file" not in settings:
        return settings.get("zero_stage", 2), bool(settings.get("zero3_save_16bit_model"))
    own = json.loads(Path(settings["deepspeed_config_file"]).read_text(encoding="utf-8")).get("zero_optimization", {})
    return own.get("stage", 0), bool(own.get("stage3_gather_16bit_weights_on_model_save"))


def check_launched(accelerator: Accelerator) -> None:
    """
    Accelerate sometimes trains in one process, or without sharding, without saying so.

    Raises:
        `RuntimeError`: the processes, or how they share the model, are not those that were launched.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = accelerator.distributed_type.value
    asked = next((kind for kind in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"), found)
    if (accelerator.num_processes, found) != (processes, asked):
        raise RuntimeError(
            f"launched as {processes} processes with {asked}, but accelerate trains with {accelerator.num_processes} and {found}. "
            "Look at `accelerate env`."
        )
