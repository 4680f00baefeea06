"""
Keys of axolotl's recipes, and what they are called here. Facts of its configuration schema and of how it builds TRL's `DPOConfig`.

RLHFlow's recipes of SFT and of generative reward models are axolotl's too.
"""

from typing import TYPE_CHECKING, Any

from .projects import NO_ADAPTER, SHARDING, SPEED, Project, account_of_template, column_problems


if TYPE_CHECKING:
    from .convert import Migration


ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
}
TRACKERS = {
    "use_wandb": "wandb",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
    "use_swanlab": "swanlab",
}
PRECISIONS = ("bf16", "bfloat16", "fp16", "float16", "float32")
# Optimizers of axolotl's own, which transformers does not know
OPTIMIZERS = (
    *("optimi_adamw", "ao_adamw_fp8", "adopt_adamw", "came_pytorch", "muon", "dion", "sinkgd", "q_galore_adamw8bit"),
    *("flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion", "adamw_anyprecision"),
)
# Second half of a dataset's `type` -> columns that it reads, with other names than the loader knows -> TRL's
KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "intel": {},
    "argilla": {},
    "argilla_chat": {},
    "prompt_pairs": {},
    "ultra": {},
    "icr": {"input": "prompt"},
}
FAMILIES = ("chat_template", "chatml", "llama3", "passthrough", "zephyr", "user_defined")
# Field of a dataset -> the column it names, when the loader would find it by itself
FIELDS = {
    "field_messages": ("messages", ("messages", "conversations", "prompt")),
    "field_prompt": ("prompt", ("prompt", "question", "instruction", "query")),
    "field_system": ("system", ("system", "system_prompt")),
    "field_chosen": ("chosen", ("chosen", "chosen_response")),
    "field_rejected": ("rejected", ("rejected", "rejected_response")),
}
ROLES = {"user": {"user", "human"}, "assistant": {"assistant", "gpt", "model"}, "system": {"system"}, "tool": {"tool"}}
NO_EVALUATION = "without `val_set_size` and `test_datasets` axolotl evaluates nothing"
# Names of a message's fields that the loader knows
CONTENTS = {
    "message_property_mappings": ("role", "content", "from", "value"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
}
LEFT_TO_LOADER = (*CONTENTS, "ds_type", "trust_remote_code")


def method(old: dict[str, Any]) -> tuple[str, str] | None:
    """The method of a recipe that is not DPO's or IPO's, and what shows it."""
    rl = old.get("rl")
    if rl in ("dpo", "ipo"):
        return None
    if rl:
        return {"simpo": "SimPO"}.get(str(rl), str(rl).upper()), f"`rl: {rl}`"
    for key, name in (
        ("reward_model", "Reward"),
        ("process_reward_model", "PRM"),
        ("pretraining_dataset", "pretraining"),
    ):
        if old.get(key):
            return name, f"`{key}`"
    entries = [entry for entry in old.get("datasets") or [] if isinstance(entry, dict)]
    paths = [str(entry.get("path")) for entry in entries]
    if any(path.startswith("RLHFlow/") for path in paths):
        words = ("ORM", "PRM", "preference")
        if any(word in path for word in words for path in paths):
            return "generative reward models", f"one of RLHFlow's, no `rl`, and the data {', '.join(paths)}"
        return "SFT", "one of RLHFlow's, with no `rl`"
    return "SFT", "no `rl`"


def loss(old: dict[str, Any], migration: "Migration") -> None:
    if old.pop("rl") == "ipo":
        old["loss_type"] = "ipo"
        migration.changes.append("`rl: ipo` -> `loss_type: ipo`: TRL's name")
    else:
        migration.changes.append("`rl: dpo` left out: the command says it, and `loss_type: sigmoid` is the default")
    nested = old.pop("trl", None) or {}
    for key, value in nested.items():
        if key == "beta":
            old["beta"] = value
            old.pop("rl_beta", None)
            migration.changes.append("`trl.beta` -> `beta`: TRL's name; axolotl prefers it to `rl_beta`")
        else:
            migration.problems.append(f"`trl.{key}`: a key of GRPO, which DPO does not read. Remove it.")


def model(old: dict[str, Any], migration: "Migration") -> None:
    adapter = old.pop("adapter", None)
    if adapter in ("lora", "qlora"):
        migration.recipe["use_peft"] = True
        migration.changes.append(f"`adapter: {adapter}` -> `use_peft: true`: TRL's name")
        if old.get("load_in_4bit"):
            migration.recipe["use_bnb_nested_quant"] = True
            migration.changes.append("`use_bnb_nested_quant: true` added: axolotl always quantizes twice")
        if old.pop("lora_target_linear", None):
            listed = old.pop("lora_target_modules", None)
            migration.recipe["lora_target_modules"] = ["all-linear"]
            more = ", which holds those of `lora_target_modules` too" if listed else ""
            migration.changes.append(f"`lora_target_linear` -> `lora_target_modules: [all-linear]`: PEFT's name{more}")
    elif adapter:
        migration.problems.append(
            f"`adapter: {adapter}`: TRL's recipes have LoRA alone. Set `use_peft: true` and `lora_r`, or give a "
            "`peft_config` to the trainer in Python."
        )
    else:
        for key in [key for key in old if key.startswith("lora_")]:
            migration.changes.append(f"`{key}: {old.pop(key)}` left out: without `adapter` all weights are trained")
    tokens = old.pop("special_tokens", None) or {}
    for name, token in tokens.items():
        if token is None:
            continue
        if name == "pad_token":
            migration.recipe[name] = token
            migration.changes.append("`special_tokens.pad_token` -> `pad_token`: TRL's name")
        else:
            migration.problems.append(
                f"`special_tokens.{name}: {token}`: the tokens are the tokenizer's. Set it there, save tokenizer and model in one "
                "directory, and name that in `model_name_or_path`; if the tokenizer has it already, nothing is to be done."
            )
    account_of_template(old, migration, "chat_template", ("tokenizer_default",))
    attention = [key for key in ATTENTION if old.pop(key, None)]
    if attention:
        old.setdefault("attn_implementation", ATTENTION[attention[0]])
        migration.changes.append(
            f"`{attention[0]}` -> `attn_implementation: {old['attn_implementation']}`: transformers' name"
        )
    if old.get("attn_implementation") == "flash_attention_2":
        migration.changes.append(
            "`attn_implementation: flash_attention_2` needs flash-attn installed; `sdpa` does not"
        )


def precision(old: dict[str, Any], migration: "Migration") -> None:
    """axolotl loads the weights in the precision that it trains with."""
    given = {key: old.pop(key) for key in PRECISIONS if key in old}
    shown = ", ".join(f"`{key}: {value}`" for key, value in given.items()) or "no `bf16` and no `fp16`"
    bf16, fp16 = (given.get(short) or given.get(long) for short, long in (("bf16", "bfloat16"), ("fp16", "float16")))
    if bf16 == "auto":
        shown += ", on a GPU that has bf16,"
    if bf16:
        dtype, trained = "bfloat16", {"bf16": False, "bf16_full_eval": True} if bf16 == "full" else {"bf16": True}
    elif fp16:
        dtype, trained = "float16", {"bf16": False, "fp16": True}
    else:
        dtype, trained = ("float16" if old.get("load_in_8bit") else "float32"), {"bf16": False}
    migration.recipe |= {"dtype": dtype, **trained}
    named = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in {"dtype": dtype, **trained}.items())
    migration.changes.append(f"{shown} -> {named}: axolotl loads the weights as it trains them")
    tf32 = old.pop("tf32", None)
    if isinstance(tf32, bool):
        migration.recipe["tf32"] = tf32
        migration.kept.append("tf32")
    elif tf32 is not None:
        migration.changes.append(f"`tf32: {tf32}` left out: torch decides, as it does without the key")
    if isinstance(old.get("gradient_checkpointing"), str):
        migration.changes.append(
            f"`gradient_checkpointing: {old['gradient_checkpointing']}` -> `gradient_checkpointing: true`: TRL's "
            "`activation_offloading: true` moves activations to the CPU"
        )
        old["gradient_checkpointing"] = True


