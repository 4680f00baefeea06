"""
Keys of LLaMA-Factory's recipes, and what they are called here. Facts of its argument classes (`hparams`) and of its DPO trainer.
"""

from typing import TYPE_CHECKING, Any

from .projects import NO_ADAPTER, SHARDING, SPEED, Project, account_of_template


if TYPE_CHECKING:
    from .convert import Migration


STAGES = {"pt": "pretraining", "sft": "SFT", "rm": "Reward", "ppo": "PPO", "kto": "KTO"}
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
NO_VISION = "nothing here trains on images, videos or sound. Remove it if the data is text"
ANOTHER_METHOD = "a setting of another method"


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """The method of a recipe that is not of DPO's family, and what shows it."""
    if "export_dir" in old:
        return "exporting a model", "`export_dir`"
    if "stage" not in old and not old.get("do_train") and "infer_backend" in old:
        return "inference", "`infer_backend`"
    stage = str(old.get("stage") or "")
    if stage != "dpo":
        return STAGES.get(stage or "sft", stage), f"`stage: {stage}`" if stage else "no `stage`, which is SFT"
    others = {"orpo": "ORPO", "simpo": "SimPO", "kto_pair": "KTO"}
    pref_loss = str(old.get("pref_loss"))
    return (others[pref_loss], f"`pref_loss: {pref_loss}`") if pref_loss in others else None


def loss(old: dict[str, Any], migration: "Migration") -> None:
    del old["stage"]
    migration.changes.append("`stage: dpo` left out: the command says it")
    weight = old.pop("pref_ftx", None)
    if weight:
        losses = [old.pop("pref_loss", "sigmoid"), "sft"]
        old |= {"loss_type": losses, "loss_weights": [1.0, float(weight)]}
        migration.changes.append(
            f"`pref_loss`, `pref_ftx: {weight}` -> `loss_type: {losses}`, `loss_weights: [1.0, {float(weight)}]`: TRL's form of the NLL term, a mean "
            "over all tokens where LLaMA-Factory's is over each answer's first"
        )
    elif weight is not None:
        migration.changes.append("`pref_ftx: 0` left out: the default")


def model(old: dict[str, Any], migration: "Migration") -> None:
    finetuning = old.pop("finetuning_type", "lora")
    lora = finetuning == "lora"
    if lora:
        migration.recipe["use_peft"] = True
        migration.changes.append("`finetuning_type: lora`, which is its default too -> `use_peft: true`: TRL's name")
        rank = old.get("lora_rank", 8)
        if "lora_alpha" not in old and isinstance(rank, int):
            migration.recipe["lora_alpha"] = 2 * rank
            migration.changes.append(f"`lora_alpha: {2 * rank}` added: LLaMA-Factory's default, twice the rank")
    elif finetuning == "full":
        migration.changes.append("`finetuning_type: full` left out: without `use_peft` all weights are trained")
    else:
        migration.problems.append(
            f"`finetuning_type: {finetuning}`: a recipe here trains LoRA (`use_peft: true`) or all weights, as it would now. Choose one, or "
            "give a `peft_config` to the trainer in Python."
        )
    if not lora:
        for key in [key for key in old if key.startswith("lora_")]:
            migration.changes.append(f"`{key}: {old.pop(key)}` left out: nothing of LoRA's is trained")
    for key, new in (("lora_target", "lora_target_modules"), ("additional_target", "lora_modules_to_save")):
        names = old.pop(key, None)
        if names:
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            migration.recipe[new] = ["all-linear"] if names == ["all"] else names
            migration.changes.append(f"`{key}` -> `{new}: {migration.recipe[new]}`: TRL's name, a list")
    bits = old.pop("quantization_bit", None)
    if bits in (4, 8):
        migration.recipe[f"load_in_{bits}bit"] = True
        migration.changes.append(f"`quantization_bit: {bits}` -> `load_in_{bits}bit: true`: TRL's name")
    elif bits is not None:
        migration.problems.append(
            f"`quantization_bit: {bits}`: bitsandbytes has 4 (`load_in_4bit`) and 8 (`load_in_8bit`)."
        )
    double = old.pop("double_quantization", True)
    if bits == 4:
        migration.recipe["use_bnb_nested_quant"] = double
        migration.changes.append(f"`double_quantization` -> `use_bnb_nested_quant: {str(double).lower()}`: TRL's name")
    account_of_template(old, migration, "template", ())
    attention = old.pop("flash_attn", None)
    if attention in ATTENTION:
        migration.recipe["attn_implementation"] = ATTENTION[attention]
        more = "; needs flash-attn installed, `sdpa` does not" if attention in ("fa2", "fa3") else ""
        migration.changes.append(
            f"`flash_attn: {attention}` -> `attn_implementation: {ATTENTION[attention]}`: transformers' name{more}"
        )
    elif attention == "auto":
        migration.changes.append("`flash_attn: auto` left out: transformers chooses, as it did")
    elif attention is not None:
        migration.problems.append(f"`flash_attn: {attention}`: set transformers' `attn_implementation`.")


