"""
Trains tiny models under DDP, FSDP2 or ZeRO on CPUs and saves what came out, one file per case and process.

Launched by the tests, `python -m tests.distributed.worker <models> <output> <strategy> ...`, and imported by them for what
one process makes of the same global batches.
"""

import contextlib
import functools
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer

from tests.conftest import PAIRS, perturb
from tests.distributed.launch import two_processes
from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer


ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 4
STEPS = 4  # twice through the eight pairs


@dataclass
class Case:
    """
    A trainer and its options. `lora` trains an adapter, `None` all weights; `model` and `ref_model`, if it is not the
    trainer's own choice, are names of directories.
    """

    trainer: type[DPOTrainer]
    config: type
    lora: dict | None = None
    model: str = "untied"
    ref_model: str | None = None
    options: dict = field(default_factory=dict)


ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ATTENTION_AND_HEAD = ATTENTION | {"modules_to_save": ["lm_head"]}
ACCUMULATION = {"gradient_accumulation_steps": 2}
# Not after the last step: DeepSpeed keeps parameters whole from an evaluation to the next step
EVALUATION = {"eval_strategy": "steps", "eval_steps": 3}
CASES = {
    "tdpo2_full": Case(TDPOTrainer, TDPOConfig),
    "tdpo2_full_other_reference": Case(TDPOTrainer, TDPOConfig, ref_model="other"),
    "tdpo2_full_tied": Case(TDPOTrainer, TDPOConfig, model="tied"),
    "tdpo1_full_checkpointing": Case(
        TDPOTrainer, TDPOConfig, options={"variant": "tdpo1", "gradient_checkpointing": True}
    ),
    # Runs the kernel with two outputs. "sft" itself is a mean over each process's own tokens, so its weight is 0
    "tdpo1_full_two_outputs": Case(
        TDPOTrainer,
        TDPOConfig,
        options={"variant": "tdpo1", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]},
    ),
    "tdpo1_full_shared_prompt": Case(
        TDPOTrainer, TDPOConfig, options={"variant": "tdpo1", "share_prompt": True, "gradient_checkpointing": True}
    ),
    "self_refine_lora_shared_prompt": Case(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, ATTENTION, options={"share_prompt": True}
    ),
    "tdpo2_full_padding_free": Case(TDPOTrainer, TDPOConfig, options={"padding_free": True}),
    "tdpo2_lora_checkpointing": Case(TDPOTrainer, TDPOConfig, ATTENTION, options={"gradient_checkpointing": True}),
    "tdpo2_lora_head_accumulation": Case(
        TDPOTrainer, TDPOConfig, ATTENTION_AND_HEAD, options=ACCUMULATION | EVALUATION
    ),
    "self_refine_full": Case(SelfRefineDPOTrainer, SelfRefineDPOConfig),
    "self_refine_lora": Case(SelfRefineDPOTrainer, SelfRefineDPOConfig, ATTENTION),
    "self_refine_lora_head": Case(SelfRefineDPOTrainer, SelfRefineDPOConfig, ATTENTION_AND_HEAD, options=EVALUATION),
}

# Parts of a batch: 2 of 4 pairs and more, of other lengths in the two processes. No DeepSpeed, which refuses them
IN_PARTS = {
    name: Case(cls, config, lora, options={"padding_free": True, "share_prompt": True, "max_batch_tokens": 60})
    for name, cls, config, lora in (
        ("tdpo2_full_in_parts", TDPOTrainer, TDPOConfig, None),
        ("self_refine_lora_in_parts", SelfRefineDPOTrainer, SelfRefineDPOConfig, ATTENTION),
    )
}


