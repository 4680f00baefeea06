"""
`trl-ext migrate` on the keys of alignment-handbook's recipes and of `trl dpo` before TRL 1. Those of axolotl, LLaMA-Factory and RLHFlow are
in `test_migrate_projects.py`.

Oracle: what a key meant, from the old code, and that the result parses strictly with the dataclasses of a current recipe.
"""

import re
from pathlib import Path

import pytest
import yaml

from trl_ext.cli import main
from trl_ext.migrate.convert import Migration, classes, convert
from trl_ext.migrate.data import sliced
from trl_ext.recipe import Recipe, RecipeError, check_keys, parse_flat


# The key sets of zephyr-7b-beta's recipes, first release and current one; values are ours
HANDBOOK_DPO = {
    "model_name_or_path": "org/sft",
    "torch_dtype": "bfloat16",
    "use_flash_attention_2": True,
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj"],
    "dataset_mixer": {"org/pairs": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 4,
    "bf16": True,
    "beta": 0.05,
    "do_eval": True,
    "evaluation_strategy": "steps",
    "eval_steps": 50,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "my-dpo",
    "hub_model_revision": "v1",
    "learning_rate": "5e-7",
    "log_level": "info",
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "data/my-dpo",
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "push_to_hub": True,
    "report_to": ["wandb"],
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
    "wandb_project": "alignment",
}
MIXTURE = {
    "datasets": [
        {
            "id": "org/pairs",
            "config": "default",
            "split": "train_prefs",
            "columns": ["chosen", "rejected"],
            "weight": 1.0,
        },
        {"id": "org/more", "split": "train", "weight": 0.25},
    ],
    "test_split_size": 2000,
    "seed": 0,
}
OLD_TRL = {
    "model_name_or_path": "org/sft",
    "torch_dtype": "auto",
    "dataset_name": "org/pairs",
    "loss_type": "sigmoid",
    "rpo_alpha": 0.5,
    "max_prompt_length": 128,
    "max_completion_length": 384,
    "label_pad_token_id": -100,
    "is_encoder_decoder": False,
    "reference_free": False,
    "generate_during_eval": False,
    "gradient_checkpointing_use_reentrant": False,
    "group_by_length": False,
    "no_cuda": True,
    "precompute_ref_log_probs": False,
    "truncation_mode": "keep_end",
    "output_dir": "out",
    "learning_rate": 1.0e-6,
    "num_processes": 2,
}


def migrated(mapping: dict, method: str = "tdpo", path: str = "dpo/config_full.yaml") -> Migration:
    """Migrate, and parse the result strictly: all keys known, all values of their types."""
    migration = convert(Recipe(Path(path), mapping, {}), yaml.safe_dump(mapping), method)
    written = yaml.safe_load(yaml.safe_dump(migration.recipe))
    parse_flat(Recipe(None, written, {}), classes(method)[1], ["--use_cpu", "--bf16", "false"])
    return migration


def accounted(mapping: dict, migration: Migration) -> list[str]:
    """The old keys of which nothing is said: neither kept nor in a change or a problem."""
    lines = "\n".join([*migration.changes, *migration.problems])
    return [key for key in mapping if key not in migration.kept and f"`{key}" not in lines and f".{key}" not in lines]


class TestHandbook:
    def test_dpo(self):
        """By hand, each renamed or changed key; the rest as it was, and nothing without a line."""
        migration = migrated(HANDBOOK_DPO)
        changed = {
            "dtype": "bfloat16",
            "attn_implementation": "flash_attention_2",
            "dataset_name": "org/pairs",
            "dataset_train_split": "train_prefs",
            "dataset_test_split": "test_prefs",
            "dataset_num_proc": 4,
            "eval_strategy": "steps",
            "hub_revision": "v1",
            "learning_rate": 5.0e-7,
            "warmup_steps": 0.1,
            "env": {"WANDB_PROJECT": "alignment"},
        }
        gone = {
            *("torch_dtype", "use_flash_attention_2", "dataset_mixer", "dataset_splits", "preprocessing_num_workers"),
            *(
                "evaluation_strategy",
                "hub_model_revision",
                "max_prompt_length",
                "overwrite_output_dir",
                "warmup_ratio",
            ),
            "wandb_project",
        }
        assert migration.recipe == {k: v for k, v in HANDBOOK_DPO.items() if k not in gone} | changed
        assert migration.problems == []
        assert accounted(HANDBOOK_DPO, migration) == []

    def test_several_datasets_and_shares(self):
        """A weight is a share of a dataset's rows, which is a slice of its split and not TRL's `fraction`."""
        mapping = HANDBOOK_DPO | {"dataset_mixer": {"org/a": 1.0, "org/b": 0.25}}
        migration = migrated(mapping)
        columns = ["chosen", "rejected"]
        assert migration.recipe["datasets"] == [
            {"path": "org/a", "split": "train_prefs", "columns": columns},
            {"path": "org/b", "split": "train_prefs[:25%]", "columns": columns},
        ]
        (problem,) = migration.problems
        assert problem.startswith("`dataset_splits`: test_prefs cannot be named beside `datasets:`")

    def test_mixture(self):
        mapping = {k: v for k, v in HANDBOOK_DPO.items() if not k.startswith("dataset_")} | {
            "dataset_mixture": MIXTURE,
            "torch_dtype": None,
        }
        migration = migrated(mapping)
        assert migration.recipe["datasets"] == [
            {"path": "org/pairs", "name": "default", "split": "train_prefs", "columns": ["chosen", "rejected"]},
            {"path": "org/more", "split": "train[:25%]"},
        ]
        assert (migration.recipe["test_split_size"], migration.recipe["dtype"]) == (2000, "float32")
        assert migration.problems == []
        assert accounted(mapping, migration) == []

    def test_its_default_optimizer(self):
        """Its `DPOConfig` said RMSprop; the TRL of the mixtures does not."""
        mapping = {k: v for k, v in HANDBOOK_DPO.items() if k != "optim"}
        assert migrated(mapping).recipe["optim"] == "rmsprop"

    def test_chat_template_and_tokenizer_are_left_to_the_user(self):
        migration = migrated(HANDBOOK_DPO | {"chat_template": "{{ x }}", "tokenizer_name_or_path": "org/other"})
        assert [problem.partition(":")[0] for problem in migration.problems] == [
            "`tokenizer_name_or_path",
            "`chat_template`",
        ]
        assert not {"chat_template", "tokenizer_name_or_path"} & migration.recipe.keys()

    @pytest.mark.parametrize(
        ("mapping", "text", "path", "method"),
        [
            ({"max_seq_length": 2048}, "", "a/b.yaml", "SFT"),
            ({"packing": True}, "", "a/b.yaml", "SFT"),
            ({}, "", "recipes/mistral/orpo/config_full.yaml", "ORPO"),
            ({}, "# ORPOTrainer arguments\nbeta: 0.05\n", "a/b.yaml", "ORPO"),
            ({"desirable_weight": 1.0}, "", "a/b.yaml", "KTO"),
            ({"num_ppo_epochs": 4}, "", "a/b.yaml", "PPO"),
        ],
    )
    def test_recipes_of_other_methods_are_refused_by_name(self, mapping, text, path, method):
        use = {"SFT": "`trl sft`", "ORPO": "`trl.experimental.orpo`", "KTO": "`trl kto`"}
        expected = f"a recipe of {method}, .* Use {use.get(method, 'its own trainer; TRL has none')}"
        with pytest.raises(RecipeError, match=expected):
            convert(Recipe(Path(path), {"beta": 0.1} | mapping, {}), text, "tdpo")


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
class TestOldTrl:
    def test_dpo(self):
        migration = migrated(OLD_TRL)
        assert migration.recipe == {
            "model_name_or_path": "org/sft",
            "dtype": "auto",
            "dataset_name": "org/pairs",
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.5],
            "precompute_ref_log_probs": False,
            "truncation_mode": "keep_end",
            "output_dir": "out",
            "learning_rate": 1.0e-6,
            "max_length": 512,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_cpu": True,
            "num_processes": 2,
        }
        assert migration.problems == []
        assert accounted(OLD_TRL, migration) == []

    def test_precision_it_relied_on_is_written_down(self):
        """TRL now defaults to bf16, which transformers' `TrainingArguments` did not."""
        mapping = {k: v for k, v in OLD_TRL.items() if k != "no_cuda"}
        assert migrated(mapping).recipe["bf16"] is False

    @pytest.mark.parametrize(
        ("keys", "method", "part"),
        [
            ({"loss_type": "nll"}, "tdpo", "`loss_type`: nll"),
            ({"ld_alpha": 0.5}, "tdpo", "`ld_alpha: 0.5`"),
            (
                {"f_divergence_type": "js_divergence"},
                "self-refine-dpo",
                "`f_divergence_type: js_divergence`",
            ),
            ({"reference_free": True}, "tdpo", "`reference_free: True`"),
            ({"warmup_ratio": 2}, "tdpo", "`warmup_ratio: 2`"),
            ({"foo_bar": 1}, "tdpo", "unknown key `foo_bar`"),
            ({"label_smoothing": 0.1}, "tdpo", "`label_smoothing: 0.1`: only exo_pair, robust"),
            ({"label_smoothing": 0.1, "loss_type": None}, "self-refine-dpo", "`label_smoothing: 0.1`: only"),
            ({"group_by_length": True}, "tdpo", "`group_by_length: True`: pairs have no single length"),
            ({"beta": "high"}, "tdpo", "`beta` must be a number"),
            ({"dtype": "float16"}, "tdpo", "`torch_dtype` is an old name of `dtype`, and both are given"),
        ],
    )
    def test_what_has_no_counterpart_is_a_problem(self, keys, method, part):
        mapping = {k: v for k, v in OLD_TRL.items() if k not in ("rpo_alpha", "truncation_mode")} | keys
        migration = migrated(mapping, method)
        (problem,) = migration.problems
        assert part in problem
        assert accounted(mapping, migration) == []

    def test_ipo_is_kept_for_self_refine_dpo(self):
        mapping = {k: v for k, v in OLD_TRL.items() if k not in ("rpo_alpha", "truncation_mode")} | {
            "loss_type": "ipo"
        }
        migration = migrated(mapping, "self-refine-dpo")
        assert (migration.recipe["loss_type"], migration.problems) == (["ipo"], [])

    def test_current_recipes_stay(self):
        path = Path(__file__).parents[1] / "recipes" / "qwen2.5-7b" / "tdpo" / "config_qlora.yaml"
        mapping = yaml.safe_load(path.read_text())
        migration = migrated(mapping)
        assert (migration.recipe, migration.changes, migration.problems) == (mapping, [], [])


