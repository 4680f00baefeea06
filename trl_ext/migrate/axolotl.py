"""
Keys of axolotl's recipes, from its configuration schema and its code that builds TRL's `DPOConfig`.
"""

from typing import Any

from ..rows.formats import ANSWERS, PROMPTS, ROLES, STANDARD_ROLES, SYSTEM
from .projects import NAME, TOKENIZER, UNUSED, Migration, Project, name_datasets, named, shown


ATTENTION = {"flash": "flash_attention_2", "sdp": "sdpa", "eager": "eager", "flex": "flex_attention"}
MARKS = frozenset(
    "base_model micro_batch_size num_epochs sequence_len sample_packing val_set_size rl dataset_prepared_path lora_target_linear "
    "lora_model_dir evals_per_epoch saves_per_epoch pad_to_sequence_len tokenizer_type special_tokens adapter optimizer lr_scheduler".split()
)
NOT_NEEDED = (
    "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_*_derived_model dataset_prepared_path dataset_keep_in_memory shuffle_* "
    "train_on_inputs eot_tokens group_by_length remove_unused_columns excess_length_strategy eval_sample_packing pad_to_sequence_len "
    "loss_watchdog_* eval_table_size eval_*max_new_tokens generate_samples local_rank ddp device_map debug strict liger_* flash_attn_* "
    "lora_*_kernel use_kernels cut_cross_entropy dpo_use_liger_kernel"
).split()
# Setting of a dataset -> values that need no setting here; `None` for any
FOUND = {
    **dict.fromkeys(("type", "ds_type", "conversation", "trust_remote_code")),
    **dict.fromkeys(("field_messages", "field_prompt"), ("prompt", *PROMPTS)),
    "field_system": SYSTEM,
    **{f"field_{side}": (side, *names) for side, names in ANSWERS.items()},
    **{f"{name}_format": (f"{{{name}}}",) for name in ("prompt", "chosen", "rejected")},
    **dict.fromkeys(("message_field_role", "message_property_mappings.role"), ("role", "from")),
    **dict.fromkeys(("message_field_content", "message_property_mappings.content"), ("content", "value")),
    **{f"roles.{role}": (role, *(name for name in ROLES if ROLES[name] == role)) for role in STANDARD_ROLES},
}


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """The method of a recipe for another method than DPO or IPO, and the evidence for it."""
    rl = old.get("rl")
    if rl:
        return None if rl in ("dpo", "ipo") else ({"simpo": "SimPO"}.get(str(rl), str(rl).upper()), f"`rl: {rl}`")
    marks = {"reward_model": "Reward", "process_reward_model": "PRM", "pretraining_dataset": "pretraining"}
    return next(((name, f"`{key}`") for key, name in marks.items() if old.get(key)), ("SFT", "no `rl`"))


def step(old: dict[str, Any], migration: Migration) -> None:
    schedule(old, migration)
    precision(old, migration)
    data(old, migration)
    for section in ("special_tokens", "trl"):
        old |= leaves(section, old.pop(section, {}))
    for key, new in (("wandb_project", {"report_to": ["wandb"]}), ("hub_model_id", {"push_to_hub": True})):
        if key in old:
            old |= new
            migration.changes.append(f"{named(new)} added: axolotl does so if `{key}` is given")


def schedule(old: dict[str, Any], migration: Migration) -> None:
    """When to evaluate and to save. axolotl counts per epoch, and evaluates only if it has evaluation data."""
    epochs = old.get("num_epochs", 1)
    for key, what in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        times = old.pop(key, None)
        if times is not None:
            new = {f"{what}_strategy": "epoch"}
            if times != 1 and times * epochs > 1:  # below 1, a number of steps is a share of all
                new = {f"{what}_strategy": "steps", f"{what}_steps": round(1 / (times * epochs), 6)}
            old |= new
            migration.changes.append(f"`{key}: {times}` -> {named(new)}")
    if "eval_steps" in old:
        old.setdefault("eval_strategy", "steps")
    for key in ("eval_strategy", "eval_steps"):
        if key in old and not old.keys() & {"val_set_size", "test_datasets"}:
            del old[key]
            migration.changes.append(f"`{key}` left out: without `val_set_size` axolotl does not evaluate")


