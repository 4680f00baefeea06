"""What a recipe may say, and which key and line an error is about when it is wrong."""

import os
import textwrap
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import PositiveInt, model_validator
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_ext import TDPOConfig
from trl_ext.recipe import Recipe, RecipeError, apply_overrides, load_yaml, parse_flat, parse_section, take_flag
from trl_ext.recipe_checks import Section, Texts, section


CLASSES = (ScriptArguments, TDPOConfig, ModelConfig, DatasetMixtureConfig)
CPU = ["--use_cpu", "--bf16", "false"]


@section
class Drafts(Section):
    temperature: float | list[float] = 0.7
    max_tokens: int = 512


@section
class Source(Section):
    path: str
    weight: float = 1.0


@section
class Rounds(Section):
    """A recipe with sections, as ARIES has."""

    name: str
    rounds: PositiveInt = 3
    reference: Literal["previous", "initial"] = "previous"
    fresh: bool = True
    drafts: Drafts = field(default_factory=Drafts)
    evaluation: Drafts | None = None
    sources: list[Source] = field(default_factory=list)
    stop: Texts | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @model_validator(mode="after")
    def check_rounds(self):
        if self.rounds > 9 and self.reference == "initial":
            raise ValueError("`reference: initial` is too far away after that many `rounds`.")
        return self


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Writes x.yaml into the working directory, so that messages name it as a user would."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("x.yaml").write_text(textwrap.dedent(text))
        return "x.yaml"

    return write


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as info:
        function(*args, **kwargs)
    return str(info.value)


class TestLoadYaml:
    def test_lines(self, recipe_file):
        recipe = load_yaml(recipe_file("# banner\nbeta: 0.1\n\ndatasets:\n- path: a\n  split: b\n"))
        assert recipe.mapping == {"beta": 0.1, "datasets": [{"path": "a", "split": "b"}]}
        assert recipe.where("beta") == "x.yaml:2"
        assert recipe.where("datasets", 0, "split") == "x.yaml:6"
        assert recipe.where("datasets", 0, "absent") == "x.yaml:5"  # the closest around it
        assert recipe.where("absent") == recipe.where() == "x.yaml"

    def test_anchors_and_merges_stay_yaml(self, recipe_file):
        recipe = load_yaml(recipe_file("a: &a\n  x: 1\nb:\n  <<: *a\n  y: 2\n"))
        assert recipe.mapping["b"] == {"x": 1, "y": 2}

    @pytest.mark.parametrize(
        ("content", "start"),
        [
            ("", "x.yaml: the file is empty"),
            ("# only a comment\n", "x.yaml: the file is empty"),
            ("- a\n- b\n", "x.yaml:1: a recipe is a mapping"),
            ("beta 0.1\n", "x.yaml:1: a recipe is a mapping"),
            ("beta: 0.1\nalpha: [1\nx: 2\n", "x.yaml:3: not valid YAML"),
            ("beta: 0.1\n\talpha: 1\n", "x.yaml:2: not valid YAML"),
            ("a: 1\n---\nb: 2\n", "x.yaml:2: not valid YAML"),
            ("a: !!python/object/apply:os.system ['true']\n", "x.yaml:1: not valid YAML"),
            ("a: &a [*a]\n", "x.yaml: not a YAML text file"),
            ("beta: 0.1\nalpha: 1\nbeta: 0.2\n", "x.yaml:3: `beta` is written twice, first at x.yaml:1"),
            ("t:\n  b: 1\n  b: 1\n", "x.yaml:3: `t.b` is written twice, first at x.yaml:2"),
            ("drafts:\n  temperature: [1.0, .nan]\n", "x.yaml:2: `drafts.temperature[1]`: must be a finite number"),
            ("beta: 1.0e+999\n", "x.yaml:1: `beta`: must be a finite number"),
            ("beta: 0.1\nname: caf\xe9\n".encode("latin-1"), "x.yaml:2: not UTF-8 text"),
            (b"\xff\xfe\x00beta", "x.yaml:1: not UTF-8 text"),
        ],
    )
    def test_what_is_no_recipe(self, recipe_file, content, start):
        path = Path(recipe_file(""))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert error_of(load_yaml, path).startswith(start)

    @pytest.mark.parametrize("path", ["y.yaml", "."])
    def test_no_such_file_names_those_beside_it(self, recipe_file, path):
        recipe_file("beta: 0.1\n")
        message = error_of(load_yaml, path)
        assert message.startswith(f"{path}: ") and message.endswith("x.yaml.")


