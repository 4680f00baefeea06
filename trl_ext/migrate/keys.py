"""
Keys of older recipes and what became of them, from alignment-handbook's recipes and the history of TRL and transformers. The keys of a
current recipe come from the dataclasses themselves, in `convert.py`.
"""

from typing import Any


# Old key -> (new key, reason); the value stays. A key without a new one is left out without loss, whatever its value
RENAMED = {
    "torch_dtype": ("dtype", "transformers renamed it"),
    "evaluation_strategy": ("eval_strategy", "transformers renamed it"),
    "preprocessing_num_workers": ("dataset_num_proc", "TRL's name for it"),
    "no_cuda": ("use_cpu", "transformers renamed it"),
    "hub_model_revision": ("hub_revision", "transformers' name for the branch that is pushed to"),
    "push_to_hub_model_id": ("hub_model_id", "transformers renamed it"),
    "push_to_hub_token": ("hub_token", "transformers renamed it"),
    "dataset_train_name": ("dataset_train_split", "TRL renamed it"),
    "dataset_test_name": ("dataset_test_split", "TRL renamed it"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", "transformers renamed it"),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", "transformers renamed it"),
    "overwrite_output_dir": (None, "transformers removed it: an existing directory is always written to"),
    "save_safetensors": (None, "transformers removed it: checkpoints are always safetensors"),
    "generate_during_eval": (None, "TRL removed it: no samples are generated during the evaluation"),
    "label_pad_token_id": (None, "TRL removed it: the completion is marked by a mask"),
    "padding_value": (None, "TRL removed it: the tokenizer's pad token is used"),
    "is_encoder_decoder": (None, "TRL removed it: the model's configuration says so"),
    "use_logits_to_keep": (None, "TRL removed it: only the answers' logits are computed"),
    "use_num_logits_to_keep": (None, "TRL removed it: only the answers' logits are computed"),
    "model_adapter_name": (None, "TRL removed it: the trained adapter is called `default`"),
    "ref_adapter_name": (None, "TRL removed it: the reference adapter is called `ref`"),
    "base_model_attribute_name": (None, "TRL removed it"),
    "sanity_check": (None, "TRL removed it: `max_steps: 2` is a short run"),
    "auto_insert_empty_system_msg": (None, "the chat template alone decides on a system message"),
}

# Old key -> old value -> new keys; other values are problems
VALUES = {
    "use_flash_attention_2": {True: {"attn_implementation": "flash_attention_2"}, False: {}},
    "adafactor": {True: {"optim": "adafactor"}, False: {}},
    "gradient_checkpointing_use_reentrant": {
        yes: {"gradient_checkpointing_kwargs": {"use_reentrant": yes}} for yes in (True, False)
    },
}

# Old key -> (the value at which it is left out without loss, the fix for any other value)
NEUTRAL = {
    "reference_free": (
        False,
        "training needs a reference. Remove the key, or use `trl.DPOTrainer`",
    ),
    "force_use_ref_model": (False, "with PEFT the reference is the model without its adapter, which needs no memory"),
    "group_by_length": (
        False,
        "pairs have no single length. Remove it; `padding_free: true` computes no padding in any order",
    ),
    "max_train_samples": (None, "cut the split: `datasets: [{path: ..., split: 'train[:5000]'}]`"),
    "max_eval_samples": (None, "cut the split of the evaluation data, or use `test_split_size`"),
    "base_model_revision": (None, "merge the adapter into its base, and name the result in `model_name_or_path`"),
    "model_code_revision": (None, "transformers removed it: `model_revision` is the revision of model and code"),
    "truncation_side": (None, "TRL removed it: `truncation_mode: keep_start` or `keep_end` cuts the whole sequence"),
    "dataset_kwargs": (None, "TRL removed it: the trainers prepare every dataset in the same way"),
    "ref_model_init_kwargs": (
        None,
        "TRL removed it: the reference is loaded with `model_init_kwargs`, as the model is",
    ),
    "tools": (None, "add a column `tools` to the data"),
    "eos_token": (
        None,
        "set it in the tokenizer, save it beside the model, and name that directory in `model_name_or_path`",
    ),
    "text_column": (None, "rename the column in the data to `prompt`, `chosen` or `rejected`"),
    "logging_dir": (None, "trackers read their directory from the environment: `env: {TENSORBOARD_LOGGING_DIR: ...}`"),
    "fp16_backend": ("auto", "transformers removed it: torch's autocast is the only one"),
    "half_precision_backend": ("auto", "transformers removed it: torch's autocast is the only one"),
}

# Keys of some recipes for wandb -> environment variables, which TRL sets from `env:`
WANDB = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_run_group": "WANDB_RUN_GROUP",
    "wandb_run_id": "WANDB_RUN_ID",
    "wandb_mode": "WANDB_MODE",
    "wandb_watch": "WANDB_WATCH",
    "wandb_log_model": "WANDB_LOG_MODEL",
}

# Key -> the type of its values, which the steps rely on
TYPES = {
    "loss_type": str | list[str],
    "rpo_alpha": float,
    "dataset_splits": str | list[str],
    "dataset_configs": str | list[str],
    "env": dict[str, Any],
}

# Values of `loss_type` that TRL renamed
LOSS_TYPES = {"aot": "aot_unpaired", "aot_pair": "aot"}

# Key of another method's recipes -> that method
MARKS = {
    "max_seq_length": "SFT",
    "dataset_text_field": "SFT",
    "assistant_only_loss": "SFT",
    "completion_only_loss": "SFT",
    "packing": "SFT",
    "cpo_alpha": "CPO",
    "simpo_gamma": "CPO",
    "desirable_weight": "KTO",
    "undesirable_weight": "KTO",
    "center_rewards_coefficient": "Reward",
    "num_ppo_epochs": "PPO",
    "num_generations": "GRPO",
    "reward_funcs": "GRPO",
}
# Names of methods in directories, comments and output names
METHODS = ("SFT", "ORPO", "KTO", "CPO", "PPO", "RLOO", "GRPO", "Reward", "BCO", "PRM", "GKD", "CPT")

# Method or purpose of a recipe -> what to use; TRL has no trainer for other methods
USE = {
    "SFT": "`trl sft`, or the section `sft:` of an ARIES recipe",
    "pretraining": "`trl sft` on a column `text`",
    "CPT": "`trl sft` on a column `text`",
    "Reward": "`trl reward`",
    "KTO": "`trl kto`",
    "GRPO": "`trl grpo`",
    "RLOO": "`trl rloo`",
    "ORPO": "`trl.experimental.orpo`",
    "CPO": "`trl.experimental.cpo`",
    "SimPO": "`trl.experimental.cpo`, with `loss_type: simpo`",
    "GKD": "`trl.experimental.gkd`",
    "generation": "`trl-ext aries run`, which generates, scores, makes pairs and trains on them, with one recipe",
    "exporting a model": "`merge_and_unload` of `peft`, or `trl-ext aries export` after ARIES",
    "inference": "vLLM or transformers",
}
