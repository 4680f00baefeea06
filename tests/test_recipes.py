"""Every file under `recipes/` parses into the dataclasses it is for, and says how to launch itself."""

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.arguments import TRAINERS
from trl_ext.aries.checks import preflight
from trl_ext.aries.config import LOOP_KEYS, AriesConfig
from trl_ext.aries.data.templates import compile_template
from trl_ext.aries.scoring.verifier import load_verifier
from trl_ext.aries.training.settings import TrainerSettings
from trl_ext.aries.training.train import trainer_classes
from trl_ext.launch import find_accelerate_config
from trl_ext.recipe import Recipe, check_keys, export_env, load_yaml, parse_flat, parse_section
from trl_ext.trainers.shifted_dpo_trainer import ShiftedDPOTrainer


ROOT = Path(__file__).parents[1]
METHODS = {"tdpo": (TDPOConfig, TDPOTrainer), "self-refine-dpo": (SelfRefineDPOConfig, SelfRefineDPOTrainer)}
RECIPES = [path for method in METHODS for path in sorted(ROOT.glob(f"recipes/*/{method}/*.yaml"))]
ARIES_RECIPES = sorted(ROOT.glob("recipes/*/aries/*.yaml")) + sorted(ROOT.glob("recipes/quickstart*/*.yaml"))
ACCELERATE_CONFIGS = sorted(ROOT.glob("recipes/accelerate_configs/*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def parse(path: Path) -> tuple:
    config_class, _ = METHODS[path.parent.name]
    # bf16 stays as the recipe has it: with `use_cpu`, transformers accepts it on a machine without a GPU
    return parse_flat(path, (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig), ["--use_cpu"])


def test_every_model_and_method_has_both_variants():
    expected = {
        f"{model}/{method}/config_{variant}.yaml"
        for model in ("llama-3.1-8b", "qwen2.5-7b", "pythia-2.8b")
        for method in METHODS
        for variant in ("full", "qlora")
    }
    assert expected <= {name_of(path) for path in RECIPES}
    assert METHODS.keys() == TRAINERS.keys()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
class TestTrainerRecipe:
    def test_parses(self, path):
        script_args, args, model_args, _ = parse(path)
        _, trainer_class = METHODS[path.parent.name]
        trainer_class.refuse_options(args)
        model, method, variant = path.parts[-3], path.parts[-2], path.stem.removeprefix("config_")
        assert args.output_dir == f"data/{model}-{method}-{variant}"
        assert script_args.dataset_name and model_args.model_name_or_path
        assert model_args.load_in_4bit == model_args.use_peft == (variant == "qlora")
        assert args.bf16

    def test_batch_is_the_papers_64_pairs(self, path):
        _, args, _, _ = parse(path)
        gpus = 8 if "eight GPUs" in path.read_text().splitlines()[0] else 1
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 64

    def test_header_is_the_command_that_launches_it(self, path):
        command = shlex.split(path.read_text().splitlines()[1].removeprefix("#"))
        assert command[:4] == ["trl-ext", path.parent.name, "--config", str(path.relative_to(ROOT))]
        if "--accelerate_config" in command:
            assert find_accelerate_config(command[-1], load_yaml(path)).is_file()


def test_aries_recipes_of_the_instruction_tuned_models():
    """Pythia has neither a chat template nor a public SFT set with drafts to refine: docs/aries_data.md says so."""
    expected = {"llama-3.1-8b/aries/config_full.yaml"}
    expected |= {f"{model}/aries/config_qlora.yaml" for model in ("llama-3.1-8b", "qwen2.5-7b")}
    expected |= {"llama-3.1-8b/aries/config_qlora_24gb.yaml"}
    expected |= {f"qwen2.5-7b/aries/config_gsm8k_{variant}.yaml" for variant in ("lora", "qlora_24gb")}
    assert expected <= {name_of(path) for path in ARIES_RECIPES}


@pytest.mark.parametrize("path", ARIES_RECIPES, ids=name_of)
class TestAriesRecipe:
    def test_sections_parse(self, path, monkeypatch):
        monkeypatch.chdir(ROOT)
        config = parse_section(export_env(load_yaml(path)), AriesConfig)
        compile_template(config.refinements.template)
        if config.scores.verifier is not None:
            load_verifier(config.scores.verifier)

    def test_sections_of_trls_keys(self, path):
        """As `aries.checks.preflight` looks at them, except that nothing is loaded."""
        recipe = export_env(load_yaml(path))
        model_args = ModelConfig(**check_keys(recipe, [ModelConfig], ("model",)))
        sections = {"training": recipe.at("training", "trainer") or "dpo", "sft": "sft"}
        for section, trainer in sections.items():
            trainer_class, config_class = trainer_classes(TrainerSettings(trainer, {}))
            values = check_keys(recipe, [config_class], (section,), also=(*LOOP_KEYS, "dataset"))
            assert not values.keys() & preflight.OWNED_KEYS.keys()
            args = config_class(**values | {"output_dir": "unused", "use_cpu": True})
            if issubclass(trainer_class, ShiftedDPOTrainer):
                trainer_class.refuse_options(args)
        if path.parent.name == "aries":
            assert bool(model_args.use_peft) == ("lora" in path.stem)
            assert bool(model_args.load_in_4bit) == ("qlora" in path.stem)
            assert bool(model_args.load_in_4bit) or "24 GB GPU" not in path.read_text().splitlines()[0]

    def test_values_of_the_paper(self, path):
        """Rounds, prompts per round and turns (arXiv 2502.05605), where a recipe claims them, and 64 rows a step."""
        if path.parent.name != "aries":
            pytest.skip("the quickstart has its own sizes")
        config = parse_section(load_yaml(path), AriesConfig)
        assert (config.rounds, config.refinements.turns) == (3, 4)
        if "gsm8k" in path.stem:  # it has fewer prompts than the paper takes: none left for another round
            assert 0 <= 7_473 - config.rounds * config.prompts.per_round < 300
        else:
            assert 5_000 <= config.prompts.per_round <= 10_000
        assert config.training["per_device_train_batch_size"] * config.training["gradient_accumulation_steps"] == 64
        model, variant = path.parts[-3], path.stem.removeprefix("config_")
        assert config.output_dir == f"runs/{model}-aries-{variant}"

    def test_header_is_the_command_that_runs_it(self, path):
        if path.parent.name != "aries":
            pytest.skip("`make quickstart` runs it")
        command = shlex.split(path.read_text().splitlines()[1].removeprefix("#"))
        assert command == ["trl-ext", "aries", "run", "--config", str(path.relative_to(ROOT))]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/pythia-2.8b/*/config_full.yaml")), ids=name_of)
def test_papers_settings(path):
    """Literal values of the papers (arXiv 2404.11999 and 2405.21040), as PAPERS.md records them."""
    script_args, args, _, _ = parse(path)
    values = {
        "optim": args.optim,
        "learning_rate": args.learning_rate,
        "beta": args.beta,
        "max_length": args.max_length,
    }
    if path.parent.name == "tdpo":
        values |= {"alpha": args.alpha, "warmup_steps": args.warmup_steps, "max_grad_norm": args.max_grad_norm}
        values["dataset"] = script_args.dataset_name
        assert values == {
            "optim": "rmsprop",
            "learning_rate": 5e-6,
            "beta": 0.1,
            "max_length": 512,
            "alpha": 0.5,
            "warmup_steps": 150,
            "max_grad_norm": 10,
            "dataset": "Anthropic/hh-rlhf",
        }
    else:
        assert values == {"optim": "rmsprop", "learning_rate": 5e-7, "beta": 0.1, "max_length": 512}
        assert args.refinement_weight in (0.1, 0.3, 0.5, 1.0)


def test_settings_of_tdpos_imdb_study():
    """Literal values of the paper (arXiv 2404.11999) and of its code, as PAPERS.md records them; the SFT's one epoch is DPO's."""
    path = ROOT / "recipes/gpt2-large/tdpo/config_imdb.yaml"
    script_args, args, model_args, _ = parse(path)
    assert (args.beta, args.variant, args.alpha) == (0.1, "tdpo2", 0.5)
    assert (args.optim, args.learning_rate, args.warmup_steps, args.max_grad_norm) == ("rmsprop", 5e-6, 150, 10)
    sft_path = path.parents[1] / "sft" / path.name
    command = shlex.split(sft_path.read_text().splitlines()[1].removeprefix("#"))
    assert command == ["trl", "sft", "--config", str(sft_path.relative_to(ROOT))]
    classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    sft_script_args, sft_args, sft_model_args, _ = parse_flat(sft_path, classes, ["--use_cpu"])
    assert (sft_model_args.model_name_or_path, sft_script_args.dataset_name) == (
        "openai-community/gpt2-large",
        "stanfordnlp/imdb",
    )
    assert sft_args.num_train_epochs == 1
    assert model_args.model_name_or_path == sft_args.output_dir  # the one trains what the other makes
    prepared = (ROOT / "recipes/imdb/pairs.py").read_text()
    assert f'default=Path("{script_args.dataset_name}")' in prepared


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=name_of)
def test_accelerate_configs(path):
    """accelerate refuses unknown keys at the top only; those of a section must be among the flags of its launcher."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    assert config.num_processes == values["num_processes"]
    assert config.distributed_type == values["distributed_type"]
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*values.get("fsdp_config", {}), *values.get("deepspeed_config", {})} <= flags.keys()
    assert find_accelerate_config(path.stem, Recipe(None, {}, {})) == path


def test_accelerate_configs_are_those_of_trl():
    """But for `single_gpu`, which TRL ships with eight processes."""
    theirs = {"ddp": "multi_gpu", "fsdp2": "fsdp2", "deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3"}
    assert {path.stem for path in ACCELERATE_CONFIGS} == {"single_gpu", *theirs}
    directory = Path(find_spec("trl").origin).parent / "accelerate_configs"
    for ours, name in theirs.items():
        path = ROOT / f"recipes/accelerate_configs/{ours}.yaml"
        assert yaml.safe_load(path.read_text()) == yaml.safe_load((directory / f"{name}.yaml").read_text()), ours