class TestParseSection:
    def test_nested(self, recipe_file):
        text = """\
            name: a
            rounds: 2
            drafts:
              temperature: 1
            evaluation:
              max_tokens: 8
            sources:
            - path: a.jsonl
            - path: b.jsonl
              weight: 2
            stop: "."
            training:
              learning_rate: 5.0e-7
              max_memory: {0: 20GiB}
            """
        assert parse_section(load_yaml(recipe_file(text)), Rounds) == Rounds(
            name="a",
            rounds=2,
            drafts=Drafts(temperature=1.0),
            evaluation=Drafts(max_tokens=8),
            sources=[Source("a.jsonl"), Source("b.jsonl", 2.0)],
            stop=["."],
            training={"learning_rate": 5.0e-7, "max_memory": {0: "20GiB"}},
        )

    def test_empty_section_is_its_defaults(self, recipe_file):
        rounds = parse_section(load_yaml(recipe_file("name: a\ndrafts:\nevaluation:\n")), Rounds)
        assert (rounds.drafts, rounds.evaluation) == (Drafts(), None)

    @pytest.mark.parametrize(
        ("text", "start"),
        [
            ("round: 2", "x.yaml:2: unknown key `round`. Did you mean `rounds`?"),
            (
                "drafts:\n  temprature: 1",
                "x.yaml:3: unknown key `temprature` in `drafts`. Did you mean `temperature`?",
            ),
            ("zzz: 2", "x.yaml:2: unknown key `zzz`."),
            ("yes: 2", "x.yaml:2: unknown key `True`."),
            ("evaluation:\n  max_tokens: 1.5", "x.yaml:3: `evaluation.max_tokens` must be a whole number, got 1.5."),
            (
                "sources:\n- path: a\n  wieght: 1",
                "x.yaml:4: unknown key `wieght` in `sources[0]`. Did you mean `weight`?",
            ),
            ("sources:\n- weight: 1", "x.yaml:3: `sources[0].path` is missing."),
            ("sources: a.jsonl", "x.yaml:2: `sources` must be a list, got the text 'a.jsonl'."),
            ("drafts: 3", "x.yaml:2: `drafts` must be a mapping"),
            (
                "drafts:\n  temperature: a",
                "x.yaml:3: `drafts.temperature` must be a number or a list, got the text 'a'.",
            ),
            (
                "drafts:\n  temperature: [1, a]",
                "x.yaml:3: `drafts.temperature[1]` must be a number, got the text 'a'.",
            ),
            ("rounds: 0", "x.yaml:2: `rounds` must be positive, got 0."),
            ("rounds: true", "x.yaml:2: `rounds` must be a whole number, got true."),
            ("rounds:", "x.yaml:2: `rounds` must be a whole number, got nothing."),
            ("reference: frist", "x.yaml:2: `reference` must be one of 'previous', 'initial', got the text 'frist'."),
            ("rounds: 10\nreference: initial", "x.yaml:3: `reference: initial` is too far away"),
            ("fresh: 1", "x.yaml:2: `fresh` must be true or false, got 1."),
        ],
    )
    def test_refused(self, recipe_file, text, start):
        assert error_of(parse_section, load_yaml(recipe_file(f"name: a\n{text}\n")), Rounds).startswith(start)

    @pytest.mark.parametrize(
        ("text", "end"),
        [
            ("drafts: {temperature: 5e-7}", "write `5.0e-07`."),
            ("drafts: {temperature: '0.1'}", "write `0.1`."),
            ("rounds: '3'", "write `3`."),
            ("rounds: 1e3", "write `1000`."),
            ("rounds: '1.5'", "got the text '1.5'."),
            ("rounds: many", "got the text 'many'."),
            ("fresh: 'yes'", "Remove the quotes."),
            ("name: 3", 'Put it in quotes: "3".'),
            ("name: no", "put the word in quotes."),
            ("sources: 3", "Write `[3]`."),
            (f"rounds: {'x' * 200}", f"got the text '{'x' * 76}...."),
        ],
    )
    def test_how_to_write_it(self, recipe_file, text, end):
        assert error_of(parse_section, load_yaml(recipe_file(text)), Rounds).splitlines()[-1].endswith(end)

    def test_every_problem_in_one_error(self, recipe_file):
        text = "round: 2\ndrafts:\n  temprature: 1\n  max_tokens: x\n"
        lines = error_of(parse_section, load_yaml(recipe_file(text)), Rounds).splitlines()
        assert sorted(line[: line.index(": ")] for line in lines) == ["x.yaml", "x.yaml:1", "x.yaml:3", "x.yaml:4"]


