"""
`trl-ext migrate` on recipes of axolotl, LLaMA-Factory and RLHFlow.

Oracle: what a key means in the project's own argument classes and trainer builder, worked out by hand for each recipe, and that the result
parses strictly with the dataclasses of a current recipe. The recipes have the keys of the projects' examples; values are ours.
"""

import copy
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from trl_ext.cli import main
from trl_ext.migrate.convert import classes, convert
from trl_ext.migrate.llama_factory import LLAMA_FACTORY
from trl_ext.migrate.rlhflow import pairs_code
from trl_ext.recipe import Recipe, RecipeError

from .test_migrate import accounted, migrated


# TRL's own, for a tokenizer whose pad token is named in the recipe
pytestmark = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")

AXOLOTL = {
    "base_model": "org/instruct",
    "model_type": "LlamaForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "special_tokens": {"pad_token": "<pad>"},
    "load_in_8bit": False,
    "load_in_4bit": True,
    "chat_template": "llama3",
    "rl": "dpo",
    "rl_beta": 0.2,
    "datasets": [
        {
            "path": "org/pairs",
            "type": "chat_template.default",
            "split": "train",
            "field_messages": "messages",
            "field_chosen": "chosen",
            "field_rejected": "rejected",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
        }
    ],
    "dataset_prepared_path": None,
    "dataset_processes": 8,
    "val_set_size": 0.05,
    "output_dir": "out",
    "sequence_len": 4096,
    "sample_packing": False,
    "adapter": "qlora",
    "lora_model_dir": None,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "wandb_project": "mine",
    "wandb_entity": None,
    "wandb_name": "first",
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 4,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": "2e-5",
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "flash_attention": True,
    "warmup_ratio": 0.1,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
}
LLAMA = {
    "model_name_or_path": "org/instruct",
    "trust_remote_code": True,
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "q_proj,v_proj",
    "quantization_bit": 4,
    "pref_beta": 0.3,
    "pref_loss": "sigmoid",
    "dataset": "org/pairs",
    "dataset_dir": "ONLINE",
    "template": "qwen3",
    "cutoff_len": 4096,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "output_dir": "out",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "resume_from_checkpoint": None,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 500,
}
RLHFLOW = {
    "run_name": "iter1",
    "output_dir": "iter1",
    "model_name_or_path": "org/sft",
    "ref_model": "org/sft",
    "learning_rate": 5.0e-7,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "gradient_checkpointing": True,
    "do_train": True,
    "do_eval": True,
    "eval_steps": 10000,
    "choose_type": "max_min",
    "train_dir": "data/iter1_reward.json",
    "eval_dir": "data/iter1_reward.json",
    "loss_type": "sigmoid",
    "lr_scheduler_type": "cosine",
    "max_length": 2048,
    "max_prompt_length": 1000,
    "eval_strategy": "steps",
    "bf16": True,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "report_to": "wandb",
    "eot_token": "<|im_end|>",
}


def refusal(mapping: dict, path: str = "a/b.yaml") -> str:
    with pytest.raises(RecipeError) as refused:
        convert(Recipe(Path(path), mapping, {}), yaml.safe_dump(mapping), "tdpo")
    return str(refused.value)


