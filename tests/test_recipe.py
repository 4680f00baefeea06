"""What a recipe may say, and what is said about one that is wrong. The oracle of each error is its text: file, line, way out."""

import os
import textwrap
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_ext import TDPOConfig
from trl_ext.recipe import Recipe, RecipeError, apply_overrides, load_yaml, parse_flat, parse_section, take_flag
from trl_ext.recipe_values import check_value


CLASSES = (ScriptArguments, TDPOConfig, ModelConfig, DatasetMixtureConfig)
CPU = ["--use_cpu", "--bf16", "false"]


@dataclass
class Drafts:
    temperature: float = 0.7
    max_tokens: int = 512


@dataclass
class Source:
    path: Path
    weight: float = 1.0


@dataclass
class Rounds:
    """A recipe with sections, as ARIES has."""

    name: str = field(metadata={"help": "the run directory's name."})
    rounds: int = 3
    reference: Literal["previous", "initial"] = "previous"
    drafts: Drafts = field(default_factory=Drafts)
    evaluation: Drafts | None = None
    sources: list[Source] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")


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
        ("text", "parts"),
        [
            ("", ["x.yaml: the file is empty", "learning_rate: 5.0e-7"]),
            ("# only a comment\n", ["x.yaml: the file is empty"]),
            ("- a\n- b\n", ["x.yaml:1:", "a mapping of `key: value` lines", "the list ['a', 'b']"]),
            ("beta 0.1\n", ["x.yaml:1:", "the text 'beta 0.1'"]),
            ("beta: 0.1\nalpha: [1\nx: 2\n", ["x.yaml:3: not valid YAML", "Look for"]),
            ("beta: 0.1\n\talpha: 1\n", ["x.yaml:2: not valid YAML", "tab"]),
            ("a: 1\n---\nb: 2\n", ["not valid YAML", "but found another document"]),
            ("a: !!python/object/apply:os.system ['true']\n", ["x.yaml:1: not valid YAML", "could not determine"]),
            ("a: &a [*a]\n", ["x.yaml: not a YAML text file"]),
            ("beta: 0.1\nalpha: 1\nbeta: 0.2\n", ["x.yaml:3: `beta` is written twice, first at x.yaml:1. Keep one."]),
            ("t:\n  b: 1\n  b: 1\n", ["x.yaml:3: `t.b` is written twice, first at x.yaml:2"]),
        ],
    )
    def test_what_is_no_recipe(self, recipe_file, text, parts):
        message = error_of(load_yaml, recipe_file(text))
        for part in parts:
            assert part in message

    def test_no_such_file_names_those_beside_it(self, recipe_file):
        recipe_file("beta: 0.1\n")
        assert error_of(load_yaml, "y.yaml") == "y.yaml: no such recipe file. In . there is: x.yaml."

    def test_directory(self, recipe_file):
        recipe_file("beta: 0.1\n")
        assert error_of(load_yaml, ".") == ".: is a directory, not a recipe file. In . there is: x.yaml."

    def test_text_in_another_encoding_is_named_by_its_line(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes("beta: 0.1\nname: café\n".encode("latin-1"))
        found = error_of(load_yaml, tmp_path / "x.yaml")
        assert "x.yaml:2: not UTF-8 text: " in found and "(0xe9). Save the file as UTF-8." in found

    @pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1.0e+999"])
    def test_numbers_that_are_not_finite(self, tmp_path, number):
        (tmp_path / "x.yaml").write_text(f"beta: 0.1\ndrafts:\n  temperature: [1.0, {number}]\n")
        assert "x.yaml:3: `drafts.temperature[1]`: must be a finite number; found" in error_of(
            load_yaml, tmp_path / "x.yaml"
        )
        overridden = error_of(apply_overrides, Recipe(None, {}, {}), ["--drafts.temperature", number])
        assert "command line: `--drafts.temperature`: must be a finite number; found" in overridden

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00beta")
        assert "x.yaml:1: not UTF-8 text: invalid start byte (0xff)" in error_of(load_yaml, tmp_path / "x.yaml")


class Color(Enum):
    RED = "red"


class Opaque:
    """A class pydantic has no schema for."""


class TestCheckValue:
    @pytest.mark.parametrize(
        ("value", "hint", "checked"),
        [
            (1, float, 1.0),
            (5.0e-7, float | None, 5.0e-7),
            (None, float | None, None),
            ("sigmoid", list[str], ["sigmoid"]),  # TRL takes `loss_type: sigmoid`
            (["sigmoid", "sft"], list[str], ["sigmoid", "sft"]),
            ("all-linear", list[str] | None, ["all-linear"]),
            ({"use_reentrant": False}, dict[str, Any] | str | None, {"use_reentrant": False}),
            ('{"a": 1}', dict | str | None, '{"a": 1}'),
            ({"max_memory": {0: "20GiB"}}, dict[str, Any] | None, {"max_memory": {0: "20GiB"}}),
            (8, int | str | None, 8),
            ("runs", Path, Path("runs")),
            ([1, 2], tuple[int, int], (1, 2)),
            ("red", Color, Color.RED),
            ("red", Color | str, "red"),
            ("x", Opaque, "x"),
        ],
    )
    def test_accepted(self, value, hint, checked):
        result = check_value(value, hint)
        assert result == checked
        assert type(result) is type(checked)

    @pytest.mark.parametrize(
        ("value", "hint", "message"),
        [
            ("5e-7", float, "must be a number, got the text '5e-7'. YAML reads `5e-7` as text: write `5.0e-7`."),
            (
                "1e-4",
                float | None,
                "must be a number, got the text '1e-4'. YAML reads `1e-4` as text: write `0.0001`.",
            ),
            ("2.5e-7", float, "must be a number, got the text '2.5e-7'. Remove the quotes."),
            ("0.1", float, "must be a number, got the text '0.1'. Remove the quotes."),
            ("3", int, "must be a whole number, got the text '3'. Remove the quotes."),
            ("1e3", int, "must be a whole number, got the text '1e3'. Write `1000`."),
            ("many", int, "must be a whole number, got the text 'many'."),
            ("inf", float, "must be a number, got the text 'inf'."),
            (True, float, "must be a number, got true."),
            (True, int, "must be a whole number, got true."),
            (1.5, int, "must be a whole number, got 1.5."),
            (None, int, "must be a whole number, got nothing."),
            (1, bool, "must be true or false, got 1."),
            ("yes", bool, "must be true or false, got the text 'yes'. Remove the quotes."),
            ("maybe", bool, "must be true or false, got the text 'maybe'."),
            (3, str, 'must be text, got 3. Put it in quotes: "3".'),
            ([0.5, "x"], list[float], "must be a list of numbers, got the list [0.5, 'x']."),
            (0.5, list[float] | None, "must be a list of numbers, got 0.5. Write `[0.5]`."),
            ({"a": 1}, list[str], "must be a list of texts, got the mapping {'a': 1}."),
            ([1], dict | str | None, "must be a mapping or text, got the list [1]."),
            ({0: "a"}, dict[str, Any], "must be a mapping, got the mapping {0: 'a'}."),
            ("c", Literal["a", "b"], "must be one of 'a', 'b'; got 'c'."),
            ("blue", Color, "must be one of 'red'; got 'blue'."),
            ("rad", Color | str, "must be one of 'red'; got 'rad'. Did you mean `red`?"),
            ("x" * 200, int, f"must be a whole number, got the text '{'x' * 76}...."),
        ],
    )
    def test_refused(self, value, hint, message):
        assert error_of(check_value, value, hint) == message

    def test_bare_no(self):
        message = error_of(check_value, False, Color | str)
        assert (
            "got false. YAML reads a bare `no`, `off`, `yes` or `on` as true or false: put the word in quotes."
            in message
        )

    def test_choices(self):
        assert check_value("tdpo1", str, choices=["tdpo1", "tdpo2"]) == "tdpo1"
        assert check_value(None, str | None, choices=["auto"]) is None
        message = error_of(check_value, "tdpo3", str, choices=["tdpo1", "tdpo2"])
        assert message == "must be one of 'tdpo1', 'tdpo2'; got 'tdpo3'. Did you mean `tdpo2`?"


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
            training:
              learning_rate: 5.0e-7
            """
        assert parse_section(load_yaml(recipe_file(text)), Rounds) == Rounds(
            name="a",
            rounds=2,
            drafts=Drafts(temperature=1.0),
            evaluation=Drafts(max_tokens=8),
            sources=[Source(Path("a.jsonl")), Source(Path("b.jsonl"), 2.0)],
            training={"learning_rate": 5.0e-7},
        )

    def test_empty_section_is_its_defaults(self, recipe_file):
        rounds = parse_section(load_yaml(recipe_file("name: a\ndrafts:\nevaluation:\n")), Rounds)
        assert (rounds.drafts, rounds.evaluation) == (Drafts(), None)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name: a\nround: 2\n", "x.yaml:2: unknown key `round`. Did you mean `rounds`?"),
            (
                "name: a\ndrafts:\n  temprature: 1\n",
                "x.yaml:3: unknown key `temprature` in `drafts`. Did you mean `temperature`?",
            ),
            ("name: a\nzzz: 2\n", "x.yaml:2: unknown key `zzz`."),
            ("name: a\nyes: 2\n", "x.yaml:2: unknown key `True`."),
            (
                "name: a\nevaluation:\n  max_tokens: 1.5\n",
                "x.yaml:3: `evaluation.max_tokens` must be a whole number, got 1.5.",
            ),
            (
                "name: a\nsources:\n- path: a\n  wieght: 1\n",
                "x.yaml:4: unknown key `wieght` in `sources[0]`. Did you mean `weight`?",
            ),
            ("name: a\nsources:\n- weight: 1\n", "x.yaml:3: `sources[0]` needs the key `path`."),
            ("name: a\nsources: a.jsonl\n", "x.yaml:2: `sources` must be a list, got the text 'a.jsonl'."),
            ("name: a\ndrafts: 3\n", "x.yaml:2: `drafts` must be a mapping of `key: value` lines, got 3."),
            ("rounds: 2\n", "x.yaml: the recipe needs the key `name`: the run directory's name."),
            ("name: a\nrounds: 0\n", "x.yaml: the recipe: `rounds` must be at least 1, got 0."),
            (
                "name: a\nreference: first\n",
                "x.yaml:2: `reference` must be one of 'previous', 'initial'; got 'first'.",
            ),
        ],
    )
    def test_refused(self, recipe_file, text, message):
        assert error_of(parse_section, load_yaml(recipe_file(text)), Rounds) == message

    def test_every_problem_in_one_error(self, recipe_file):
        text = "name: a\nround: 2\ndrafts:\n  temprature: 1\n  max_tokens: x\n"
        lines = error_of(parse_section, load_yaml(recipe_file(text)), Rounds).splitlines()
        assert [line[: line.index(": ")] for line in lines] == ["x.yaml:2", "x.yaml:4", "x.yaml:5"]


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
        ("tokens", "message"),
        [
            (["--rounds.x", "1"], "command line: `--rounds.x`: `rounds` is 3, not a section."),
            (["stray"], "command line: unexpected argument `stray`. Overrides are `--section.key value`."),
            (["--a", "[1"], "command line: `--a`: not a YAML value: [1"),
        ],
    )
    def test_refused(self, tokens, message):
        assert error_of(apply_overrides, Recipe(None, {"rounds": 3}, {}), tokens) == message

    def test_errors_say_it_was_the_command_line(self, recipe_file):
        recipe = load_yaml(recipe_file("name: a\ndrafts:\n  temperature: 1\n"))
        message = error_of(parse_section, apply_overrides(recipe, ["--drafts.temprature", "1"]), Rounds)
        assert message == "command line: unknown key `temprature` in `drafts`. Did you mean `temperature`?"

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
        message = error_of(parse_flat, recipe_file("env:\n  A: [1]\n"), CLASSES, CPU)
        assert message == "x.yaml:2: `env.A` must be one value, got the list [1]."
        assert "x.yaml:1: `env` must be a mapping" in error_of(parse_flat, recipe_file("env: 3\n"), CLASSES, CPU)

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("\nlerning_rate: 1.0\n", ["x.yaml:2: unknown key `lerning_rate`. Did you mean `learning_rate`?"]),
            ("learning_rate: 5e-7\n", ["x.yaml:1: `learning_rate` must be a number", "write `5.0e-7`"]),
            ("eval_strategy: no\n", ["x.yaml:1: `eval_strategy`", "put the word in quotes"]),
            ("eval_strategy: stepz\n", ["`eval_strategy` must be one of 'no', 'steps', 'epoch'; got 'stepz'"]),
            ("optim: rmsprob\n", ["x.yaml:1: `optim` must be one of", "Did you mean `rmsprop`?"]),
            ("variant: tdpo3\n", ["x.yaml:1: `variant` must be one of 'tdpo1', 'tdpo2'; got 'tdpo3'"]),
            ("dtype: bf16\n", ["x.yaml:1: `dtype` must be one of 'auto', 'bfloat16'"]),
            ("bf16: 1\n", ["x.yaml:1: `bf16` must be true or false, got 1."]),
            ("run_name: 2025-01-01\n", ['x.yaml:1: `run_name` must be text, got 2025-01-01. Put it in quotes: "2025']),
            ("max_steps: 1.5\n", ["x.yaml:1: `max_steps` must be a whole number, got 1.5."]),
            ("loss_weights: 0.5\n", ["x.yaml:1: `loss_weights` must be a list of numbers", "Write `[0.5]`"]),
            ("beta:\n", ["x.yaml:1: `beta` must be a number, got nothing."]),
            ("datasets: a/b\n", ["x.yaml:1: `datasets` must be a list, got the text 'a/b'"]),
            ("datasets:\n- name: b\n", ["x.yaml:2: `datasets[0]` needs the key `path`"]),
            ("datasets:\n- id: b\n", ["x.yaml:2: unknown key `id` in `datasets[0]`: it is called `path` now"]),
            (
                "datasets:\n- path: b\n  weight: 1\n",
                ["x.yaml:3: unknown key `weight`", "slice the split, `split: train[:50%]`"],
            ),
            ("torch_dtype: auto\n", ["x.yaml:1: unknown key `torch_dtype`: it is called `dtype` now."]),
            ("warmup_ratio: 0.1\n", ["x.yaml:1: unknown key `warmup_ratio`: use `warmup_steps`"]),
            ("max_prompt_length: 1\n", ["x.yaml:1: unknown key `max_prompt_length`: it is gone: `max_length`"]),
            ("dataset_mixer:\n  a: 1.0\n", ["x.yaml:1: unknown key `dataset_mixer`: list the data under `datasets:`"]),
            ("dataset_mixture:\n  datasets: []\n", ["x.yaml:1: unknown key `dataset_mixture`", "`datasets:`"]),
            (
                "evaluation_strategy: steps\n",
                ["x.yaml:1: unknown key `evaluation_strategy`: it is called `eval_strat"],
            ),
            ("overwrite_output_dir: true\n", ["x.yaml:1: unknown key `overwrite_output_dir`: it is gone"]),
            ("alpha: -1\n", ["x.yaml: `alpha` must be at least 0, got -1"]),
            ("load_in_4bit: true\nload_in_8bit: true\n", ["x.yaml: You can't use 8 bit and 4 bit"]),
        ],
    )
    def test_refused(self, recipe_file, text, parts):
        message = error_of(parse_flat, recipe_file(text), CLASSES, CPU)
        for part in parts:
            assert part in message

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU takes bf16")
    def test_bf16_without_a_gpu(self, recipe_file):
        message = error_of(parse_flat, recipe_file("bf16: true\n"), CLASSES)
        assert message.startswith("x.yaml: Your setup doesn't support bf16/gpu")
        assert message.endswith(" Add `--use_cpu --bf16 false`.")

    def test_a_handbook_recipe_is_told_everything_at_once(self, recipe_file):
        text = "torch_dtype: bfloat16\nbeta: 0.01\nmax_prompt_length: 512\nwarmup_ratio: 0.1\n"
        message = error_of(parse_flat, recipe_file(text), CLASSES, CPU)
        assert [line.split(": ")[0] for line in message.splitlines()] == ["x.yaml:1", "x.yaml:3", "x.yaml:4"]

    @pytest.mark.parametrize(
        ("flags", "message"),
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
    def test_flags_refused(self, flags, message):
        assert error_of(parse_flat, None, CLASSES, [*CPU, *flags]).startswith(message)