def schedule(old: dict[str, Any], migration: "Migration") -> None:
    """Evaluation, saving, batches and trackers."""
    epochs = old.get("num_epochs") or 1
    size = old.pop("val_set_size", None)
    evaluates = bool(size or old.get("test_datasets"))
    if size:
        migration.recipe["test_split_size"] = size
        migration.changes.append(
            f"`val_set_size` -> `test_split_size: {size}`: TRL's name; below 1 a share of the rows"
        )
    elif size is not None:
        migration.changes.append(f"`val_set_size: {size}` left out: no rows are kept for an evaluation")
    for key, strategy, steps in (
        ("evals_per_epoch", "eval_strategy", "eval_steps"),
        ("saves_per_epoch", "save_strategy", "save_steps"),
    ):
        times = old.pop(key, None)
        if times is None:
            continue
        if not times:
            migration.changes.append(f"`{key}` left out: it said nothing")
        elif strategy == "eval_strategy" and not evaluates:
            migration.changes.append(f"`{key}` left out: {NO_EVALUATION}")
        elif times != 1 and times * epochs <= 1:
            migration.changes.append(f"`{key}` left out: that is at the end alone")
        elif times == 1:
            migration.recipe[strategy] = "epoch"
            migration.changes.append(f"`{key}: 1` -> `{strategy}: epoch`: transformers' name")
        else:
            migration.recipe |= {strategy: "steps", steps: round(1 / (times * epochs), 6)}
            migration.changes.append(
                f"`{key}: {times}` -> `{steps}: {migration.recipe[steps]}`: below 1 a share of all steps, here of {epochs} epochs"
            )
    if old.get("eval_steps"):
        old.setdefault("eval_strategy", "steps")
    for key in ("eval_strategy", "eval_steps"):
        if not evaluates and old.pop(key, None) is not None:
            migration.changes.append(f"`{key}` left out: {NO_EVALUATION}")
    if old.get("save_steps"):
        old["save_strategy"] = "steps"
    total, micro = old.pop("batch_size", None), old.get("micro_batch_size") or 1
    if total and not old.get("gradient_accumulation_steps"):
        old["gradient_accumulation_steps"] = max(total // micro, 1)
        migration.changes.append(
            f"`batch_size: {total}` -> `gradient_accumulation_steps: {old['gradient_accumulation_steps']}`: so many micro-batches"
        )
    elif total:
        migration.changes.append("`batch_size` left out: `gradient_accumulation_steps` says it")
    if old.get("micro_batch_size") and not old.get("eval_batch_size"):
        migration.recipe["per_device_eval_batch_size"] = micro
        migration.changes.append(
            f"`per_device_eval_batch_size: {micro}` added: axolotl evaluates with `micro_batch_size`"
        )
    given = {key: name for key, name in TRACKERS.items() if old.pop(key, False)}
    if old.get("wandb_project") and "use_wandb" not in given:
        given["wandb_project"] = "wandb"
    if given:
        migration.recipe["report_to"] = list(given.values())
        shown = ", ".join(f"`{key}`" for key in given)
        migration.changes.append(f"{shown} -> `report_to: {migration.recipe['report_to']}`: transformers' name")
    if old.get("hub_model_id"):
        migration.recipe["push_to_hub"] = True
        migration.changes.append("`push_to_hub: true` added: axolotl pushes if `hub_model_id` is there")
    if old.get("optimizer") in OPTIMIZERS:
        migration.problems.append(
            f"`optimizer: {old.pop('optimizer')}`: axolotl's own. Set one of transformers' `optim`, such as `adamw_torch_fused`, or "
            "give `optimizers` to the trainer in Python."
        )
    if old.get("lr_scheduler") in ("one_cycle", "rex"):
        migration.problems.append(
            f"`lr_scheduler: {old.pop('lr_scheduler')}`: axolotl's own. Set one of transformers' `lr_scheduler_type`, such as `cosine`."
        )


def data(old: dict[str, Any], migration: "Migration") -> None:
    given = old.pop("datasets", None)
    if not given or not all(entry.get("path") for entry in given):
        migration.problems.append("`datasets` is no list of entries that all have a `path`. Set `dataset_name`.")
        given = []
    entries = [_entry(f"`datasets[{index}]", dict(entry), migration) for index, entry in enumerate(given)]
    tests = old.pop("test_datasets", None) or []
    if len(entries) == 1 and not entries[0].keys() & {"data_files"} and "[" not in str(entries[0].get("split")):
        [entry] = entries
        names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        migration.recipe |= {names[key]: value for key, value in entry.items()}
        migration.changes.append(f"`datasets` -> `dataset_name: {entry['path']}`: one dataset needs no mixture")
    elif entries:
        migration.recipe["datasets"] = entries
        migration.changes.append("`datasets` -> `datasets`: TRL's form, with `path`, `name`, `split` and `data_files`")
    if len(tests) == 1 and tests[0].get("path") == migration.recipe.get("dataset_name") and tests[0].get("split"):
        migration.recipe["dataset_test_split"] = tests[0]["split"]
        migration.changes.append(f"`test_datasets` -> `dataset_test_split: {tests[0]['split']}`: TRL's name")
    elif tests:
        migration.problems.append(
            f"`test_datasets`: {tests}: a recipe names training data, and a split of it. "
            "Put `train.jsonl` and `test.jsonl` in one directory and name that in `dataset_name`, or set `test_split_size: 0.05`."
        )


def _entry(where: str, given: dict[str, Any], migration: "Migration") -> dict[str, Any]:
    """One dataset: path, name, split and files; its `type` and fields are judged by the columns they read."""
    split = given.pop("split", None) or given.pop("train_on_split", None)
    given.pop("train_on_split", None)
    entry = {
        "path": str(given.pop("path")),
        "name": given.pop("name", None),
        "split": split,
        "data_files": given.pop("data_files", None),
    }
    kind, fields = given.pop("type", None), {}
    if isinstance(kind, dict):
        fields = {key: kind.pop(key) for key in list(kind) if key in FIELDS}
        for key in ("prompt_format", "chosen_format", "rejected_format"):
            text = kind.pop(key, None)
            name = key.removesuffix("_format")
            if text and text != f"{{{name}}}":
                migration.problems.append(
                    f"{where}.type.{key}`: {text!r} is written around the text here. If it is the chat template's, remove it: the "
                    "tokenizer's own is used for messages. If not: "
                    f"`dataset.map(lambda row: {{{name!r}: {text!r}.format(**row)}})`."
                )
        migration.problems += [f"{where}.type.{key}`: nothing here reads it. Remove it." for key in kind]
        migration.changes.append(f"{where}.type` left out: rows are recognised by their columns")
    elif kind:
        family, _, second = str(kind).partition(".")
        renamed = KINDS.get(second or "default")
        if family not in FAMILIES or renamed is None:
            migration.problems.append(
                f"{where}.type: {kind}`: the rows' columns must be `prompt`, `chosen` and `rejected`, as text or messages, or of a format "
                "that the loader knows. `trl-ext doctor` says whether they are."
            )
        else:
            written = "" if family in ("chat_template", "passthrough") else f", not axolotl's `{family}`"
            migration.changes.append(
                f"{where}.type: {kind}` left out: rows are recognised by their columns and rendered with the tokenizer's own chat "
                f"template{written}"
            )
            migration.problems += column_problems(f"{where}.type: {kind}`", entry["path"], renamed)
    fields |= {key: given.pop(key) for key in list(given) if key in FIELDS}
    unknown = {key: str(name) for key, name in fields.items() if name and name not in FIELDS[key][1]}
    for key in [key for key in fields if key not in unknown]:
        migration.changes.append(f"{where}.{key}` left out: a column of this name is found")
    shown = "`, `".join(f"{key}: {name}" for key, name in unknown.items())
    renamed = {name: FIELDS[key][0] for key, name in unknown.items()}
    migration.problems += column_problems(f"{where}.{shown}`", entry["path"], renamed)
    roles = given.pop("roles", None) or {}
    known = isinstance(roles, dict) and all(
        isinstance(names, list) and {str(name) for name in names} <= ROLES.get(role, set())
        for role, names in roles.items()
    )
    if not known:
        migration.problems.append(
            f"{where}.roles`: {roles}: rename the roles in the data to `system`, `user` and `assistant`."
        )
    for key in [key for key in CONTENTS if key in given]:
        named = given[key].values() if isinstance(given[key], dict) else [given[key]]
        if any(name not in CONTENTS[key] for name in named if name is not None):
            migration.problems.append(
                f"{where}.{key}: {given.pop(key)}`: rename these fields of the messages in the data to `role` and `content`."
            )
    left = [key for key in LEFT_TO_LOADER if given.pop(key, None) is not None] + (["roles"] if roles and known else [])
    if left:
        migration.changes.append(
            f"{where}.{'`, `'.join(left)}` left out: the loader finds roles and contents by itself"
        )
    if given.pop("conversation", None):
        migration.changes.append(f"{where}.conversation` left out: the tokenizer's own chat template is used")
    migration.problems += [
        f"{where}.{key}: {value}`: has no counterpart in TRL's `datasets:`. Remove it, or apply it to the data once and name the result."
        for key, value in given.items()
        if value is not None
    ]
    return {key: value for key, value in entry.items() if value is not None}


AXOLOTL = Project(
    name="axolotl",
    marks=frozenset(
        {
            *("base_model", "micro_batch_size", "num_epochs", "sequence_len", "sample_packing", "val_set_size", "rl"),
            *("dataset_prepared_path", "lora_target_linear", "lora_model_dir", "evals_per_epoch", "saves_per_epoch"),
            *("pad_to_sequence_len", "tokenizer_type", "special_tokens", "adapter", "optimizer", "lr_scheduler"),
        }
    ),
    method=method,
    steps=(loss, schedule, data, model, precision),
    switches=(*ATTENTION, *TRACKERS, *PRECISIONS, "lora_target_linear"),
    types={
        "rl": str,
        "adapter": str,
        "lr_scheduler": str,
        "optimizer": str,
        "trl": dict[str, Any],
        "special_tokens": dict[str, Any],
        "datasets": list[dict[str, Any]],
        "test_datasets": list[dict[str, Any]],
        "num_epochs": float,
        "val_set_size": float,
        "evals_per_epoch": int,
        "saves_per_epoch": int,
        "batch_size": int,
        "micro_batch_size": int,
    },
    renamed={
        "base_model": ("model_name_or_path", "TRL's name"),
        "revision_of_model": ("model_revision", "TRL's name"),
        "sequence_len": (
            "max_length",
            "TRL's name. axolotl drops longer pairs; here the end of their answers is cut, and a row whose prompt alone fills it is left "
            "out and counted",
        ),
        "micro_batch_size": ("per_device_train_batch_size", "transformers' name"),
        "eval_batch_size": ("per_device_eval_batch_size", "transformers' name"),
        "num_epochs": ("num_train_epochs", "transformers' name"),
        "lr_scheduler": ("lr_scheduler_type", "transformers' name"),
        "optimizer": ("optim", "transformers' name"),
        "rl_beta": ("beta", "TRL's name"),
        "dpo_beta": ("beta", "TRL's name"),
        "dpo_loss_type": ("loss_type", "TRL's name"),
        "dpo_loss_weights": ("loss_weights", "TRL's name"),
        "dpo_label_smoothing": ("label_smoothing", "TRL's name"),
        "dpo_use_weighting": ("use_weighting", "TRL's name"),
        "dpo_padding_free": ("padding_free", "TRL's name"),
        "dataset_processes": ("dataset_num_proc", "TRL's name"),
        "peft_use_dora": ("use_dora", "TRL's name"),
        "peft_use_rslora": ("use_rslora", "TRL's name"),
        "wandb_name": ("run_name", "transformers' name"),
    },
    gone={
        "model_type": "the checkpoint's own configuration says it",
        "tokenizer_type": "the checkpoint's own configuration says it",
        "tokenizer_use_fast": "the checkpoint's own configuration says it",
        "tokenizer_legacy": "the checkpoint's own configuration says it",
        "processor_type": "the checkpoint's own configuration says it",
        "is_falcon_derived_model": "the checkpoint's own configuration says it",
        "is_llama_derived_model": "the checkpoint's own configuration says it",
        "is_mistral_derived_model": "the checkpoint's own configuration says it",
        "is_qwen_derived_model": "the checkpoint's own configuration says it",
        "eot_tokens": "the chat template ends the turns, and answers are trained with its end",
        "strict": "unknown keys are always errors here",
        "dataset_prepared_path": "`datasets` keeps its own cache",
        "dataset_keep_in_memory": "`datasets` keeps its own cache",
        "shuffle_merged_datasets": "the trainer shuffles",
        "shuffle_before_merging_datasets": "the trainer shuffles",
        "train_on_inputs": "a preference loss is one of the answers alone",
        "remove_unused_columns": "the trainer needs none but its own",
        "excess_length_strategy": "the end of an answer that is too long is cut; filter the data to drop such pairs",
        "eval_sample_packing": "pairs are not packed",
        "group_by_length": "`train_sampling_strategy: group_by_length` is transformers' name; axolotl's DPO does not read it",
        "loss_watchdog_threshold": "nothing stops the run at a high loss; `loss` is in the logs",
        "loss_watchdog_patience": "nothing stops the run at a high loss; `loss` is in the logs",
        "eval_table_size": "no samples are generated during the evaluation",
        "eval_max_new_tokens": "no samples are generated during the evaluation",
        "eval_table_max_new_tokens": "no samples are generated during the evaluation",
        "generate_samples": "no samples are generated during the evaluation",
        "debug": "it said nothing of the training",
        "local_rank": "the launcher says it",
        "ddp": "the launcher says it",
        "device_map": "the launcher says it",
        "experimental_skip_move_to_device": "the launcher says it",
        "merge_lora": "the adapter is saved; `peft`'s `merge_and_unload` merges it",
        "use_kernels": SPEED,
        "cut_cross_entropy": SPEED,
        "dpo_use_liger_kernel": SPEED,
        "lora_mlp_kernel": SPEED,
        "lora_qkv_kernel": SPEED,
        "lora_o_kernel": SPEED,
        "lora_embedding_kernel": SPEED,
        "liger_*": SPEED,
        "flash_attn_*": SPEED,
        "torchdistx_path": "it belongs to an optimizer that is not there",
        "swanlab_*": "a tracker's own setting, which it takes from its environment variables: `env: {SWANLAB_...: ...}`",
        "mlflow_*": "a tracker's own setting, which it takes from its environment variables: `env: {MLFLOW_...: ...}`",
        "trackio_*": "a tracker's own setting, which it takes from its environment variables: `env: {TRACKIO_...: ...}`",
        "fsdp_*": "it belongs to `fsdp`: sharding is the launcher's, `accelerate_config: fsdp2`",
    },
    neutral={
        "sample_packing": (
            False,
            "axolotl does not pack pairs either. `padding_free: true` is TRL's way to do without padding",
        ),
        "pad_to_sequence_len": (
            False,
            "pairs are padded to the longest of their batch. `pad_to_multiple_of` is TRL's",
        ),
        "lora_model_dir": (None, NO_ADAPTER),
        "lora_fan_in_fan_out": (False, "PEFT finds it out by itself. Remove it"),
        "plugins": ([], "plugins are axolotl's. Those for speed alone (Liger, CutCrossEntropy) can be removed"),
        "tokenizer_config": (None, "the tokenizer is the one beside the model. Save it there"),
        "base_model_config": (None, "the configuration is the one beside the model. Save it there"),
        "resize_token_embeddings_to_32x": (
            False,
            "resize the embeddings once, save the model, and name it in `model_name_or_path`",
        ),
        "tokens": (None, "add them to the tokenizer, resize and save the model, and name it in `model_name_or_path`"),
        "added_tokens_overrides": (
            None,
            "change them in the tokenizer, save it beside the model, and name that directory",
        ),
        "chat_template_jinja": (
            None,
            "set `tokenizer.chat_template`, save tokenizer and model in one directory, and name it",
        ),
        "default_system_message": (None, "give the rows a column `system`"),
        "dataset_exact_deduplication": (False, "remove equal rows from the data first"),
        "unfrozen_parameters": (None, "all weights are trained, or LoRA's. Freeze others in Python"),
        "deepspeed": (None, SHARDING),
        "fsdp": ([], SHARDING),
        "fsdp_config": (None, SHARDING),
        "dp_shard_size": (1, SHARDING),
        "dp_replicate_size": (1, SHARDING),
        "tensor_parallel_size": (1, SHARDING),
        "context_parallel_size": (1, SHARDING),
        "sequence_parallel_degree": (1, SHARDING),
        "hf_use_auth_token": (
            False,
            "tokens are no matter of recipes: run `hf auth login`, or set HF_TOKEN in the environment",
        ),
        "comet_api_key": (None, "secrets are no matter of recipes: set COMET_API_KEY in the environment"),
        "early_stopping_patience": (None, "give `EarlyStoppingCallback` to the trainer in Python"),
        "bnb_config_kwargs": (None, "set `bnb_4bit_quant_type` and `use_bnb_nested_quant`"),
        "gptq": (False, "name a checkpoint that is not quantized, and set `load_in_4bit: true`"),
        "relora": (False, "nothing here does ReLoRA. Remove it, or stay with axolotl"),
        "loraplus_lr_ratio": (None, "give the optimizer of PEFT's LoRA+ to the trainer in Python"),
        "trainer_cls": (None, "the trainer is the command's"),
        "model_config": (None, "write it into the model's own config.json"),
        "use_onebitllms": (False, "nothing here trains 1-bit models. Stay with axolotl"),
        "push_dataset_to_hub": (None, "`dataset.push_to_hub(...)` does it once"),
    },
    defaults={
        "max_length": 512,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "lora_dropout": 0.0,
        "save_strategy": "epoch",
        "save_total_limit": 4,
        "warmup_steps": 0.03,
    },
)
