"""
Training: SFT before round 1, and preference training of a round.

In: a [`~aries.training.settings.Training`]. Out: `model/` (full fine-tuning) or `adapter/` (LoRA, QLoRA: the frozen base is never
merged). Trainers stay ordinary; what a round learns is in its rows. The exception is `objective: squared`,
under which direct and refinement rows take different losses.
"""

import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer, ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from ...recipe import RecipeError
from ...rows.completions import judge_completions
from ...trainers.judged_rows import JudgedDPOTrainer
from ...trainers.packed_pairs import why_not_packed
from ...trainers.self_refine_dpo_config import SelfRefineDPOConfig
from ...trainers.self_refine_dpo_trainer import SelfRefineDPOTrainer
from ...trainers.shifted_dpo_trainer import ShiftedDPOTrainer
from ...trainers.squared_refinement import (
    SquaredRefinementDPOTrainer,
    SquaredRefinementSelfRefineDPOTrainer,
    SquaredRefinementTDPOTrainer,
)
from ...trainers.tdpo_config import TDPOConfig
from ...trainers.tdpo_trainer import TDPOTrainer
from ...trainers.upstream import keep_nf4_trainable, load_adapter_weights, load_sharded_reference, own_device
from ..data.disk import writing
from ..data.records import read_jsonl, write_json
from .checkpoints import RestoreAdapter, last_whole_checkpoint
from .launch_check import check_launched
from .settings import TrainerSettings, Training


logger = get_logger(__name__)

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (JudgedDPOTrainer, DPOConfig),
    "tdpo": (TDPOTrainer, TDPOConfig),
    "self_refine_dpo": (SelfRefineDPOTrainer, SelfRefineDPOConfig),
}
# The same with `objective: squared`
SQUARED_TRAINERS = {
    "dpo": SquaredRefinementDPOTrainer,
    "tdpo": SquaredRefinementTDPOTrainer,
    "self_refine_dpo": SquaredRefinementSelfRefineDPOTrainer,
}
# Rounding, as a share of the log-probability, by which an untrained policy may differ from itself as the reference. The same
# forward gives 0; another policy differs by more.
STEP_0_TOLERANCE = 1e-4