def precision(old: dict[str, Any], migration: "Migration") -> None:
    """LLaMA-Factory loads the weights in the precision of training, and puts those that are trained back into float32."""
    pure = old.pop("pure_bf16", False)
    half = "bfloat16" if old.get("bf16") or pure else "float16" if old.get("fp16") else "auto"
    dtype = half if migration.recipe.get("use_peft") or pure else "float32"
    migration.recipe["dtype"] = dtype
    if pure:
        migration.recipe["bf16"] = False
        migration.changes.append(
            "`pure_bf16` -> `dtype: bfloat16`, `bf16: false`: the weights themselves are trained in bf16"
        )
    else:
        migration.changes.append(f"`dtype: {dtype}` added: so LLaMA-Factory loads the weights")
    if old.pop("disable_gradient_checkpointing", False):
        old["gradient_checkpointing"] = False
        migration.changes.append(
            "`disable_gradient_checkpointing` -> `gradient_checkpointing: false`: transformers' name"
        )
    reentrant = old.pop("use_reentrant_gc", None)
    if reentrant is not None:
        old["gradient_checkpointing_use_reentrant"] = reentrant
        migration.changes.append("`use_reentrant_gc` is an argument of `gradient_checkpointing_kwargs`")


def data(old: dict[str, Any], migration: "Migration") -> None:
    """Names of dataset_info.json, which only LLaMA-Factory reads."""
    names = old.pop("dataset", None)
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names or []
    directory, rows = old.pop("dataset_dir", "data"), old.pop("max_samples", None)
    part = f"train[:{rows}]" if rows else None
    if not names:
        migration.problems.append(
            "`dataset` is missing, and with it what `dataset_dir` and `max_samples` are of. Set `dataset_name`."
        )
    elif directory == "ONLINE":
        if len(names) == 1 and part is None:
            migration.recipe["dataset_name"] = names[0]
            migration.changes.append(
                f"`dataset`, `dataset_dir: ONLINE` -> `dataset_name: {names[0]}`: it is on the Hub"
            )
        else:
            entries = [{"path": name} | ({"split": part} if part else {}) for name in names]
            migration.recipe["datasets"] = entries
            migration.changes.append(
                "`dataset`, `dataset_dir: ONLINE` and `max_samples` -> `datasets`: TRL's form, with a slice of the split"
            )
    else:
        slices = f", split: '{part}'" if part else ""
        entries = ", ".join(f"{{path: ...{slices}}}" for _ in names)
        key = "dataset_name: ..." if len(names) == 1 and part is None else f"datasets: [{entries}]"
        keep = f"`max_samples: {rows}` is the slice `{part}`. " if rows else ""
        migration.problems.append(
            f"`dataset: {', '.join(names)}`: names of LLaMA-Factory's {directory}/dataset_info.json (`dataset_dir`). {keep}Write `{key}` with what the entry "
            f"there names: its `hf_hub_url` (`subset` is TRL's `name`, or `dataset_config`), or the file {directory}/<file_name>. Rows in its "
            "two formats are read as they are; a column that the entry gives another name must be renamed in the data."
        )
    test = old.pop("eval_dataset", None)
    if test:
        migration.problems.append(
            f"`eval_dataset: {test}`: a recipe names training data, and a split of it. Put `train.jsonl` and `test.jsonl` in one directory "
            "and name that in `dataset_name`, or set `test_split_size: 0.05`."
        )
    size = old.pop("val_size", None)
    if size:
        migration.recipe["test_split_size"] = size
        migration.changes.append(f"`val_size` -> `test_split_size: {size}`: TRL's name; from 1 a number of rows")
    elif size is not None:
        migration.changes.append("`val_size: 0` left out: no rows are kept for an evaluation")
    if old.get("streaming") and "dataset_name" in migration.recipe:
        old["dataset_streaming"] = old.pop("streaming")
        migration.changes.append("`streaming` -> `dataset_streaming`: TRL's name for one dataset")
    if old.pop("disable_shuffling", False):
        migration.recipe["train_sampling_strategy"] = "sequential"
        migration.changes.append("`disable_shuffling` -> `train_sampling_strategy: sequential`: transformers' name")