class TestOverrides:
    @pytest.mark.parametrize(
        ("tokens", "value"),
        [
            (["--training.x", "1e-4"], 1e-4),
            (["--training.x=1.0e-4"], 1e-4),
            (["training.x=3"], 3),
            (["--training.x", "-3"], -3),
            (["--training.x", "text"], "text"),
            (["--training.x", "Query: do # it"], "Query: do # it"),
            (["--training.x", "'3'"], "3"),
            (["--training.x", "null"], None),
            (["--training.x", "[a, 2]"], ["a", 2]),
            (["--training.x", "{a: 1}"], {"a": 1}),
            (["--training.x", "{{ question }} {{ draft }}"], "{{ question }} {{ draft }}"),
            (["--training.x"], True),
            (["--training.x", "--rounds", "2"], True),
            (["--training.x", "1", "--training.x", "2"], 2),
        ],
    )
    def test_values(self, tokens, value):
        recipe = Recipe(Path("x.yaml"), {"training": {"y": 0}}, {})
        assert apply_overrides(recipe, tokens).at("training") == {"y": 0, "x": value}
        assert recipe.mapping == {"training": {"y": 0}}

    def test_missing_sections_are_made(self):
        assert apply_overrides(Recipe(None, {"a": None}, {}), ["--a.b.c", "1"]).mapping == {"a": {"b": {"c": 1}}}

    @pytest.mark.parametrize(
        ("tokens", "start"),
        [
            (["--rounds.x", "1"], "command line: `--rounds.x`: `rounds` is 3"),
            (["stray"], "command line: unexpected argument `stray`"),
            (["--a", "[1"], "command line: `--a`: not a YAML value"),
            (["--a.b", ".inf"], "command line: `--a.b`: must be a finite number"),
        ],
    )
    def test_refused(self, tokens, start):
        assert error_of(apply_overrides, Recipe(None, {"rounds": 3}, {}), tokens).startswith(start)

    def test_errors_say_it_was_the_command_line(self, recipe_file):
        recipe = load_yaml(recipe_file("name: a\ndrafts:\n  temperature: 1\n"))
        message = error_of(parse_section, apply_overrides(recipe, ["--drafts.temprature", "1"]), Rounds)
        assert message.startswith("command line: unknown key `temprature` in `drafts`")

    def test_take_flag(self):
        assert take_flag(["--a", "1", "--config", "x", "b"], "config") == ("x", ["--a", "1", "b"])
        assert take_flag(["--config=x", "--config=y"], "config") == ("y", [])
        assert take_flag(["--num-processes", "2"], "num_processes") == ("2", [])
        assert take_flag(["--configs", "x"], "config") == (None, ["--configs", "x"])
        for args in (["--config"], ["--config", "--a"]):
            assert error_of(take_flag, args, "config") == "command line: `--config` needs a value."