def train(case: Case, models: Path, output: Path, processes: int = 1, **options) -> dict:
    """
    Trains on the pairs in their order, `GLOBAL_BATCH` at a time over all processes.

    Returns:
        `dict`: `processes`; `wrapper`, the classes that the trained model is an instance of; `held` and `ref_held`, the
        share of the model's and the reference's parameters that this process holds; `logs` of each step and evaluation;
        `initial` and `weights`, all of them, whole.
    """
    set_seed(0)  # the adapter's initial weights
    defaults = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": GLOBAL_BATCH // processes // case.options.get("gradient_accumulation_steps", 1),
        "per_device_eval_batch_size": GLOBAL_BATCH // processes,
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",  # Adam's first steps are the gradient's sign, which rounding decides if it is nearly zero
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,  # less than in some of the steps: the norm is the whole model's
    }
    rows = [{"prompt": p, "chosen": " " + chosen, "rejected": " " + rejected} for p, chosen, rejected in PAIRS]
    args = case.config(**(defaults | case.options | options))
    ref_model = case.ref_model and AutoModelForCausalLM.from_pretrained(models / case.ref_model)
    trainer = case.trainer(
        model=str(models / case.model),
        ref_model=ref_model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models / case.model),
        peft_config=None if case.lora is None else LoraConfig(task_type="CAUSAL_LM", **case.lora),
    )
    with gathered(trainer.model):
        perturb(trainer.model)  # or the KL of the first step is zero
        initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    held = held_share(trainer.model)
    with gathered(trainer.model):
        weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    return {
        "processes": trainer.accelerator.num_processes,
        "wrapper": [cls.__name__ for cls in type(trainer.model_wrapped).__mro__],
        "held": held,
        "ref_held": None if trainer.ref_model is None else held_share(trainer.ref_model),
        "logs": [
            {key: value for key, value in log.items() if not key.endswith(("runtime", "per_second"))}
            for log in trainer.state.log_history
            if "train_loss" not in log
        ],
        "initial": initial,
        "weights": weights,
    }


def gathered(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """A context in which ZeRO-3's parameters are whole."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


def held_share(model: torch.nn.Module) -> float:
    """The share of the parameters' elements that this process holds."""
    held = total = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):  # FSDP2
            held, total = held + parameter.to_local().numel(), total + parameter.numel()
        elif is_deepspeed_zero3_enabled():
            held, total = held + parameter.ds_tensor.numel(), total + parameter.ds_numel  # for good, not for a forward
        else:
            held, total = held + parameter.numel(), total + parameter.numel()
    return held / total


def fsdp2_options() -> dict:
    """The options under which a trainer shards its models as `recipes/accelerate_configs/fsdp2.yaml` says, on CPUs."""
    config = yaml.safe_load((ROOT / "recipes/accelerate_configs/fsdp2.yaml").read_text())
    for name, value in config["fsdp_config"].items():  # the environment that `accelerate launch` makes of it
        os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    accelerator = Accelerator(cpu=True)
    # What accelerate concludes from this environment on GPUs, and there only
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return {"accelerator_config": {"use_configured_state": True}}


def zero_options(stage: int) -> dict:
    """The options under which a trainer partitions its gradients, or its models too, with DeepSpeed on CPUs."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)  # it refuses a second model's configuration
    PartialState(backend="gloo")  # accelerate has no backend of its own for DeepSpeed without GPUs
    config = {
        # DeepSpeed leaves parameters whole below a threshold that is more than these models have
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return {"use_cpu": False, "deepspeed": config, "accelerator_config": {"use_configured_state": True}}


STRATEGIES = {
    "ddp": dict,
    "fsdp2": fsdp2_options,
    "zero2": functools.partial(zero_options, 2),
    "zero3": functools.partial(zero_options, 3),
}


def main(models: Path, output: Path, strategies: list[str]) -> None:
    for strategy in strategies:
        cases = CASES if strategy.startswith("zero") else {**CASES, **IN_PARTS}
        for name, case in cases.items():
            result = train(case, models, output, int(os.environ["WORLD_SIZE"]), **STRATEGIES[strategy]())
            torch.save(result, output / f"{strategy}.{name}.{os.environ['RANK']}.pt")


if __name__ == "__main__":
    two_processes(main, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
