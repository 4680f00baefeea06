"""
What is refused before any model is loaded: models, tokenizers, adapters and prompts that cannot work, each made on disk from the
tiny one that can.
"""

import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_ext.aries.checks import preflight
from trl_ext.aries.children import Reporter
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.inputs import read_inputs
from trl_ext.aries.run_dir import RunDir
from trl_ext.recipe import RecipeError, load_yaml, parse_section


ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def recipe(sorting: Path, output_dir: Path, **changes) -> dict:
    return {
        "output_dir": str(output_dir),
        "rounds": 2,
        "model": {"model_name_or_path": str(sorting / "model"), "use_peft": True, "lora_r": 8},
        "prompts": {"dataset": str(sorting / "train.jsonl")},
        "sft": {"dataset": str(sorting / "sft.jsonl"), **ON_CPU},
        "generation": {"max_model_len": 64},
        "drafts": {"max_tokens": 8},
        "scores": {"verifier": "recipes/quickstart/verifier.py:partial_match"},
        "training": {"trainer": "tdpo", **ON_CPU},
        "evaluation": {"dataset": str(sorting / "eval.jsonl")},
        **changes,
    }


@pytest.fixture
def check(sorting, tmp_path):
    """Run the preflight of the tests' recipe with these changes, in this process; what it reported."""

    def run(**changes) -> str:
        reports = io.StringIO()
        file = tmp_path / "r.yaml"
        file.write_text(yaml.safe_dump(recipe(sorting, tmp_path / "run", **changes)))
        loaded = load_yaml(file)
        config = parse_section(loaded, AriesConfig)
        conversational = read_inputs(config).conversational
        run_dir = RunDir(tmp_path / "run")
        preflight.check_recipe(run_dir, config, loaded, conversational, Reporter(reports))
        return reports.getvalue()

    return run


@pytest.fixture
def model(sorting, tmp_path, check):
    """Check a copy of the tiny model after an edit."""

    def run(edit, **changes):
        path = tmp_path / "model"
        shutil.copytree(sorting / "model", path)
        edit(path)
        settings = recipe(sorting, tmp_path)["model"] | {"model_name_or_path": str(path)} | changes.pop("model", {})
        check(model=settings, **changes)

    return run


def edit_json(path: Path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def to_pickle(path: Path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def to_adapter(path: Path):
    base = AutoModelForCausalLM.from_pretrained(path)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(path / "adapter")
    for file in path.glob("*.*"):
        file.unlink()
    shutil.copytree(path / "adapter", path, dirs_exist_ok=True)


def cut_off(path: Path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_chat_template(path: Path):
    (path / "chat_template.jinja").unlink()


def strict_chat_template(path: Path):
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")


def test_the_tests_recipe_passes(check):
    check()


def test_a_launch_that_cannot_work(check):
    """The others: `test_launch.py`."""
    check(training={"trainer": "tdpo", **ON_CPU, "accelerate_config": "ddp", "num_processes": 2})
    with pytest.raises(
        RecipeError, match=r"r.yaml:\d+: `training.accelerate_config`: accelerate trains with FSDP on GPUs"
    ):
        check(training={"trainer": "tdpo", **ON_CPU, "accelerate_config": "fsdp2"})


def test_a_tokenizer_without_padding_is_taken(model):
    """TRL pads with EOS then."""
    model(lambda path: edit_json(path / "tokenizer_config.json", pad_token=None))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path: edit_json(path / "tokenizer_config.json", eos_token=None), "has no EOS token to end answers"),
        (without_chat_template, "the prompts are messages, and the tokenizer of .* has no chat template. Give it one"),
        (to_pickle, r"only as a pickle \(pytorch_model.bin\).*save_pretrained"),
        (lambda path: (path / "model.safetensors").unlink(), r"has no weights: no \*.safetensors among chat_template"),
        (cut_off, r"model.safetensors is cut off or damaged: it has [\d,]+ bytes.*Copy or download the model again"),
        (lambda path: path.rename(path.with_name("modle")), "no such folder: .*/model. Did you mean .*/modle"),
        (to_adapter, "is a PEFT adapter on .*, not a model. Merge it"),
        (lambda path: (path / "config.json").write_text("{"), "config.json' is not a valid JSON file"),
        (
            lambda path: (path / "tokenizer.json").write_text("{"),
            "the config or the tokenizer of .*/model cannot be read: ",
        ),
    ],
    ids=["eos", "template", "pickle", "no weights", "cut off", "misspelt", "adapter", "config", "tokenizer"],
)
def test_models_that_cannot_be_trained(model, edit, message):
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: `model.model_name_or_path`: (.|\n)*(" + message + ")"):
        model(edit)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["no", "such"], "Target modules .* not found in the base model"),
        (
            ["q_proj"],
            "Target modules q_proj not found .*TRL takes a list of one as a pattern.*: write `.*: [.][*]q_proj`",
        ),
    ],
)
def test_adapters_that_the_model_does_not_take(check, sorting, tmp_path, targets, message):
    settings = recipe(sorting, tmp_path)["model"]
    with pytest.raises(RecipeError, match=rf"r\.yaml:\d+: `model`: {message}"):
        check(model=settings | {"lora_target_modules": targets})
    if len(targets) == 1:  # the way out is one
        check(model=settings | {"lora_target_modules": f".*{targets[0]}"})