class TestParseFlat:
    def test_precedence(self, recipe_file):
        path = recipe_file("learning_rate: 2.0e-6\nalpha: 0.25\nmax_length: 256\n")
        _, args, _, _ = parse_flat(path, CLASSES, [*CPU, "--learning_rate", "3e-6", "--max-length=128"])
        assert args.learning_rate == 3e-6  # command line, with argparse's own reading of numbers
        assert args.max_length == 128
        assert args.alpha == 0.25  # recipe
        assert args.beta == 0.1  # default

    def test_command_line_alone_and_trl_spellings(self):
        flags = ["--loss_type", "sigmoid", "sft", "--no_remove_unused_columns", "--eval_strategy", "no", "--use_peft"]
        script_args, args, model_args, _ = parse_flat(None, CLASSES, [*CPU, *flags, "--dataset_name", "a.jsonl"])
        assert args.loss_type == ["sigmoid", "sft"]
        assert args.remove_unused_columns is False
        assert args.eval_strategy == "no"
        assert model_args.use_peft is True
        assert script_args.dataset_name == "a.jsonl"

    def test_quirks_of_trl_and_transformers(self, recipe_file):
        text = """\
            use_cpu: true
            bf16: false
            loss_type: sigmoid
            lora_target_modules: all-linear
            lr_scheduler_type: cosine_with_min_lr
            lr_scheduler_kwargs:
              min_lr_rate: 0.1
            gradient_checkpointing_kwargs: {use_reentrant: false}
            model_init_kwargs: {max_memory: {0: 20GiB}}
            eval_strategy: steps
            eval_steps: 100
            report_to: none
            dtype: null
            resume_from_checkpoint: true
            pad_to_multiple_of: 8
            accelerator_config: {split_batches: false}
            debug: [underflow_overflow]
            num_processes: 2
            accelerate_config: ddp
            """
        _, args, model_args, _ = parse_flat(recipe_file(text), CLASSES)
        assert args.loss_type == ["sigmoid"]
        assert model_args.lora_target_modules == "all-linear"
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
        assert args.model_init_kwargs == {"max_memory": {0: "20GiB"}}
        assert args.resume_from_checkpoint is True
        assert args.report_to == []
        assert model_args.dtype is None

    def test_datasets(self, recipe_file):
        text = "datasets:\n- path: a\n  fraction: 1\n- path: b\n  columns: [chosen, rejected]\n  fraction: 2\n"
        *_, dataset_args = parse_flat(recipe_file(text), CLASSES, CPU)
        assert [(entry.path, entry.fraction) for entry in dataset_args.datasets] == [("a", 1.0), ("b", 2.0)]
        assert dataset_args.datasets[1].columns == ["chosen", "rejected"]

    def test_env(self, recipe_file, monkeypatch):
        monkeypatch.setenv("TRL_EXT_TEST", "before")
        parse_flat(recipe_file("env:\n  TRL_EXT_TEST: 3\n"), CLASSES, CPU)
        assert os.environ["TRL_EXT_TEST"] == "3"
        assert error_of(parse_flat, recipe_file("env:\n  A: [1]\n"), CLASSES, CPU).startswith(
            "x.yaml:2: `env.A` must be"
        )
        assert error_of(parse_flat, recipe_file("env: 3\n"), CLASSES, CPU).startswith("x.yaml:1: `env` must be")

    @pytest.mark.parametrize(
        ("text", "start"),
        [
            ("\nlerning_rate: 1.0", "x.yaml:2: unknown key `lerning_rate`. Did you mean `learning_rate`?"),
            ("learning_rate: 5e-7", "x.yaml:1: `learning_rate` must be a number"),
            (
                "eval_strategy: no",
                "x.yaml:1: `eval_strategy` must be one of 'no', 'steps', 'epoch', got false. YAML reads",
            ),
            ("optim: rmsprob", "x.yaml:1: `optim` must be one of"),
            ("variant: tdpo3", "x.yaml:1: `variant` must be one of 'tdpo1', 'tdpo2'"),
            ("dtype: bf16", "x.yaml:1: `dtype` must be one of 'auto', 'bfloat16'"),
            ("bf16: 1", "x.yaml:1: `bf16` must be true or false"),
            ("run_name: 2025-01-01", "x.yaml:1: `run_name` must be text"),
            ("max_steps: 1.5", "x.yaml:1: `max_steps` must be a whole number"),
            ("loss_weights: 0.5", "x.yaml:1: `loss_weights` must be a list"),
            ("loss_weights: [0.5, x]", "x.yaml:1: `loss_weights[1]` must be a number"),
            ("gradient_checkpointing_kwargs: [1]", "x.yaml:1: `gradient_checkpointing_kwargs` must be a mapping"),
            ("beta:", "x.yaml:1: `beta` must be a number"),
            ("datasets: a/b", "x.yaml:1: `datasets` must be a list"),
            ("datasets: [a/b]", "x.yaml:1: `datasets[0]` must be a mapping"),
            ("datasets:\n- name: b", "x.yaml:2: `datasets[0].path` is missing"),
            ("datasets:\n- id: b", "x.yaml:2: unknown key `id` in `datasets[0]`: it is called `path` now"),
            ("datasets:\n- path: b\n  weight: 1", "x.yaml:3: unknown key `weight` in `datasets[0]`: slice the split"),
            ("torch_dtype: auto", "x.yaml:1: unknown key `torch_dtype`: it is called `dtype` now."),
            ("alpha: -1", "x.yaml: `alpha` must be at least 0, got -1"),
            ("load_in_4bit: true\nload_in_8bit: true", "x.yaml: You can't use 8 bit and 4 bit"),
        ],
    )
    def test_refused(self, recipe_file, text, start):
        message = error_of(parse_flat, recipe_file(text + "\n"), CLASSES, CPU)
        assert any(line.startswith(start) for line in message.splitlines())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU takes bf16")
    def test_bf16_without_a_gpu(self, recipe_file):
        message = error_of(parse_flat, recipe_file("bf16: true\n"), CLASSES)
        assert message.startswith("x.yaml: ") and message.endswith(" Add `--use_cpu --bf16 false`.")

    def test_a_handbook_recipe_is_told_everything_at_once(self, recipe_file):
        text = "torch_dtype: bfloat16\nbeta: 0.01\nmax_prompt_length: 512\nwarmup_ratio: 0.1\n"
        message = error_of(parse_flat, recipe_file(text), CLASSES, CPU)
        assert [line.split(": ")[0] for line in message.splitlines()] == ["x.yaml:1", "x.yaml:3", "x.yaml:4"]

    @pytest.mark.parametrize(
        ("flags", "start"),
        [
            (["--lerning_rate", "1"], "command line: unknown flag `--lerning_rate`. Did you mean `--learning_rate`?"),
            (["--learning", "1"], "command line: unknown flag `--learning`. Did you mean `--learning_rate`?"),
            (["--warmup-ratio=0.1"], "command line: unknown flag `--warmup_ratio`: use `warmup_steps`"),
            (["--num_processes", "2"], "command line: unknown flag `--num_processes`: it is for `trl-ext`"),
            (["stray"], "command line: unexpected argument `stray`. Options are `--key value`."),
            (["--learning_rate", "fast"], "command line: argument --learning_rate/--learning-rate: invalid float"),
            (["--variant", "tdpo3"], "command line: argument --variant: invalid choice: 'tdpo3'"),
            (["--alpha", "-1"], "command line: `alpha` must be at least 0"),
        ],
    )
    def test_flags_refused(self, flags, start):
        assert error_of(parse_flat, None, CLASSES, [*CPU, *flags]).startswith(start)
