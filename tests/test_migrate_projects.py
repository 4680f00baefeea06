"""
`trl-ext migrate` on recipes of axolotl, LLaMA-Factory and RLHFlow.

Oracle: what a key means in the project's own argument classes and trainer builder, worked out by hand for each recipe, and that the result
parses strictly with the dataclasses of a current recipe. The recipes have the keys of the projects' examples; values are ours.
"""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from trl_ext.cli import main
from trl_ext.migrate.convert import convert
from trl_ext.migrate.rlhflow import PAIRS
from trl_ext.recipe import Recipe, RecipeError

from .test_migrate import accounted, migrated


# TRL's own, for a tokenizer whose pad token is named in the recipe
pytestmark = pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")

AXOLOTL = yaml.safe_load("""
{base_model: org/instruct, model_type: LlamaForCausalLM, tokenizer_type: AutoTokenizer, special_tokens: {pad_token: <pad>},
 load_in_8bit: false, load_in_4bit: true, chat_template: llama3, rl: dpo, rl_beta: 0.2, dataset_prepared_path: , dataset_processes: 8,
 datasets: [{path: org/pairs, type: chat_template.default, split: train, field_messages: messages, field_chosen: chosen,
   field_rejected: rejected, message_property_mappings: {role: role, content: content},
   roles: {system: [system], user: [user], assistant: [assistant]}}],
 val_set_size: 0.05, output_dir: out, sequence_len: 4096, sample_packing: false, adapter: qlora, lora_model_dir: , lora_r: 32,
 lora_alpha: 16, lora_target_linear: true, wandb_project: mine, wandb_entity: , wandb_name: first, gradient_accumulation_steps: 4,
 micro_batch_size: 2, num_epochs: 4, optimizer: adamw_bnb_8bit, lr_scheduler: cosine, learning_rate: "2e-5", bf16: auto, tf32: false,
 gradient_checkpointing: true, logging_steps: 1, flash_attention: true, warmup_ratio: 0.1, evals_per_epoch: 4, saves_per_epoch: 1,
 weight_decay: 0.0}
""")
# `eval_steps`: 4 times in each of 4 epochs. `lora_dropout`, `use_bnb_nested_quant`: axolotl's defaults; TRL's are 0.05 and false
AXOLOTL_NOW = yaml.safe_load("""
{model_name_or_path: org/instruct, dtype: bfloat16, attn_implementation: flash_attention_2, use_peft: true, lora_r: 32, lora_alpha: 16,
 lora_dropout: 0.0, lora_target_modules: [all-linear], load_in_8bit: false, load_in_4bit: true, use_bnb_nested_quant: true,
 dataset_name: org/pairs, dataset_train_split: train, test_split_size: 0.05, dataset_num_proc: 8, max_length: 4096, beta: 0.2,
 pad_token: <pad>, bf16: true, tf32: false, per_device_train_batch_size: 2, gradient_accumulation_steps: 4, num_train_epochs: 4,
 learning_rate: 2.0e-5, lr_scheduler_type: cosine, optim: adamw_bnb_8bit, weight_decay: 0.0, warmup_steps: 0.1,
 gradient_checkpointing: true, logging_steps: 1, eval_strategy: steps, eval_steps: 0.0625, save_strategy: epoch, report_to: [wandb],
 run_name: first, env: {WANDB_PROJECT: mine}, output_dir: out}
""")
LLAMA = yaml.safe_load("""
{model_name_or_path: org/instruct, trust_remote_code: true, stage: dpo, do_train: true, finetuning_type: lora, lora_rank: 16,
 lora_target: "q_proj,v_proj", quantization_bit: 4, pref_beta: 0.3, pref_loss: sigmoid, dataset: org/pairs, dataset_dir: ONLINE,
 template: qwen3, cutoff_len: 4096, overwrite_cache: true, preprocessing_num_workers: 16, output_dir: out, logging_steps: 10,
 save_steps: 500, plot_loss: true, overwrite_output_dir: true, per_device_train_batch_size: 1, gradient_accumulation_steps: 8,
 learning_rate: 5.0e-6, num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_ratio: 0.1, bf16: true, resume_from_checkpoint: ,
 val_size: 0.1, eval_strategy: steps, eval_steps: 500}
""")
# Defaults: `lora_alpha` is twice the rank, no dropout, quantized twice, and the weights beneath an adapter in the precision of training
LLAMA_NOW = yaml.safe_load("""
{model_name_or_path: org/instruct, dtype: bfloat16, use_peft: true, lora_r: 16, lora_alpha: 32, lora_dropout: 0.0,
 lora_target_modules: [q_proj, v_proj], load_in_4bit: true, use_bnb_nested_quant: true, dataset_name: org/pairs, test_split_size: 0.1,
 loss_type: [sigmoid], beta: 0.3, max_length: 4096, dataset_num_proc: 16, trust_remote_code: true, do_train: true, output_dir: out,
 logging_steps: 10, save_steps: 500, per_device_train_batch_size: 1, gradient_accumulation_steps: 8, learning_rate: 5.0e-6,
 num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_steps: 0.1, bf16: true, eval_strategy: steps, eval_steps: 500}
""")
RLHFLOW = yaml.safe_load("""
{run_name: iter1, output_dir: iter1, model_name_or_path: org/sft, ref_model: org/sft, num_train_epochs: 2, logging_steps: 2,
 do_eval: true, eval_steps: 10000, eval_strategy: steps, choose_type: max_min, train_dir: data/rewards.json, eval_dir: data/rewards.json,
 loss_type: sigmoid, max_length: 2048, max_prompt_length: 1000, bf16: true, per_device_train_batch_size: 1, report_to: wandb,
 eot_token: <|im_end|>, mask_prompt: true}
""")
# It evaluates on 100 rows; the script's own default of the learning rate is transformers'
RLHFLOW_NOW = yaml.safe_load("""
{run_name: iter1, output_dir: iter1, model_name_or_path: org/sft, num_train_epochs: 2, logging_steps: 2, do_eval: true,
 eval_steps: 10000, eval_strategy: steps, dataset_name: pairs.jsonl, test_split_size: 100, loss_type: [sigmoid], max_length: 2048,
 dtype: bfloat16, bf16: true, per_device_train_batch_size: 1, report_to: wandb, learning_rate: 5.0e-5}
""")
PAIRS_TO_MAKE = "`train_dir: data/rewards.json`: answers with rewards"
# What is written down because the projects' defaults are not TRL's
MINIMAL_AXOLOTL = {"base_model": "a", "rl": "dpo", "datasets": [{"path": "b"}], "output_dir": "c"}
MINIMAL_AXOLOTL_NOW = yaml.safe_load("""
{model_name_or_path: a, dtype: float32, dataset_name: b, bf16: false, output_dir: c, max_length: 512, per_device_train_batch_size: 1,
 num_train_epochs: 1.0, warmup_steps: 0.03, lr_scheduler_type: cosine}
""")
MINIMAL_LLAMA = {"model_name_or_path": "a", "stage": "dpo", "dataset": "b", "dataset_dir": "ONLINE", "output_dir": "c"}
MINIMAL_LLAMA_NOW = yaml.safe_load("""
{model_name_or_path: a, dtype: auto, dataset_name: b, bf16: false, output_dir: c, use_peft: true, lora_r: 8, lora_alpha: 16,
 lora_dropout: 0.0, lora_target_modules: [all-linear], max_length: 2048, learning_rate: 5.0e-5}
""")
FILES = [{"path": "org/a", "split": "train[:9]"}, {"path": "json", "data_files": ["a.jsonl"]}]