@pytest.mark.parametrize("section", ["training", "sft"])
@pytest.mark.parametrize("key", ["learning_rate", "per_device_train_batch_size"])
def test_settings_that_nobody_looks_at_before_the_training(check, sorting, tmp_path, section, key):
    settings = recipe(sorting, tmp_path)[section]
    for value in (-1, 0):
        with pytest.raises(RecipeError, match=rf"r\.yaml:\d+: `{section}.{key}` must be positive, got {value}"):
            check(**{section: settings | {key: value}})


@pytest.mark.parametrize("section", ["prompts", "evaluation"])
def test_a_split_beside_a_mixture(check, sorting, section):
    """Even the default one: a recipe that says `test` means it."""
    files = {"prompts": "train.jsonl", "evaluation": "eval.jsonl"}
    mixture = {"datasets": [{"path": str(sorting / files[section])}]}
    check(**{section: mixture})
    with pytest.raises(RecipeError, match=rf"r\.yaml:\d+: `{section}.split` is that of `{section}.dataset`"):
        check(**{section: mixture | {"split": "test"}})


def test_a_model_with_fewer_positions_than_the_engine_is_asked_for(model):
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: `generation.max_model_len` is 64, .*32 positions"):
        model(lambda path: edit_json(path / "config.json", max_position_embeddings=32))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is asked for its methods")
def test_a_quantization_that_vllm_does_not_know(check):
    """Oracle: vLLM's own list of methods. Nothing is started for it, and servers have settings of their own."""
    with pytest.raises(RecipeError, match=r"r.yaml:\d+: `generation.quantization`: .*`fp9`.* Did you mean `fp8`\?"):
        check(generation={"max_model_len": 64, "quantization": "fp9"})
    check(generation={"max_model_len": 64, "quantization": "FP8"})  # vLLM takes capitals too
    check(generation={"max_model_len": 64, "quantization": "fp9", "base_urls": ["http://localhost:1/v1"]})


def test_a_prompt_that_the_chat_template_refuses(model):
    with pytest.raises(
        RecipeError, match="prompts of `prompts.dataset` have roles that the chat template drops or refuses"
    ):
        model(strict_chat_template)


def test_tokens_without_an_embedding(model):
    """
    A tokenizer may have more entries than the model has embeddings, as Gemma 3's has, as long as no row needs them. The tests'
    tokenizer has 24, and those of the digits are among the last.
    """

    def add_token(path):
        file = json.loads((path / "tokenizer.json").read_text())
        token = {**file["added_tokens"][-1], "id": 24, "content": "<image>"}
        file["added_tokens"].append(token)
        (path / "tokenizer.json").write_text(json.dumps(file))

    model(add_token)


def test_a_prompt_with_a_token_without_an_embedding(model):
    with pytest.raises(
        RecipeError, match="prompts of `prompts.dataset` have a token for which the model has no embedding"
    ):
        model(lambda path: edit_json(path / "config.json", vocab_size=8))


def test_prompts_that_are_too_long_for_the_context(check, sorting, tmp_path):
    """A third may be, by default half; the rest is for `prompt_too_long` to count."""
    rows = [json.loads(line) for line in (sorting / "train.jsonl").read_text().splitlines()]
    long = {"prompt": [{"role": "user", "content": "Sort : " + "1 " * 60}], "solution": ""}
    for count, fits in ((20, True), (60, False)):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:40], *[long] * count]))
        if fits:
            check(prompts={"dataset": str(file)})
            continue
        with pytest.raises(
            RecipeError, match=r"60 of 100 prompts of `prompts.dataset` cannot be used \(60 prompt_too_long\)"
        ):
            check(prompts={"dataset": str(file)})
        check(prompts={"dataset": str(file)}, health={"max_dropped": 0.6})


# Code that a model brings


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def custom_model(marker: Path):
    def edit(path):
        (path / "code.py").write_text(CODE.format(marker=str(marker)))
        auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        edit_json(path / "config.json", model_type="mine", auto_map=auto_map)

    return edit