def precision(old: dict[str, Any], migration: Migration) -> None:
    """The precision of the weights. axolotl loads them in the precision of the training."""
    given = {key: old.pop(key) for key in ("bf16", "bfloat16", "fp16", "float16", "float32") if key in old}
    half = given.get("bf16") or given.get("bfloat16")
    if half:
        new = {"dtype": "bfloat16", "bf16": half != "full"}
    elif given.get("fp16") or given.get("float16"):
        new = {"dtype": "float16", "bf16": False, "fp16": True}
    else:
        new = {"dtype": "float32", "bf16": False}
    migration.recipe |= new
    migration.changes.append(
        f"{named(given) or 'No `bf16` and no `fp16`'} -> {named(new)}: weights are loaded in the precision of the training"
    )


def leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """The single values in a nested value, with dotted keys."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in leaves(f"{key}.{name}", inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(key, inner)]
    return [] if value is None else [(key, value)]


def data(old: dict[str, Any], migration: Migration) -> None:
    entries = []
    for index, given in enumerate(old.pop("datasets", [])):
        where, names = f"datasets[{index}].", ("path", "name", "split", "data_files")
        entries.append({key: given.pop(key) for key in names if given.get(key) is not None})
        for key, value in leaves(where[:-1], given):
            known = FOUND.get(key.removeprefix(where).removeprefix("type."), ())
            if known is not None and value not in known:
                migration.problems.append(
                    f"{shown(key, value)}: this setting has no counterpart. Change the data, for example with `dataset.rename_column`, to columns "
                    "`prompt`, `chosen` and `rejected` and messages with `role` and `content`."
                )
    if not entries or any("path" not in entry for entry in entries):
        migration.problems.append("`datasets` must be a list of entries that all have a `path`. Set `dataset_name`.")
    else:
        name_datasets(entries, migration, "`datasets`")


AXOLOTL = Project(
    name="axolotl",
    marks=MARKS,
    method=method,
    step=step,
    keys={
        "base_model": ("model_name_or_path", NAME),
        "sequence_len": (
            "max_length",
            f"{NAME}. axolotl drops longer pairs; here the end of their answers is cut off",
        ),
        "micro_batch_size": ("per_device_train_batch_size", NAME),
        "eval_batch_size": ("per_device_eval_batch_size", NAME),
        "num_epochs": ("num_train_epochs", NAME),
        "lr_scheduler": ("lr_scheduler_type", NAME),
        "optimizer": ("optim", NAME),
        "rl_beta": ("beta", NAME),
        "trl.beta": ("beta", NAME),
        "dpo_loss_type": ("loss_type", NAME),
        "dpo_loss_weights": ("loss_weights", NAME),
        "dpo_label_smoothing": ("label_smoothing", NAME),
        "dataset_processes": ("dataset_num_proc", NAME),
        "peft_use_dora": ("use_dora", NAME),
        "peft_use_rslora": ("use_rslora", NAME),
        "val_set_size": ("test_split_size", f"{NAME}; below 1 a share of the rows"),
        "wandb_name": ("run_name", NAME),
        "special_tokens.pad_token": ("pad_token", NAME),
        **dict.fromkeys(NOT_NEEDED, UNUSED),
    },
    values={
        "rl": {"dpo": {}, "ipo": {"loss_type": "ipo"}},
        "adapter": {"lora": {"use_peft": True}, "qlora": {"use_peft": True}},
        "lora_target_linear": {True: {"lora_target_modules": ["all-linear"]}},
        **{f"{key}_attention": {True: {"attn_implementation": new}} for key, new in ATTENTION.items()},
        **{f"use_{name}": {True: {"report_to": [name]}} for name in ("wandb", "tensorboard", "mlflow", "trackio")},
    },
    advice={
        "adapter": "TRL's recipes have only LoRA: `use_peft: true` and `lora_r`",
        "batch_size": "set `gradient_accumulation_steps`: `batch_size` divided by `micro_batch_size`",
        **dict.fromkeys((f"special_tokens.{name}_token" for name in ("bos", "eos", "unk")), TOKENIZER),
        "plugins": "there are no plugins. Remove those for speed (Liger, CutCrossEntropy)",
    },
    types={
        "datasets": list[dict[str, Any]],
        "special_tokens": dict[str, Any],
        "trl": dict[str, Any],
        "num_epochs": float,
        "evals_per_epoch": int,
        "saves_per_epoch": int,
    },
    defaults={
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "lora_dropout": 0.0,
        "use_bnb_nested_quant": True,
    },
)