def entry(**keys):
    return {"datasets": [{"path": "org/pairs", **keys}]}


@pytest.mark.parametrize(
    ("old", "new", "problems"),
    [
        (AXOLOTL, AXOLOTL_NOW, []),
        (LLAMA, LLAMA_NOW, []),
        (RLHFLOW, RLHFLOW_NOW, [PAIRS_TO_MAKE]),
        (MINIMAL_AXOLOTL, MINIMAL_AXOLOTL_NOW, []),
        (MINIMAL_LLAMA, MINIMAL_LLAMA_NOW, []),
    ],
    ids=["axolotl", "llama-factory", "rlhflow", "axolotl-defaults", "llama-factory-defaults"],
)
def test_whole_recipes(old, new, problems):
    migration = migrated(old)
    assert migration.recipe == new
    assert [problem[: len(part)] for problem, part in zip(migration.problems, problems, strict=True)] == problems
    assert accounted(old, migration) == []


# Changed keys -> what changes in the new recipe (`None`: absent), and the beginning of what becomes a problem
CHANGES = [
    (AXOLOTL, {"bf16": "full"}, {"dtype": "bfloat16", "bf16": False}, []),
    (AXOLOTL, {"bf16": False, "fp16": True}, {"dtype": "float16", "bf16": False, "fp16": True}, []),
    (AXOLOTL, {"adapter": None, "load_in_4bit": False}, {"use_peft": None, "lora_r": None, "lora_dropout": None}, []),
    (AXOLOTL, {"lora_target_modules": ["q"]}, {"lora_target_modules": ["q"]}, ["`lora_target_linear: True`"]),
    (AXOLOTL, {"evals_per_epoch": 1, "saves_per_epoch": 2}, {"eval_strategy": "epoch", "save_steps": 0.125}, []),
    (AXOLOTL, {"evals_per_epoch": None, "eval_steps": 50}, {"eval_strategy": "steps", "eval_steps": 50}, []),
    (AXOLOTL, {"val_set_size": 0}, {"eval_strategy": None, "eval_steps": None, "test_split_size": None}, []),
    (AXOLOTL, {"rl_beta": None, "trl": {"beta": 0.5}}, {"beta": 0.5}, []),
    (AXOLOTL, {"trl": {"num_generations": 4}}, {}, ["`trl.num_generations: 4`"]),
    (AXOLOTL, {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.1]}, {"loss_weights": [1.0, 0.1]}, []),
    (AXOLOTL, {"dpo_loss_type": 3}, {"loss_type": None}, ["`loss_type` must be"]),
    (AXOLOTL, {"rl": "ipo"}, {"loss_type": ["ipo"]}, []),
    (AXOLOTL, {"flash_attention": False, "sdp_attention": True}, {"attn_implementation": "sdpa"}, []),
    (AXOLOTL, {"hub_model_id": "me/it"}, {"hub_model_id": "me/it", "push_to_hub": True}, []),
    (AXOLOTL, {"datasets": [FILES[0] | {"type": "x"}, FILES[1]]}, {"datasets": FILES, "dataset_name": None}, []),
    (AXOLOTL, entry(field_chosen="rejected"), {}, ["`datasets[0].field_chosen: rejected`"]),
    (AXOLOTL, entry(type={"field_prompt": "q"}), {}, ["`datasets[0].type.field_prompt: q`"]),
    (AXOLOTL, entry(roles={"user": ["customer", "human"]}), {}, ["`datasets[0].roles.user: customer`"]),
    (AXOLOTL, entry(revision="v2", field_system="system"), {}, ["`datasets[0].revision: v2`"]),
    (AXOLOTL, {"chat_template": "chatml"}, {}, ["`chat_template`"]),
    (AXOLOTL, {"special_tokens": {"eos_token": "<e>"}}, {"pad_token": None}, ["`special_tokens.eos_token: <e>`"]),
    (AXOLOTL, {"adapter": "lokr", "load_in_4bit": None}, {}, ["`adapter: lokr`"]),
    (AXOLOTL, {"optimizer": "dion"}, {"optim": None}, ["`optim` must be one of"]),
    (AXOLOTL, {"deepspeed": "zero3.json"}, {"deepspeed": None}, ["`deepspeed: zero3.json`"]),
    (AXOLOTL, {"neat_new_key": 3}, {}, ["`neat_new_key: 3`"]),
    (AXOLOTL, {"num_epochs": "four"}, {}, ["`num_epochs` must be a number, got the text 'four'"]),
    (LLAMA, {"finetuning_type": "full", "quantization_bit": None}, {"dtype": "float32", "use_peft": None}, []),
    (LLAMA, {"bf16": None, "pure_bf16": True}, {"dtype": "bfloat16", "bf16": False}, []),
    (LLAMA, {"quantization_bit": 8}, {"load_in_8bit": True, "load_in_4bit": None, "use_bnb_nested_quant": None}, []),
    (LLAMA, {"quantization_bit": 3}, {"load_in_4bit": None}, ["`quantization_bit: 3`: known values are 4, 8"]),
    (LLAMA, {"lora_target": "all"}, {"lora_target_modules": ["all-linear"]}, []),
    (LLAMA, {"additional_target": "embed_tokens,lm_head"}, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, []),
    (LLAMA, {"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}, []),
    (LLAMA, {"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}, []),
    (LLAMA, {"use_reentrant_gc": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, []),
    (LLAMA, {"pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, []),
    (LLAMA, {"max_samples": 9}, {"datasets": [{"path": "org/pairs", "split": "train[:9]"}], "dataset_name": None}, []),
    (
        LLAMA,
        {"dataset_dir": "data", "dataset": "mine, yours"},
        {"dataset_name": None},
        ["`dataset: mine, yours`: names of data/dataset_info.json (`dataset_dir`). Write `dataset_name`"],
    ),
    (LLAMA, {"template": "vicuna"}, {}, ["`chat_template`"]),
    (LLAMA, {"finetuning_type": "freeze"}, {}, ["`finetuning_type: freeze`"]),
    (LLAMA, {"eval_dataset": "held_out"}, {}, ["`eval_dataset: held_out`"]),
    (LLAMA, {"enable_thinking": False}, {}, ["`enable_thinking: False`"]),
    (LLAMA, {"hf_hub_token": "unseen"}, {}, ["`hf_hub_token`: a secret"]),
    (LLAMA, {"hub_token": "unseen"}, {"hub_token": None}, ["`hub_token`: a secret"]),
    (RLHFLOW, {"eval_dir": "x.json"}, {"test_split_size": None}, [PAIRS_TO_MAKE, "`eval_dir: x.json`"]),
    (RLHFLOW, {"max_training_samples": 50}, {}, [PAIRS_TO_MAKE, "`max_training_samples: 50`"]),
]


@pytest.mark.parametrize(("whole", "keys", "changed", "problems"), CHANGES)
def test_changes(whole, keys, changed, problems):
    old = whole | keys
    migration = migrated(old)
    assert {key: migration.recipe.get(key) for key in changed} == changed
    assert all(
        found.startswith(part) for found, part in zip(sorted(migration.problems), sorted(problems), strict=True)
    )
    assert accounted(old, migration) == []
    assert "unseen" not in f"{migration.recipe} {migration.changes} {migration.problems}"


@pytest.mark.parametrize(
    ("whole", "keys", "parts"),
    [
        (AXOLOTL, {"rl": None}, ("axolotl for SFT (no `rl`)", "Use `trl sft`")),
        (AXOLOTL, {"rl": "kto"}, ("axolotl for KTO (`rl: kto`)", "Use `trl kto`")),
        (AXOLOTL, {"rl": "simpo"}, ("axolotl for SimPO (`rl: simpo`)", "`loss_type: simpo`")),
        (AXOLOTL, {"rl": "ebft"}, ("axolotl for EBFT (`rl: ebft`)", "TRL has none")),
        (AXOLOTL, {"rl": None, "reward_model": True}, ("axolotl for Reward (`reward_model`)", "Use `trl reward`")),
        (LLAMA, {"stage": "pt"}, ("LLaMA-Factory for pretraining (`stage: pt`)", "on a column `text`")),
        (LLAMA, {"stage": None}, ("LLaMA-Factory for SFT (no `stage`, which is SFT)", "Use `trl sft`")),
        (LLAMA, {"pref_loss": "orpo"}, ("LLaMA-Factory for ORPO (`pref_loss: orpo`)", "`trl.experimental.orpo`")),
        (LLAMA, {"export_dir": "merged"}, ("LLaMA-Factory for exporting a model", "`merge_and_unload`")),
        ({}, {"template": "qwen3", "infer_backend": "vllm"}, ("LLaMA-Factory for inference", "vLLM")),
        ({}, {"K": 8, "ports": [8000], "eos_ids": [2]}, ("RLHFlow for generation", "Use `trl-ext aries run`")),
    ],
)
def test_other_methods_are_refused_by_name(whole, keys, parts):
    with pytest.raises(RecipeError) as refused:
        convert(Recipe(Path("a/b.yaml"), whole | keys, {}), "", "tdpo")
    assert all(part in str(refused.value) for part in parts), refused.value


def test_ipo_is_kept_for_self_refine_dpo():
    assert migrated(AXOLOTL | {"rl": "ipo"}, "self-refine-dpo").recipe["loss_type"] == ["ipo"]


def test_rlhflows_pairs(tmp_path, monkeypatch):
    """By hand: the best answer against the worst; equal rewards make no pair."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "p0", "responses": ["worst", "best", "middle"], "rewards": [-1.0, 2.0, 0.5]},
        {"prompt": "p1", "responses": ["a", "b"], "rewards": [1.0, 1.0]},
    ]
    Dataset.from_list(rows).to_json("rewards.json")
    exec(f"import datasets\n{PAIRS.format(source='rewards.json')}", {})
    assert Dataset.from_json("pairs.jsonl").to_list() == [{"prompt": "p0", "chosen": "best", "rejected": "worst"}]


@pytest.mark.parametrize("mapping", [AXOLOTL, LLAMA, RLHFLOW], ids=["axolotl", "llama-factory", "rlhflow"])
@pytest.mark.parametrize("value", [7, "x", [{}], [], {"a": 1}, False, None], ids=repr)
def test_wrong_values_are_problems_too(mapping, value):
    """Any value of another type at any key: a recipe that parses, or a refusal, and no other error."""
    recipes = [mapping | {key: value} for key in (*mapping, 1)]
    recipes += [
        mapping | {"datasets": [mapping["datasets"][0] | {key: value}]}
        for key in AXOLOTL["datasets"][0]
        if mapping is AXOLOTL
    ]
    for wrong in recipes:
        try:
            migration = convert(Recipe(Path("a/b.yaml"), wrong, {}), "", "tdpo")
        except RecipeError:
            continue
        assert accounted(wrong, migration) == []
        assert yaml.safe_load(yaml.safe_dump(migration.recipe)) == migration.recipe


def test_one_key_alone_is_a_slip():
    """`lora_rank` in a recipe of TRL's is an unknown key, and no recipe of LLaMA-Factory's."""
    migration = migrated({"model_name_or_path": "a", "dataset_name": "b", "output_dir": "c", "lora_rank": 8})
    assert migration.problems[0].startswith("unknown key `lora_rank`.")


def test_the_account_names_the_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(yaml.safe_dump(AXOLOTL))
    assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 0
    assert "old.yaml: a DPO recipe of axolotl; " in capsys.readouterr().err
    Path("run_loop.sh").write_text("cat <<EOT > dpo_config.yaml\n")
    assert main(["migrate", "run_loop.sh"]) == 2
    assert "`cat <<EOT > dpo_config.yaml`" in capsys.readouterr().err