@pytest.mark.parametrize(
    ("key", "value"), [("dataset_splits", 7), ("rpo_alpha", "x"), ("env", [1]), ("loss_type", [{}])]
)
def test_wrong_values_are_problems(key, value):
    mapping = OLD_TRL | {"wandb_project": "mine", "dataset_splits": ["train"], "truncation_mode": "keep_start"}
    (problem,) = migrated(mapping | {key: value}).problems
    assert re.match(rf"`{key}(\[0\])?` must be", problem)


@pytest.mark.parametrize(("weight", "expected"), [(1, "train"), (0.5, "train[:50%]"), (0.29, "train[:29%]")])
def test_slices(weight, expected):
    assert sliced("train", weight, "w") == expected


@pytest.mark.parametrize("weight", [0, 1.5, 0.125, True, "half"])
def test_weights_without_a_slice(weight):
    with pytest.raises(RecipeError):
        sliced("train", weight, "w")


class TestCommand:
    @pytest.fixture(autouse=True)
    def old(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("old.yaml").write_text("# mine\n" + yaml.safe_dump(OLD_TRL))

    def test_to_stdout(self, capsys):
        """The YAML alone on stdout, the account on stderr."""
        assert main(["migrate", "old.yaml"]) == 0
        out, err = capsys.readouterr()
        check_keys(Recipe(None, yaml.safe_load(out), {}), classes("tdpo")[1], also=("num_processes",))
        assert "`torch_dtype` -> `dtype`: transformers renamed it" in err
        assert "Comments of the old file are lost." in err

    def test_to_a_file_that_is_never_overwritten(self, capsys):
        assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 0
        out, err = capsys.readouterr()
        assert out == "" and "Written to new.yaml." in err
        before = Path("new.yaml").read_text()
        assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 2
        assert "new.yaml exists already" in capsys.readouterr().err
        assert Path("new.yaml").read_text() == before

    def test_problems_are_exit_code_1_and_the_rest_is_written(self, capsys):
        Path("old.yaml").write_text(yaml.safe_dump(OLD_TRL | {"foo": 1}))
        assert main(["migrate", "old.yaml", "--output", "new.yaml"]) == 1
        assert "error: unknown key `foo`." in capsys.readouterr().err
        assert "foo" not in yaml.safe_load(Path("new.yaml").read_text())

    def test_no_file(self, capsys):
        assert main(["migrate", "none.yaml"]) == 2
        assert "none.yaml: no such recipe file. In . there is: old.yaml." in capsys.readouterr().err