class TestAxolotl:
    def test_dpo(self):
        migration = migrated(AXOLOTL)
        assert migration.project.name == "axolotl"
        assert migration.recipe == {
            "model_name_or_path": "org/instruct",
            "dtype": "bfloat16",
            "attn_implementation": "flash_attention_2",
            "use_peft": True,
            "lora_r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.0,  # axolotl's default; TRL's is 0.05
            "lora_target_modules": ["all-linear"],
            "load_in_8bit": False,
            "load_in_4bit": True,
            "use_bnb_nested_quant": True,  # axolotl's loader always sets it
            "dataset_name": "org/pairs",
            "dataset_train_split": "train",
            "test_split_size": 0.05,
            "dataset_num_proc": 8,
            "max_length": 4096,
            "beta": 0.2,
            "pad_token": "<pad>",
            "bf16": True,
            "tf32": False,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 4,
            "learning_rate": 2.0e-5,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_bnb_8bit",
            "weight_decay": 0.0,
            "warmup_steps": 0.1,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 0.0625,  # 4 times in each of 4 epochs
            "save_strategy": "epoch",
            "save_total_limit": 4,  # its default
            "report_to": ["wandb"],
            "run_name": "first",
            "env": {"WANDB_PROJECT": "mine"},
            "output_dir": "out",
        }
        assert migration.problems == []
        assert accounted(AXOLOTL, migration) == []

    def test_ipo(self):
        mapping = AXOLOTL | {"rl": "ipo"}
        assert migrated(mapping, "self-refine-dpo").recipe["loss_type"] == ["ipo"]
        (problem,) = migrated(mapping).problems
        assert "`--method self-refine-dpo` knows it" in problem

    def test_defaults_are_written_down(self):
        """Of its configuration schema, where TRL's are others."""
        minimal = {
            "base_model": "a",
            "rl": "dpo",
            "datasets": [{"path": "b"}],
            "output_dir": "c",
            "learning_rate": 1.0e-6,
        }
        assert migrated(minimal).recipe == {
            "model_name_or_path": "a",
            "dtype": "float32",
            "dataset_name": "b",
            "bf16": False,
            "output_dir": "c",
            "learning_rate": 1.0e-6,
            "max_length": 512,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "num_train_epochs": 1.0,
            "lr_scheduler_type": "cosine",
            "save_strategy": "epoch",
            "save_total_limit": 4,
            "warmup_steps": 0.03,
        }

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"bf16": "full"}, {"dtype": "bfloat16", "bf16": False, "bf16_full_eval": True}),
            ({"bf16": False, "fp16": True}, {"dtype": "float16", "bf16": False, "fp16": True}),
            ({"bf16": None, "bfloat16": None}, {"dtype": "float32", "bf16": False}),
            ({"adapter": None, "load_in_4bit": False}, {"dtype": "bfloat16"}),
            ({"gradient_accumulation_steps": None, "batch_size": 16}, {"gradient_accumulation_steps": 8}),
            ({"evals_per_epoch": 1, "saves_per_epoch": 2}, {"eval_strategy": "epoch", "save_steps": 0.125}),
            ({"evals_per_epoch": None, "eval_steps": 50}, {"eval_strategy": "steps", "eval_steps": 50}),
            ({"saves_per_epoch": None, "save_steps": 50}, {"save_strategy": "steps", "save_steps": 50}),
            ({"trl": {"beta": 0.5}}, {"beta": 0.5}),
            ({"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.1]}, {"loss_weights": [1.0, 0.1]}),
            ({"fp16": False, "sdp_attention": False, "use_mlflow": False}, {"bf16": True, "report_to": ["wandb"]}),
            ({"num_epochs": 0.25, "evals_per_epoch": 2}, {"eval_strategy": None, "eval_steps": None}),
            ({"hub_model_id": "me/it"}, {"hub_model_id": "me/it", "push_to_hub": True}),
            ({"gradient_checkpointing": "offload"}, {"gradient_checkpointing": True}),
            ({"lora_target_linear": None, "lora_target_modules": ["q_proj"]}, {"lora_target_modules": ["q_proj"]}),
        ],
    )
    def test_values_with_another_form(self, keys, expected):
        mapping = AXOLOTL | keys
        migration = migrated(mapping)
        assert {key: migration.recipe.get(key) for key in expected} == expected
        assert migration.problems == []
        assert accounted(mapping, migration) == []

    def test_without_an_adapter_nothing_of_it_is_left(self):
        recipe = migrated(AXOLOTL | {"adapter": None, "load_in_4bit": False}).recipe
        assert not [key for key in recipe if key.startswith("lora_") or key in ("use_peft", "use_bnb_nested_quant")]

    def test_without_data_for_it_nothing_is_evaluated(self):
        recipe = migrated(AXOLOTL | {"val_set_size": 0}).recipe
        assert not {"eval_strategy", "eval_steps", "test_split_size"} & recipe.keys()

    def test_datasets(self):
        """Several, slices and files are TRL's `datasets:`; a test set that is a split of the one dataset has a key."""
        several = [
            {"path": "org/a", "name": "en", "split": "train[:1000]", "type": "chatml.intel"},
            {"path": "json", "data_files": ["a.jsonl"], "ds_type": "json", "type": "chatml.ultra"},
        ]
        migration = migrated(AXOLOTL | {"datasets": several})
        assert migration.recipe["datasets"] == [
            {"path": "org/a", "name": "en", "split": "train[:1000]"},
            {"path": "json", "data_files": ["a.jsonl"]},
        ]
        assert migration.problems == []
        test = {"test_datasets": [{"path": "org/pairs", "split": "test"}], "val_set_size": None}
        assert migrated(AXOLOTL | test).recipe["dataset_test_split"] == "test"
        other = migrated(AXOLOTL | {"test_datasets": [{"path": "org/other", "split": "test"}]})
        assert [problem[:15] for problem in other.problems] == ["`test_datasets`"]

    @pytest.mark.parametrize(
        ("entry", "problem"),
        [
            (
                {"field_messages": "conversation"},
                "rename_columns({'conversation': 'messages'}).to_json('pairs.jsonl')",
            ),
            ({"type": "llama3.icr"}, "rename_columns({'input': 'prompt'})"),
            ({"type": "zephyr.nectar"}, "the rows' columns must be `prompt`, `chosen` and `rejected`"),
            ({"type": {"field_prompt": "q", "field_chosen": "chosen"}}, "rename_columns({'q': 'prompt'})"),
            ({"type": {"prompt_format": "[INST] {prompt} [/INST]"}}, "is written around the text here"),
            ({"roles": {"user": ["customer"]}}, "rename the roles in the data to `system`, `user` and `assistant`"),
            ({"message_property_mappings": {"role": "speaker"}}, "rename these fields of the messages in the data"),
            ({"revision": "v2"}, "`datasets[0].revision: v2`: has no counterpart"),
            ({"shards": 4}, "`datasets[0].shards: 4`: has no counterpart"),
        ],
    )
    def test_what_the_rows_must_become(self, entry, problem):
        (found,) = migrated(AXOLOTL | {"datasets": [{"path": "org/pairs"} | entry]}).problems
        assert problem in found

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ({"chat_template": "chatml"}, "`chat_template: chatml`: the template here is the tokenizer's own."),
            ({"chat_template": "jinja", "chat_template_jinja": "{{ x }}"}, "`chat_template_jinja: {{ x }}`"),
            (
                {"special_tokens": {"eos_token": "<e>"}},
                "`special_tokens.eos_token: <e>`: the tokens are the tokenizer's.",
            ),
            ({"lora_model_dir": "old"}, "merge the adapter into its base"),
            ({"adapter": "llama-adapter"}, "TRL's recipes have LoRA alone"),
            ({"sample_packing": True}, "axolotl does not pack pairs either"),
            ({"optimizer": "muon"}, "`optimizer: muon`: axolotl's own."),
            ({"lr_scheduler": "rex"}, "`lr_scheduler: rex`: axolotl's own."),
            ({"deepspeed": "zero3.json"}, "`accelerate_config: fsdp2`"),
            ({"fsdp_config": {"offload_params": True}}, "`accelerate_config: fsdp2`"),
            ({"plugins": ["axolotl.integrations.x"]}, "plugins are axolotl's"),
            ({"dpo_use_weighting": True}, "`use_weighting: True` is not supported"),
            ({"dpo_label_smoothing": 0.1}, "`label_smoothing: 0.1` is not supported"),
            ({"dpo_beta": 0.4}, "`dpo_beta: 0.4`: `beta` is given too"),
            ({"trl": {"num_generations": 4}}, "`trl.num_generations`: a key of GRPO"),
            ({"neat_new_key": 3}, "`neat_new_key: 3`: a key of axolotl that has no counterpart"),
            ({"num_epochs": "four"}, "`num_epochs` must be a number, got the text 'four'"),
        ],
    )
    def test_what_has_no_counterpart_is_a_problem(self, keys, problem):
        mapping = AXOLOTL | keys
        migration = migrated(mapping)
        assert problem in "\n".join(migration.problems)
        assert accounted(mapping, migration) == []

    @pytest.mark.parametrize(
        ("keys", "parts"),
        [
            ({"rl": None}, ("axolotl for SFT (no `rl`)", "Use `trl sft`")),
            ({"rl": "kto"}, ("axolotl for KTO (`rl: kto`)", "Use `trl kto`")),
            ({"rl": "orpo"}, ("axolotl for ORPO (`rl: orpo`)", "Use `trl.experimental.orpo`")),
            ({"rl": "simpo"}, ("axolotl for SimPO (`rl: simpo`)", "`loss_type: simpo`")),
            ({"rl": "grpo"}, ("axolotl for GRPO (`rl: grpo`)", "Use `trl grpo`")),
            ({"rl": "ebft"}, ("axolotl for EBFT (`rl: ebft`)", "Use axolotl; TRL has no trainer of it")),
            ({"rl": None, "reward_model": True}, ("axolotl for Reward (`reward_model`)", "Use `trl reward`")),
            ({"rl": None, "pretraining_dataset": [{"path": "c4"}]}, ("axolotl for pretraining", "on a column `text`")),
        ],
    )
    def test_other_methods_are_refused_by_name(self, keys, parts):
        message = refusal(AXOLOTL | keys)
        assert all(part in message for part in parts), message