class CheckStep0(TrainerCallback):
    """Run [`check_step_0`] at the start of a new training, when the models are on their devices, and sharded if they will be."""

    def __init__(self, trainer: DPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            check_step_0(self._trainer)


class ProgressReport(TrainerCallback):
    def __init__(self, progress: Callable[[int, int], None]):
        self._progress = progress

    def on_train_begin(self, args, state, control, **kwargs):
        self._progress(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self._progress(state.global_step, state.max_steps)


class StopOnNoNumber(TrainerCallback):
    """End the training if a logged value is NaN or infinite. Under fp16 a gradient may be; its step is skipped."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value) and not (args.fp16 and key == "grad_norm"):
                where = f"`{key}` is {value} at step {state.global_step} of {state.max_steps}"
                raise RecipeError(diverged(where, args.output_dir))


def check_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], output_dir: str) -> None:
    """
    Raises:
        [`RecipeError`]: a trained weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(weights[name]).all():
            raise RecipeError(diverged(f"after the last step, {name} is no longer finite", output_dir))


def diverged(where: str, output_dir: str) -> str:
    return (
        f"training has diverged: {where}. Nothing of it is saved, and the policy before it is the last good one. Under "
        "another `output_dir`, try a lower `learning_rate`, more `warmup_steps`, a smaller `max_grad_norm`, or float32 instead of 16 "
        f"bits. To repeat it unchanged, for example after a fault of the machine, delete {output_dir}."
    )


def rows_of(training: Training) -> list[dict[str, Any]]:
    """The rows of an epoch, with the refinement rows of earlier rounds behind the round's own."""
    earlier = (row for path in training.earlier for row in read_jsonl(path) if row["turn"])
    return repeat_by_weight([*read_jsonl(training.rows), *earlier])


def repeat_by_weight(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Repeat each row as often as its `weight` says: the same epoch for every trainer, TRL's own included."""
    return [row for row in rows for _ in range(row.get("weight", 1))]


def trainer_classes(settings: TrainerSettings) -> tuple[type, type]:
    """The trainer and its config: for a squared objective, the one whose refinement rows take the squares."""
    trainer_class, config_class = TRAINERS[settings.trainer]
    if settings.objective_alpha is not None:
        trainer_class = SQUARED_TRAINERS[settings.trainer]
    return trainer_class, config_class


def load_policy(training: Training, model_args: ModelConfig, trust_remote_code: bool) -> str | PeftModel:
    """The policy to train: a path for full fine-tuning or a new adapter, a `PeftModel` to train an adapter on."""
    policy = training.policy
    if policy.adapter is None:
        return policy.model
    base = AutoModelForCausalLM.from_pretrained(
        policy.model,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        revision=model_args.model_revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        quantization_config=get_quantization_config(model_args),
        device_map={"": "cpu"} if training.settings.config.get("use_cpu") else None,
    )
    # ZeRO-3 gathers parameters of one type: adapters in the base's, as TRL makes new ones there
    return PeftModel.from_pretrained(
        base, policy.adapter, is_trainable=True, autocast_adapter_dtype=not is_deepspeed_zero3_enabled()
    )


def decide_packing(args: DPOConfig, model: str | PeftModel, said: Collection[str]) -> None:
    """
    Leave padding out, and compute a pair's prompt once, if the model allows it; if not, the log says why. Options in `said`, those of
    the recipe, stay as they are, and `padding_free: false` alone leaves both out.
    """
    if ("padding_free" in said and not args.padding_free) or args.use_weighting:  # whose head takes no packed batches
        return
    for option in ("padding_free", "share_prompt"):
        if option not in said and (option == "padding_free" or isinstance(args, TDPOConfig | SelfRefineDPOConfig)):
            reason = why_not_packed(model, args, share_prompt=option == "share_prompt")
            setattr(args, option, reason is None)
            if reason is not None:
                logger.warning(f"The training computes tokens that it could leave out (`{option}: false`): {reason}")


def make_trainer(training: Training, progress: Callable[[int, int], None]):
    """Make an ordinary trainer for the rows."""
    settings, is_sft = training.settings, training.settings.trainer == "sft"
    trainer_class, config_class = trainer_classes(settings)
    model_args = ModelConfig(**training.model)
    args = config_class(**settings.config)
    args.learning_rate *= training.learning_rate_factor
    model = load_policy(training, model_args, args.trust_remote_code)
    kwargs: dict[str, Any] = {}
    if isinstance(model, str):
        args.model_init_kwargs = {
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            "revision": model_args.model_revision,
            "use_safetensors": True,
            **own_device(),
        }
        kwargs["peft_config"] = get_peft_config(model_args)
        kwargs["quantization_config"] = get_quantization_config(model_args)
        if not is_sft and training.reference.model != model and kwargs["peft_config"] is None:
            kwargs["ref_model"] = AutoModelForCausalLM.from_pretrained(
                training.reference.model,
                dtype=model_args.dtype,
                attn_implementation=model_args.attn_implementation,
                revision=model_args.model_revision,
                trust_remote_code=args.trust_remote_code,
                use_safetensors=True,
            )
    if issubclass(trainer_class, ShiftedDPOTrainer):
        decide_packing(args, model, settings.config)
    ref_weights = kwargs["ref_model"].state_dict() if "ref_model" in kwargs else None
    rows = rows_of(training)
    columns = ("prompt", "completion") if is_sft else ("prompt", "chosen", "rejected")
    if settings.objective_alpha is not None:
        kwargs["objective_alpha"] = settings.objective_alpha
        columns += ("turn",)
    tokenizer = AutoTokenizer.from_pretrained(
        training.policy.model, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    if is_sft:  # `check` has reported those that are left out
        rows, findings = judge_completions(rows, tokenizer, "rows for SFT", max_length=args.max_length)
        findings.check(training.max_dropped)
    else:
        kwargs["max_dropped"] = training.max_dropped
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{column: row[column] for column in columns} for row in rows]),
        processing_class=tokenizer,
        callbacks=[ProgressReport(progress), StopOnNoNumber()],
        **kwargs,
    )
    keep_nf4_trainable(trainer.model)  # TRL's own trainers too: `check_step_0` is an evaluation
    if trainer_class is JudgedDPOTrainer and trainer.ref_model is not None:
        load_sharded_reference(trainer, ref_weights)
    if not is_sft:
        set_reference(trainer, training)
    return trainer


def set_reference(trainer: DPOTrainer, training: Training) -> None:
    """
    Make the "ref" adapter what the recipe asks for. TRL copies the trained adapter, the previous round's policy; the
    initial policy has its own adapter, or none (then the adapter is switched off).
    """
    if training.policy.adapter is None or training.reference.adapter == training.policy.adapter:
        return
    model = trainer.model
    if training.reference.adapter is None:
        model.delete_adapter("ref")
        return
    load_adapter_weights(model, training.reference.adapter, "ref")


def check_step_0(trainer: DPOTrainer) -> None:
    """
    A policy that is its own reference has log-ratios of 0 before the first step. Anything else means that the adapter or the
    reference is not the one it should be.

    Raises:
        `RuntimeError`: with the log-ratio found.
    """
    size = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    rows = trainer.train_dataset.select(range(size))
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.compute_loss(model, batch)
    found = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    trainer._metrics["eval"].clear()
    model.train()
    for side in ("chosen", "rejected"):
        logratio = found[f"rewards/{side}"] / trainer.beta
        if abs(logratio) > STEP_0_TOLERANCE * abs(found[f"logps/{side}"]):
            raise RuntimeError(
                f"Before the first step the policy differs from its reference: the {side} answers' mean log-ratio is "
                f"{logratio:.4g}, expected 0. The adapter was not loaded, or the reference is not the round's starting "
                "policy."
            )


def save_policy(trainer, weights: dict[str, torch.Tensor], output: Path) -> None:
    """Save the model or, for PEFT, the trained adapter alone: TRL keeps a "ref" copy beside it."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapters = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(temporary, state_dict=weights, **adapters)
    trainer.processing_class.save_pretrained(temporary)
    temporary.rename(output)


def train(training: Training, progress: Callable[[int, int], None]) -> None:
    """Train, save the policy, and leave the log history beside it. Of several processes, the main one saves."""
    settings = training.settings
    # accelerate's configuration has a precision too; the recipe's `bf16` and `fp16` decide
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if settings.config.get("use_cpu") and "WORLD_SIZE" in os.environ:
        # Each of several processes would be on cpu:0, to which torch restores no optimizer
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    trainer = make_trainer(training, progress)
    accelerator = trainer.accelerator
    check_launched(accelerator)
    counts = {"rows": len(rows_of(training)), "trained_rows": len(trainer.train_dataset)}
    if settings.trainer != "sft" and training.reference == training.policy:
        trainer.add_callback(CheckStep0(trainer))
    output_dir = Path(settings.config["output_dir"])
    with accelerator.main_process_first():
        checkpoint = last_whole_checkpoint(output_dir)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if checkpoint is not None and isinstance(trainer.model, PeftModel) and not sharded:
        trainer.add_callback(RestoreAdapter(checkpoint))
    with writing(output_dir):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = accelerator.get_state_dict(trainer.model_wrapped)  # whole, on the main process
    if not accelerator.is_main_process:
        return
    check_weights(trainer.model, weights, str(output_dir))
    write_json(output_dir / "log_history.json", trainer.state.log_history)
    batch_size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * accelerator.num_processes
    write_json(output_dir / "rows.json", counts | {"processes": accelerator.num_processes, "batch_size": batch_size})
    with writing(training.output):
        save_policy(trainer, weights, training.output)
