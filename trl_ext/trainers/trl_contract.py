"""
What this package relies on in TRL beyond its documented API: the names and signatures, in one place for the test
(`tests/test_trl_contract.py`, which adds the behaviour) and for `trl-ext doctor`. As of TRL 1.16.
"""

import importlib
import inspect


# Names TRL does not export -> their parameters. For an autograd function, those of `forward` after `ctx`.
NOT_EXPORTED = {
    ("trl.data_utils", "_tokenize"): ("processing_class", "input", "apply_chat_template_kwargs"),
    ("trl.data_utils", "common_prefix_length"): ("ids", "other_ids"),
    ("trl.kernels.chunked_logprob", "_addmm_fp32"): ("acc", "a", "b"),
    ("trl.models.utils", "disable_gradient_checkpointing"): ("model", "gradient_checkpointing_kwargs"),
    ("trl.trainer.dpo_trainer", "DataCollatorForPreference"): (
        *("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"),
    ),
    ("trl.trainer.utils", "FusedCausalLMOutput"): (
        *("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"),
    ),
    ("trl.trainer.utils", "generate_model_card"): (
        *(
            "base_model",
            "model_name",
            "hub_model_id",
            "dataset_name",
            "tags",
            "wandb_url",
            "trackio_url",
            "trainer_name",
        ),
        *("trainer_citation", "template_file", "paper_title", "paper_id", "comet_url"),
    ),
    ("trl.trainer.utils", "get_config_model_id"): ("config",),
    ("trl.trainer.utils", "global_then_local_main_first"): (),
    ("trl.trainer.utils", "maybe_gather_lm_head_ctx"): ("params",),
    ("trl.trainer.utils", "pad"): ("tensors", "padding_value", "padding_side", "pad_to_multiple_of"),
    ("trl.trainer.utils", "use_adapter"): ("model", "adapter_name"),
}

# Methods of DPOTrainer that are overridden or called -> their parameters
METHODS = {
    # The order matters: the trainers pass the first ones by position
    "__init__": (
        *("self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
        *("compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"),
    ),
    "_compute_loss": ("self", "model", "inputs", "return_outputs"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_precompute_ref_logps": ("self", "dataset", "name", "batch_size"),
    "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    "_set_signature_columns_if_needed": ("self",),
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "compute_ref_log_probs": ("self", "model", "inputs"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),  # calls `_compute_loss`
}


def parameters(function) -> tuple[str, ...]:
    """The names of a function's parameters; of an autograd function's `forward`, those after `ctx`."""
    import torch

    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return tuple(inspect.signature(function.forward).parameters)[1:]
    return tuple(inspect.signature(function).parameters)


def broken() -> list[str]:
    """What the installed TRL has otherwise, one line each; empty where the contract holds."""
    from trl import DPOTrainer

    problems = []
    for (module, name), expected in NOT_EXPORTED.items():
        try:
            found = parameters(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError) as error:
            problems.append(f"{module}.{name} is gone ({error})")
            continue
        if found != expected:
            problems.append(f"{module}.{name} takes {found}, not {expected}")
    for name, expected in METHODS.items():
        method = inspect.getattr_static(DPOTrainer, name, None)
        if method is None:
            problems.append(f"DPOTrainer.{name} is gone")
        elif parameters(method) != expected:
            problems.append(f"DPOTrainer.{name} takes {parameters(method)}, not {expected}")
    return problems