class TestLlamaFactory:
    def test_dpo(self):
        migration = migrated(LLAMA)
        assert migration.project is LLAMA_FACTORY
        assert migration.recipe == {
            "model_name_or_path": "org/instruct",
            "dtype": "bfloat16",  # what the weights beneath an adapter are loaded in, with `bf16`
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,  # its default, twice the rank
            "lora_dropout": 0.0,  # its default; TRL's is 0.05
            "lora_target_modules": ["q_proj", "v_proj"],
            "load_in_4bit": True,
            "use_bnb_nested_quant": True,  # its default; TRL's is false
            "dataset_name": "org/pairs",
            "test_split_size": 0.1,
            "loss_type": ["sigmoid"],
            "beta": 0.3,
            "max_length": 4096,
            "dataset_num_proc": 16,
            "trust_remote_code": True,
            "do_train": True,
            "output_dir": "out",
            "logging_steps": 10,
            "save_steps": 500,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 5.0e-6,
            "num_train_epochs": 3.0,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "bf16": True,
            "eval_strategy": "steps",
            "eval_steps": 500,
        }
        assert migration.problems == []
        assert accounted(LLAMA, migration) == []

    def test_defaults_are_written_down(self):
        minimal = {
            "model_name_or_path": "a",
            "stage": "dpo",
            "dataset": "b",
            "dataset_dir": "ONLINE",
            "output_dir": "c",
        }
        assert migrated(minimal).recipe == {
            "model_name_or_path": "a",
            "dtype": "auto",
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "lora_target_modules": ["all-linear"],
            "dataset_name": "b",
            "output_dir": "c",
            "max_length": 2048,
            "learning_rate": 5.0e-5,
            "logging_steps": 500,
            "bf16": False,
        }

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"finetuning_type": "full", "quantization_bit": None}, {"dtype": "float32", "bf16": True}),
            (
                {"finetuning_type": "full", "quantization_bit": None, "bf16": None, "pure_bf16": True},
                {"dtype": "bfloat16", "bf16": False},
            ),
            ({"quantization_bit": 8}, {"load_in_8bit": True, "use_bnb_nested_quant": None}),
            ({"double_quantization": False}, {"use_bnb_nested_quant": False}),
            ({"lora_target": "all"}, {"lora_target_modules": ["all-linear"]}),
            ({"additional_target": "embed_tokens,lm_head"}, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
            ({"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
            ({"flash_attn": "auto"}, {"attn_implementation": None}),
            ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
            ({"use_reentrant_gc": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
            ({"pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
            ({"max_samples": 1000}, {"datasets": [{"path": "org/pairs", "split": "train[:1000]"}]}),
            ({"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}),
        ],
    )
    def test_values_with_another_form(self, keys, expected):
        mapping = LLAMA | keys
        migration = migrated(mapping)
        assert {key: migration.recipe.get(key) for key in expected} == expected
        assert migration.problems == []
        assert accounted(mapping, migration) == []

    @pytest.mark.parametrize("loss", ["hinge", "ipo"])
    def test_losses(self, loss):
        mapping = LLAMA | {"pref_loss": loss}
        assert migrated(mapping, "self-refine-dpo").recipe["loss_type"] == [loss]
        (problem,) = migrated(mapping).problems
        assert "`--method self-refine-dpo` knows it" in problem

    def test_names_of_dataset_info(self):
        """What must be named instead is said; no name that only LLaMA-Factory knows comes out."""
        migration = migrated(LLAMA | {"dataset": "mine, yours", "dataset_dir": "data", "max_samples": 1000})
        (problem,) = migration.problems
        assert "`dataset: mine, yours`: names of LLaMA-Factory's data/dataset_info.json (`dataset_dir`)." in problem
        assert "`datasets: [{path: ..., split: 'train[:1000]'}, {path: ..., split: 'train[:1000]'}]`" in problem
        assert not {"dataset_name", "datasets", "dataset"} & migration.recipe.keys()
        (problem,) = migrated({key: value for key, value in LLAMA.items() if key != "dataset_dir"}).problems
        assert "Write `dataset_name: ...`" in problem

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ({"template": "vicuna"}, "`template: vicuna`: the template here is the tokenizer's own."),
            ({"finetuning_type": "freeze"}, "`finetuning_type: freeze`: a recipe here trains LoRA"),
            ({"quantization_bit": 3}, "`quantization_bit: 3`: bitsandbytes has 4"),
            ({"quantization_method": "hqq"}, "name a checkpoint that is not quantized"),
            ({"adapter_name_or_path": "saves/sft"}, "merge the adapter into its base"),
            ({"ref_model": "org/other"}, "give `ref_model` to the trainer in Python"),
            ({"eval_dataset": "held_out"}, "Put `train.jsonl` and `test.jsonl` in one directory"),
            ({"pref_bco_weight": 0.5}, "`bco_pair`"),
            ({"ld_alpha": 0.5}, "`ld_alpha: 0.5` is not supported"),
            ({"image_max_pixels": 262144}, "nothing here trains on images"),
            ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, "`accelerate_config: fsdp2`"),
            ({"mix_strategy": "interleave_over"}, "`fraction`, in TRL's `datasets:`"),
            ({"enable_thinking": False}, "a column `chat_template_kwargs`"),
            ({"dataset": None}, "`dataset` is missing, and with it"),
        ],
    )
    def test_what_has_no_counterpart_is_a_problem(self, keys, problem):
        mapping = LLAMA | keys
        migration = migrated(mapping)
        assert problem in "\n".join(migration.problems)
        assert accounted(mapping, migration) == []

    @pytest.mark.parametrize(
        ("keys", "parts"),
        [
            ({"stage": "sft"}, ("for SFT (`stage: sft`)", "Use `trl sft`")),
            ({"stage": None}, ("for SFT (no `stage`, which is SFT)", "Use `trl sft`")),
            ({"stage": "pt"}, ("for pretraining (`stage: pt`)", "Use `trl sft` on a column `text`")),
            ({"stage": "rm"}, ("for Reward (`stage: rm`)", "Use `trl reward`")),
            ({"stage": "ppo"}, ("for PPO (`stage: ppo`)", "Use LLaMA-Factory; TRL has no trainer of it")),
            ({"stage": "kto"}, ("for KTO (`stage: kto`)", "Use `trl kto`")),
            ({"pref_loss": "orpo"}, ("for ORPO (`pref_loss: orpo`)", "Use `trl.experimental.orpo`")),
            ({"pref_loss": "simpo"}, ("for SimPO (`pref_loss: simpo`)", "`loss_type: simpo`")),
            ({"pref_loss": "kto_pair"}, ("for KTO (`pref_loss: kto_pair`)", "Use `trl kto`")),
            ({"stage": None, "export_dir": "merged"}, ("for exporting a model", "`merge_and_unload`")),
        ],
    )
    def test_other_methods_are_refused_by_name(self, keys, parts):
        message = refusal(LLAMA | keys)
        assert "this is a recipe of LLaMA-Factory" in message
        assert all(part in message for part in parts), message

    def test_what_trains_nothing(self):
        assert "for inference" in refusal({"model_name_or_path": "a", "template": "qwen3", "infer_backend": "vllm"})
        assert "LLaMA-Factory's v1" in refusal({"model": "a", "model_class": "llm", "train_dataset": "data/x.yaml"})


class TestRlhflow:
    def test_dpo(self):
        migration = migrated(RLHFLOW)
        assert migration.project.name == "RLHFlow"
        gone = ("ref_model", "choose_type", "train_dir", "eval_dir", "max_prompt_length", "eot_token")
        assert migration.recipe == {key: value for key, value in RLHFLOW.items() if key not in gone} | {
            "loss_type": ["sigmoid"],
            "dtype": "bfloat16",
            "dataset_name": "data/iter1_reward_pairs.jsonl",
            "test_split_size": 100,  # RLHFlow evaluates on 100 rows
        }
        (problem,) = migration.problems
        assert problem.startswith("`train_dir: data/iter1_reward.json`: its rows are answers with rewards")
        assert "`trl-ext aries run`" in problem
        assert accounted(RLHFLOW, migration) == []

    @pytest.mark.parametrize(
        ("choose_type", "expected"),
        [("max_min", [("best", "worst"), ("only", "other")]), ("max_max", [("best", "middle"), ("only", "other")])],
    )
    @pytest.mark.parametrize("as_messages", [False, True])
    def test_the_code_makes_its_pairs(self, tmp_path, choose_type, expected, as_messages):
        """By hand: the best answer against the worst, or the second best; equal rewards make no pair."""
        rows = [
            {"prompt": "p0", "responses": ["worst", "best", "middle"], "rewards": [-1.0, 2.0, 0.5]},
            {"prompt": "p1", "responses": ["a", "b"], "rewards": [1.0, 1.0]},
            {"prompt": "p2", "responses": ["other", "only"], "rewards": [0.0, 0.25]},
        ]
        if as_messages:
            rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        source, target = str(tmp_path / "rewards.json"), str(tmp_path / "pairs.jsonl")
        Dataset.from_list(rows).to_json(source)
        exec(pairs_code(source, target, choose_type), {})
        answer = lambda text: [{"role": "assistant", "content": text}] if as_messages else text  # noqa: E731
        assert Dataset.from_json(target).to_list() == [
            {"prompt": row["prompt"], "chosen": answer(chosen), "rejected": answer(rejected)}
            for row, (chosen, rejected) in zip((rows[0], rows[2]), expected, strict=True)
        ]

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ({"choose_type": "max_random"}, "Make data/iter1_reward_pairs.jsonl of them"),
            ({"eval_dir": "data/other.json"}, "`eval_dir: data/other.json`: a recipe names training data"),
            ({"ref_model": "org/other"}, "give `ref_model` to the trainer in Python"),
            ({"label_smoothing": 0.1}, "`label_smoothing: 0.1` is not supported"),
            ({"max_training_samples": 50}, "`.select(range(50))`"),
        ],
    )
    def test_what_has_no_counterpart_is_a_problem(self, keys, problem):
        mapping = RLHFLOW | keys
        migration = migrated(mapping)
        assert problem in "\n".join(migration.problems)
        assert accounted(mapping, migration) == []

    @pytest.mark.parametrize(
        ("path", "parts"),
        [
            ("RLHFlow/SFT-data", ("axolotl for SFT (one of RLHFlow's", "Use `trl sft`")),
            ("RLHFlow/pair-preference-mix", ("generative reward models (one of RLHFlow's", "`scores.judge`")),
            ("RLHFlow/Some-PRM-Data", ("generative reward models (one of RLHFlow's", "`scores.judge`")),
        ],
    )
    def test_its_other_recipes_are_axolotls(self, path, parts):
        data = [{"path": path, "type": "sharegpt", "conversation": "llama3"}]
        message = refusal({key: value for key, value in AXOLOTL.items() if key != "rl"} | {"datasets": data})
        assert all(part in message for part in parts), message

    def test_generation(self):
        message = refusal(
            {"K": 8, "ports": [8000], "eos_ids": [2], "dataset_name_or_path": "org/p", "temperature": 1.0}
        )
        assert "RLHFlow for generation" in message and "Use `trl-ext aries run`" in message


@pytest.mark.parametrize("mapping", [AXOLOTL, LLAMA, RLHFLOW], ids=["axolotl", "llama-factory", "rlhflow"])
@pytest.mark.parametrize("value", [7, "x", [{}], {"a": 1}, False, None], ids=repr)
def test_wrong_values_are_problems_too(mapping, value):
    """Any value of another type at any key: a recipe that parses, or a refusal, and no other error."""
    for key in mapping:
        wrong = copy.deepcopy(mapping) | {key: value}
        try:
            migration = convert(Recipe(Path("a/b.yaml"), wrong, {}), "", "tdpo")
        except RecipeError:
            continue
        assert accounted(wrong, migration) == [], key
        assert all(re.fullmatch(r"[a-z_0-9]+", name) for name in migration.recipe)
        yaml.safe_dump(migration.recipe)
    for key in AXOLOTL["datasets"][0]:
        entry = AXOLOTL["datasets"][0] | {key: value}
        convert(Recipe(Path("a/b.yaml"), AXOLOTL | {"datasets": [entry]}, {}), "", "tdpo")


@pytest.mark.parametrize("key", ["hf_hub_token", "swanlab_api_key", "hub_token", "push_to_hub_token"])
def test_secrets_are_neither_carried_over_nor_shown(key):
    mapping = LLAMA | {key: "not-to-be-seen"}
    migration = migrated(mapping)
    assert "not-to-be-seen" not in f"{migration.recipe} {migration.changes} {migration.problems}"
    assert accounted(mapping, migration) == []


def test_one_key_alone_is_a_slip():
    """`lora_rank` in a recipe of TRL's is an unknown key, and no recipe of LLaMA-Factory's."""
    migration = migrated({"model_name_or_path": "a", "dataset_name": "b", "output_dir": "c", "lora_rank": 8})
    assert migration.project is None
    assert migration.problems[0].startswith("unknown key `lora_rank`.")


class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_the_account_names_the_project(self, capsys):
        Path("old.yaml").write_text(yaml.safe_dump(AXOLOTL))
        assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 0
        assert "old.yaml: a DPO recipe of axolotl; " in capsys.readouterr().err
        known = [name for cls in classes("tdpo")[1] for name in cls.__dataclass_fields__]
        assert set(yaml.safe_load(Path("new.yaml").read_text())) <= {*known, "env"}

    def test_scripts_and_launch_configurations(self, capsys):
        Path("run_loop.sh").write_text("cat <<EOT > dpo_config.yaml\n")
        assert main(["migrate", "run_loop.sh"]) == 2
        assert "`cat <<EOT > dpo_config.yaml`" in capsys.readouterr().err
        Path("zero2.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n")
        assert main(["migrate", "zero2.yaml"]) == 2
        assert "`accelerate_config: zero2.yaml` in a recipe takes it" in capsys.readouterr().err
