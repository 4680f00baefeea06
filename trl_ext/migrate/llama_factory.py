"""
Keys of LLaMA-Factory's recipes, from its argument classes (`hparams`) and its DPO trainer.
"""

from typing import Any

from .projects import NAME, UNUSED, Migration, Project, name_datasets


STAGES = {"pt": "pretraining", "sft": "SFT", "rm": "Reward", "ppo": "PPO", "kto": "KTO"}
LOSSES = {"orpo": "ORPO", "simpo": "SimPO", "kto_pair": "KTO"}
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
MARKS = frozenset(
    "stage finetuning_type template dataset dataset_dir cutoff_len pref_beta pref_loss lora_rank lora_target quantization_bit plot_loss "
    "overwrite_cache val_size infer_backend export_dir".split()
)
NOT_NEEDED = (
    "plot_loss overwrite_cache preprocessing_batch_size tokenized_path use_fast_tokenizer low_cpu_mem_usage print_param_status "
    "compute_accuracy use_unsloth* use_kv_cache enable_liger_kernel use_v1_kernels infer_* vllm_* sglang_* freeze_* kto_* ppo_* reward_* "
    "simpo_gamma ray_* include_effective_tokens_per_second"
).split()


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """The method of a recipe outside of DPO's family, and the evidence for it."""
    if "export_dir" in old:
        return "exporting a model", "`export_dir`"
    if "infer_backend" in old and not old.get("stage") and not old.get("do_train"):
        return "inference", "`infer_backend`"
    stage, pref_loss = str(old.get("stage") or "sft"), str(old.get("pref_loss"))
    if stage != "dpo":
        return STAGES.get(stage, stage), f"`stage: {stage}`" if old.get("stage") else "no `stage`, which is SFT"
    return (LOSSES[pref_loss], f"`pref_loss: {pref_loss}`") if pref_loss in LOSSES else None


def step(old: dict[str, Any], migration: Migration) -> None:
    for key in ("lora_target", "additional_target"):
        if isinstance(old.get(key), str):
            names = [name.strip() for name in old[key].split(",")]
            old[key] = ["all-linear"] if names == ["all"] else names
    lora = old.setdefault("finetuning_type", "lora") == "lora"
    if lora and "lora_alpha" not in old and isinstance(rank := old.get("lora_rank", 8), int):
        migration.recipe["lora_alpha"] = 2 * rank
        migration.changes.append(f"`lora_alpha: {2 * rank}` added: LLaMA-Factory's default, twice the rank")
    if not old.get("pure_bf16"):
        half = "bfloat16" if old.get("bf16") else "float16" if old.get("fp16") else "auto"
        old["dtype"] = half if lora else "float32"
        migration.changes.append(
            f"`dtype: {old['dtype']}` added: the precision in which LLaMA-Factory loads the weights"
        )
    data(old, migration)


def data(old: dict[str, Any], migration: Migration) -> None:
    """Convert names of dataset_info.json, which only LLaMA-Factory reads."""
    names, directory, rows = old.pop("dataset", []), old.pop("dataset_dir", "data"), old.pop("max_samples", None)
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    entries = [{"path": name} | ({"split": f"train[:{rows}]"} if rows else {}) for name in names]
    if names and directory == "ONLINE":
        name_datasets(entries, migration, "`dataset`, `dataset_dir`" + (", `max_samples`" if rows else ""))
        return
    slices = f", and `split: train[:{rows}]` in each for `max_samples`" if rows else ""
    migration.problems.append(
        f"`dataset: {', '.join(names)}`: names of {directory}/dataset_info.json (`dataset_dir`). Write `dataset_name`, or `datasets: [{{path: ...}}]` "
        f"for several, with the `hf_hub_url` or the file that the entry has there{slices}. Rows in LLaMA-Factory's formats need no conversion."
    )


LLAMA_FACTORY = Project(
    name="LLaMA-Factory",
    marks=MARKS,
    method=method,
    step=step,
    keys={
        "cutoff_len": ("max_length", f"{NAME}. Only the end of a longer answer is cut off, never a prompt"),
        "pref_beta": ("beta", NAME),
        "pref_loss": ("loss_type", NAME),
        "pref_ftx": ("rpo_alpha", "TRL's older name"),
        "dpo_label_smoothing": ("label_smoothing", NAME),
        "lora_rank": ("lora_r", NAME),
        "lora_target": ("lora_target_modules", f"{NAME}, a list"),
        "additional_target": ("lora_modules_to_save", f"{NAME}, a list"),
        "quantization_type": ("bnb_4bit_quant_type", NAME),
        "template": ("chat_template", "the usual name"),
        "val_size": ("test_split_size", f"{NAME}; from 1 a number of rows"),
        **dict.fromkeys(NOT_NEEDED, UNUSED),
    },
    values={
        "stage": {"dpo": {}},
        "finetuning_type": {"lora": {"use_peft": True}, "full": {}},
        "quantization_bit": {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}},
        "double_quantization": {yes: {"use_bnb_nested_quant": yes} for yes in (True, False)},
        "use_reentrant_gc": {yes: {"gradient_checkpointing_kwargs": {"use_reentrant": yes}} for yes in (True, False)},
        "flash_attn": {"auto": {}} | {old: {"attn_implementation": new} for old, new in ATTENTION.items()},
        "pure_bf16": {True: {"dtype": "bfloat16", "bf16": False}},
        "disable_gradient_checkpointing": {True: {"gradient_checkpointing": False}},
        "disable_shuffling": {True: {"train_sampling_strategy": "sequential"}},
        "enable_thinking": {True: {}},
    },
    advice={
        "finetuning_type": "recipes train LoRA (`use_peft: true`) or all weights. This one would train all weights",
        "enable_thinking": "add a column `chat_template_kwargs` with `enable_thinking` to the data",
    },
    types={"dataset": str | list[str], "dataset_dir": str, "max_samples": int, "pref_loss": str, "pref_ftx": float},
    defaults={
        "max_length": 2048,
        "learning_rate": 5.0e-5,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "use_bnb_nested_quant": True,
    },
)