def custom_tokenizer(marker: Path):
    def edit(path):
        (path / "code.py").write_text(CODE.format(marker=str(marker)))
        edit_json(
            path / "tokenizer_config.json",
            tokenizer_class="Tokenizer",
            auto_map={"AutoTokenizer": [None, "code.Tokenizer"]},
        )

    return edit


@pytest.mark.parametrize("custom", [custom_model, custom_tokenizer])
def test_code_of_a_model_is_not_run_unless_asked_for(model, sorting, tmp_path, custom):
    """The code leaves a file where it runs; with `trust_remote_code` it does."""
    marker = tmp_path / "executed"
    with pytest.raises(RecipeError, match="brings Python code of its own, which is not run.*trust_remote_code: true"):
        model(custom(marker))
    assert not marker.exists()


def test_code_of_a_model_is_run_when_asked_for(model, sorting, tmp_path):
    marker = tmp_path / "executed"
    sections = recipe(sorting, tmp_path)
    trusted = {name: sections[name] | {"trust_remote_code": True} for name in ("training", "sft")}
    model(custom_model(marker), model={"lora_target_modules": ["q_proj", "v_proj"]}, **trusted)
    assert marker.exists()


def test_code_of_a_reward_model_is_never_run(check, sorting, tmp_path):
    path, marker = tmp_path / "rm", tmp_path / "executed"
    shutil.copytree(sorting / "model", path)
    custom_model(marker)(path)
    with pytest.raises(RecipeError, match="`scores.reward_model`: .*custom code"):
        check(scores={"reward_model": str(path)})
    assert not marker.exists()


def test_a_reward_model_with_pickled_weights_is_refused(check, sorting, tmp_path):
    path = tmp_path / "rm"
    shutil.copytree(sorting / "model", path)
    to_pickle(path)
    with pytest.raises(RecipeError, match=r"`scores.reward_model`: .*only as a pickle \(pytorch_model.bin\)"):
        check(scores={"reward_model": str(path)})


# Adapters that a run made, and that are not what they were


def save_adapter(path: Path, base: Path, **lora):
    settings = {"r": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]} | lora
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora.get("hidden"):
        del settings["hidden"]
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_size": 128}))
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(path)


def to_adapter_pickle(path: Path):
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("lora", "edit", "message"),
    [
        ({}, lambda path: None, None),
        (
            {"r": 4},
            lambda path: None,
            r"lora_A is \(4, 64\), and the model and `model.lora_r: 8` need \(8, 64\)",
        ),
        ({"hidden": True}, lambda path: None, r"does not fit the model: .*lora_A is \(8, 128\)"),
        ({}, to_adapter_pickle, r"only as a pickle \(adapter_model.bin\)"),
        (
            {},
            lambda path: (path / "adapter_model.safetensors").write_bytes(b"torn"),
            "adapter_model.safetensors cannot be read",
        ),
    ],
    ids=["whole", "rank", "base", "pickle", "torn"],
)
def test_adapters_of_a_run(check, sorting, tmp_path, lora, edit, message):
    adapter = tmp_path / "run" / "round_01" / "adapter"
    adapter.mkdir(parents=True)
    save_adapter(adapter, sorting / "model", **lora)
    edit(adapter)
    if message is None:
        check()
        return
    with pytest.raises(RecipeError, match=f"round_01/adapter(.|\n)*{message}(.|\n)*another `output_dir`"):
        check()


def test_plain_text_is_odd_unless_the_recipe_says_where_an_answer_ends(check, sorting, tmp_path):
    """The tiny model's tokenizer has a chat template. `drafts.stop` is what a base model needs, and `init --text` writes."""
    sections = {}
    for name, file in (("prompts", "train"), ("evaluation", "eval"), ("sft", "sft")):
        row = {"prompt": f"{name} : 2 1", **({"completion": "1 2"} if name == "sft" else {})}
        (tmp_path / f"{file}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
        sections[name] = recipe(sorting, tmp_path)[name] | {"dataset": str(tmp_path / f"{file}.jsonl")}
    assert check(**sections).count("are plain text, to which the tokenizer's chat template is not applied") == 3
    assert check(**sections, drafts={"max_tokens": 8, "stop": ["\n"]}) == ""


def test_sft_rows_without_an_answer_are_counted(check, sorting, tmp_path):
    rows = [json.loads(line) for line in (sorting / "sft.jsonl").read_text().splitlines()[:6]]
    rows[1]["completion"] = None
    rows[4]["completion"] = [{"role": "assistant", "content": " "}]
    (tmp_path / "sft.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said = check(sft={"dataset": str(tmp_path / "sft.jsonl"), **ON_CPU})
    assert "Left out: 2 of 6 rows of `sft.dataset` have no text in `completion`." in said