LLAMA_FACTORY = Project(
    name="LLaMA-Factory",
    marks=frozenset(
        {
            *(
                "stage",
                "finetuning_type",
                "template",
                "dataset",
                "dataset_dir",
                "cutoff_len",
                "pref_beta",
                "pref_loss",
                "lora_rank",
            ),
            *(
                "lora_target",
                "quantization_bit",
                "plot_loss",
                "overwrite_cache",
                "val_size",
                "infer_backend",
                "export_dir",
            ),
        }
    ),
    method=method,
    steps=(loss, model, precision, data),
    switches=("pure_bf16", "disable_gradient_checkpointing", "disable_shuffling"),
    types={
        "finetuning_type": str,
        "flash_attn": str,
        "pref_loss": str,
        "dataset": str | list[str],
        "lora_target": str | list[str],
        "additional_target": str | list[str],
        "dataset_dir": str,
        "pref_ftx": float,
        "val_size": float,
        "max_samples": int,
        "quantization_bit": int,
    },
    renamed={
        "cutoff_len": (
            "max_length",
            "TRL's name. Longer pairs lose the end of their answers; a prompt is never cut here",
        ),
        "pref_beta": ("beta", "TRL's name"),
        "pref_loss": ("loss_type", "TRL's name"),
        "dpo_label_smoothing": ("label_smoothing", "TRL's name"),
        "lora_rank": ("lora_r", "TRL's name"),
        "quantization_type": ("bnb_4bit_quant_type", "TRL's name"),
    },
    gone={
        "plot_loss": "a tracker draws it: `report_to: tensorboard`",
        "overwrite_cache": "`datasets` keeps its own cache",
        "preprocessing_batch_size": "`datasets` keeps its own cache",
        "tokenized_path": "`datasets` keeps its own cache",
        "data_shared_file_system": "`datasets` keeps its own cache",
        "buffer_size": "`datasets` has one of its own for streams",
        "ignore_pad_token_for_loss": "padding is never trained on",
        "use_fast_tokenizer": "tokenizers are always fast ones",
        "low_cpu_mem_usage": "transformers always loads so",
        "quantization_device_map": "the launcher says it",
        "include_effective_tokens_per_second": "`include_num_input_tokens_seen: all` is transformers' count",
        "compute_accuracy": "`rewards/accuracies` is in the logs",
        "print_param_status": "it said nothing of the training",
        "use_unsloth": SPEED,
        "use_unsloth_gc": SPEED,
        "enable_liger_kernel": SPEED,
        "use_v1_kernels": SPEED,
        "use_kv_cache": "it is for inference",
        "infer_backend": "it is for inference",
        "infer_dtype": "it is for inference",
        "vllm_*": "it is for inference",
        "sglang_*": "it is for inference",
        "freeze_*": "it belongs to `finetuning_type: freeze`, or to models of images",
        "galore_*": "it belongs to `use_galore`",
        "apollo_*": "it belongs to `use_apollo`",
        "badam_*": "it belongs to `use_badam`",
        "ray_*": "it is for a launch on Ray; here `num_processes` and `accelerate_config` are",
        "kto_*": ANOTHER_METHOD,
        "ppo_*": ANOTHER_METHOD,
        "simpo_gamma": ANOTHER_METHOD,
        "reward_*": ANOTHER_METHOD,
        "swanlab_*": "a tracker's own setting, which it takes from its environment variables: `env: {SWANLAB_...: ...}`",
        "use_swanlab": "`report_to: swanlab` is transformers' name",
    },
    neutral={
        "quantization_method": ("bnb", "name a checkpoint that is not quantized, and set `load_in_4bit: true`"),
        "pref_bco_weight": (0, "TRL's `bco_pair` is another form of it, and `trl.DPOTrainer` has it"),
        "ref_model": (
            None,
            "give `ref_model` to the trainer in Python; without it the reference is the model as it starts",
        ),
        "ref_model_adapters": (None, "give `ref_model` to the trainer in Python, with its adapter merged"),
        "ref_model_quantization_bit": (None, "the reference is loaded as the model is"),
        "adapter_name_or_path": (None, NO_ADAPTER),
        "adapter_folder": (None, NO_ADAPTER),
        "create_new_adapter": (False, NO_ADAPTER),
        "pissa_init": (
            False,
            "make the adapter and its base with PEFT's PiSSA first; or give a `peft_config` in Python",
        ),
        "loraplus_lr_ratio": (None, "give the optimizer of PEFT's LoRA+ to the trainer in Python"),
        "rope_scaling": (None, "write it into the model's own config.json"),
        "resize_vocab": (False, "resize the embeddings once, save the model, and name it in `model_name_or_path`"),
        "add_tokens": (
            None,
            "add them to the tokenizer, resize and save the model, and name it in `model_name_or_path`",
        ),
        "add_special_tokens": (
            None,
            "add them to the tokenizer, resize and save the model, and name it in `model_name_or_path`",
        ),
        "shift_attn": (False, "nothing here has it. Stay with LLaMA-Factory"),
        "mixture_of_depths": (None, "nothing here has it. Stay with LLaMA-Factory"),
        "upcast_layernorm": (False, "`dtype: float32` loads all weights so"),
        "upcast_lmhead_output": (False, "log-probabilities are always float32 here. Remove it"),
        "train_from_scratch": (False, "train the model first; preference training refines one"),
        "packing": (False, "pairs are not packed. `padding_free: true` is TRL's way to do without padding"),
        "neat_packing": (False, "pairs are not packed. `padding_free: true` is TRL's way to do without padding"),
        "train_on_prompt": (False, "a preference loss is one of the answers alone. Remove it"),
        "mask_history": (False, "a preference loss is one of the last answers alone. Remove it"),
        "mix_strategy": ("concat", "rows are concatenated. Shares are `fraction`, in TRL's `datasets:`"),
        "interleave_probs": (None, "rows are concatenated. Shares are `fraction`, in TRL's `datasets:`"),
        "eval_on_each_dataset": (False, "one evaluation split is evaluated. Remove it"),
        "default_system": (None, "give the rows a column `system`"),
        "tool_format": (None, "the chat template renders tools; give the rows a column `tools`"),
        "enable_thinking": (True, "give the rows a column `chat_template_kwargs`, with `enable_thinking` in it"),
        "media_dir": (None, NO_VISION),
        "image_max_pixels": (None, NO_VISION),
        "image_min_pixels": (None, NO_VISION),
        "video_max_pixels": (None, NO_VISION),
        "video_min_pixels": (None, NO_VISION),
        "video_fps": (None, NO_VISION),
        "video_maxlen": (None, NO_VISION),
        "audio_sampling_rate": (None, NO_VISION),
        "deepspeed": (None, SHARDING),
        "fsdp": ("", SHARDING),
        "fsdp_config": (None, SHARDING),
        "fp8": (False, "nothing here trains in fp8. Set `bf16: true`"),
        "use_galore": (False, "`optim: galore_adamw` with `optim_target_modules` is transformers'"),
        "use_apollo": (False, "`optim: apollo_adamw` with `optim_target_modules` is transformers'"),
        "use_badam": (False, "set one of transformers' `optim`"),
        "use_adam_mini": (False, "set one of transformers' `optim`"),
        "use_muon": (False, "set one of transformers' `optim`"),
        "use_llama_pro": (False, "nothing here has it. Stay with LLaMA-Factory"),
        "use_mca": (False, SHARDING),
        "use_megatron_bridge": (False, SHARDING),
        "moe_aux_loss_coef": (None, "`router_aux_loss_coef` is TRL's name, and the model must return router logits"),
        "early_stopping_steps": (None, "give `EarlyStoppingCallback` to the trainer in Python"),
        "predict_with_generate": (False, "nothing is generated during the evaluation. Remove it"),
        "hf_hub_token": (
            None,
            "tokens are no matter of recipes: run `hf auth login`, or set HF_TOKEN in the environment",
        ),
        "ms_hub_token": (None, "models and data come from the Hugging Face Hub, or from directories"),
    },
    defaults={
        "max_length": 2048,
        "learning_rate": 5.0e-5,
        "logging_steps": 500,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    },
)
