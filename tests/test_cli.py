"""The command line, from the outside: exit codes, one clear error, and a real training of two steps."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import trl_ext
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS
from tests.made_run import make_run
from trl_ext.aries.children import ChildError
from trl_ext.cli import main, split_launch_args
from trl_ext.launch import find_accelerate_config
from trl_ext.recipe import Recipe

from .conftest import PAIRS


def pairs(count: int) -> list[dict]:
    return [{"prompt": x, "chosen": f" {y_w}", "rejected": f" {y_l}"} for x, y_w, y_l in PAIRS[:count]]


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A working directory with eight pairs in pairs.jsonl."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(8)))
    return tmp_path


@pytest.fixture
def recipe(workdir, tiny_model_dir) -> dict:
    """A recipe for two steps on CPU, to be changed and written with `write`."""
    return {
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": "pairs.jsonl",
        "output_dir": "out",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1.0e-3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }


def write(recipe: dict) -> str:
    Path("x.yaml").write_text(yaml.safe_dump(recipe))
    return "x.yaml"


def error_of(capfd, argv: list[str]) -> str:
    """Run and return the one error, which stands alone on stderr, without traceback or usage."""
    capfd.readouterr()
    for handler in logging.getLogger("datasets").handlers:
        handler.stream = sys.stderr  # it keeps the one of its import, which may have been another test's, closed since
    assert main(argv) == 2
    stderr = capfd.readouterr().err
    error = stderr[stderr.index("error: ") :]
    assert "Traceback" not in stderr and "usage:" not in stderr
    return error


class TestEntry:
    def test_help_and_version_are_fast(self):
        """Neither imports torch, transformers or TRL."""
        code = (
            "import sys\n"
            "from trl_ext.cli import main\n"
            "try:\n    main(sys.argv[1:])\n"
            "finally:\n    assert not {'torch', 'transformers', 'trl', 'rich', 'pydantic'} & set(sys.modules)\n"
        )
        for args, expected in ((["--help"], "self-refine-dpo"), ([], "aries"), (["--version"], trl_ext.__version__)):
            done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            assert expected in done.stdout

    def test_console_script(self):
        done = subprocess.run(
            [Path(sys.executable).parent / "trl-ext", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"trl-ext {trl_ext.__version__}\n"

    @pytest.mark.parametrize("command", ["tdpo", "self-refine-dpo"])
    def test_help_of_a_trainer_lists_its_keys(self, command, capsys):
        with pytest.raises(SystemExit) as info:
            main([command, "--help"])
        assert info.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: trl-ext {command}")
        assert ("--refinement_weight" in out) == (command == "self-refine-dpo")

    @pytest.mark.parametrize("argv", [["tpdo"], ["--versio"], ["aries"], ["aries", "list", "a", "b"]])
    def test_usage_errors(self, argv, capsys):
        with pytest.raises(SystemExit) as info:
            main(argv)
        assert info.value.code == 2
        assert "error: " in capsys.readouterr().err


class TestErrors:
    """Each is found before any model is loaded: `model_name_or_path` holds a configuration, a tokenizer and no weights."""

    @pytest.fixture(autouse=True)
    def no_weights(self, recipe, tiny_model_dir, workdir):
        directory = workdir / "no_weights"
        directory.mkdir()
        for file in tiny_model_dir.iterdir():
            if file.suffix != ".safetensors":
                (directory / file.name).write_bytes(file.read_bytes())
        recipe["model_name_or_path"] = str(directory)

    @pytest.mark.parametrize(
        ("changes", "flags", "parts"),
        [
            ({"lerning_rate": 1.0}, [], ["x.yaml:", "unknown key `lerning_rate`. Did you mean `learning_rate`?"]),
            ({}, ["--lerning_rate", "1"], ["command line: unknown flag `--lerning_rate`"]),
            ({"learning_rate": "5e-7"}, [], ["x.yaml:", "`learning_rate` must be a number", "write `5.0e-07`"]),
            ({"alpha": -1}, [], ["x.yaml: `alpha` must be at least 0"]),
            ({"ld_alpha": 0.5}, [], ["`ld_alpha=0.5` is not supported by TDPOTrainer"]),
            ({"use_weighting": True}, [], ["`use_weighting=True` is not supported by TDPOTrainer"]),
            (
                {"accelerate_config": "dpp"},
                [],
                ["accelerate_config: dpp is neither a file nor one of ddp, deepspeed_zero2"],
            ),
            ({"model_name_or_path": None}, [], ["`model_name_or_path` is missing"]),
            ({"model_name_or_path": "./nowhere"}, [], ["`model_name_or_path`: no such folder: ./nowhere."]),
            ({"dataset_name": None}, [], ["No dataset. Set `dataset_name`"]),
            ({"datasets": [{"path": "pairs.jsonl"}]}, [], ["Both `datasets` and `dataset_name` are set."]),
            ({"dataset_name": "none.jsonl"}, [], ["none.jsonl: no such file or directory (working directory: /"]),
            ({"dataset_name": "./none"}, [], ["./none: no such file or directory"]),
            ({"dataset_name": "empty.jsonl"}, [], ["empty.jsonl: the file is empty."]),
            ({"dataset_name": "notes.md"}, [], ["notes.md: cannot read a `.md` file. Supported: .jsonl, .ndjson"]),
            ({"dataset_name": "torn.jsonl"}, [], ["torn.jsonl: cannot be loaded: ", "JSON parse error"]),
            (
                {"dataset_name": "sft.jsonl"},
                [],
                [
                    "sft.jsonl: `prompt` and `completion` are the columns of prompts with one answer, not of preference pairs."
                ],
            ),
            (
                {"dataset_name": "null.jsonl"},
                [],
                ["null.jsonl: 1 of 1 rows of the train dataset have an empty answer (first: row 1)."],
            ),
            ({"dataset_name": "no_files"}, [], ["no_files: cannot be loaded: "]),
            (
                {"eval_strategy": "steps", "eval_steps": 1},
                [],
                ["pairs.jsonl has no split `test`, only train. Set `dataset_test_split`, or `test_split_size: 0.1`"],
            ),
            ({"resume_from_checkpoint": True}, [], ["`resume_from_checkpoint: true`, but out has no checkpoint."]),
            ({}, ["--resume_from_checkpoint", "out/7"], ["`resume_from_checkpoint`: out/7 is not a directory."]),
        ],
    )
    def test_one_clear_error(self, recipe, capfd, changes, flags, parts):
        Path("empty.jsonl").touch()
        Path("notes.md").write_text("x")
        Path("torn.jsonl").write_text('{"chosen": "a", "rejected"')
        Path("sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        Path("null.jsonl").write_text('{"chosen": "a", "rejected": null}\n')
        Path("no_files").mkdir()
        changed = {key: value for key, value in (recipe | changes).items() if value is not None}
        error = error_of(capfd, ["tdpo", "--config", write(changed), *flags])
        for part in parts:
            assert part in error

    def test_too_many_pairs_without_two_answers(self, recipe, capfd):
        """Two of three: one without an answer, one that is the same twice."""
        rows = [
            *pairs(1),
            {"prompt": "a", "chosen": " b", "rejected": " b"},
            {"prompt": "a", "chosen": "b", "rejected": ""},
        ]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        error = error_of(capfd, ["tdpo", "--config", write(recipe)])
        for part in (
            "have an empty answer (first: row 3",
            "have identical answers (first: row 2",
            "2 in all: more than 50%",
        ):
            assert part in error

    def test_an_option_refused_for_the_other_trainer(self, recipe, capfd):
        path = write(recipe | {"label_smoothing": 0.1})
        assert "not supported by SelfRefineDPOTrainer" in error_of(capfd, ["self-refine-dpo", "--config", path])

    def test_missing_recipe(self, workdir, capfd):
        error = error_of(capfd, ["tdpo", "--config", "y.yaml"])
        assert error == "error: y.yaml: no such recipe file.\n"


class TestLaunch:
    @pytest.fixture(autouse=True)
    def not_launched(self, monkeypatch):
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    def test_command_line_before_recipe(self):
        recipe = Recipe(None, {"accelerate_config": "single_gpu", "num_processes": 4}, {})
        args = ["--accelerate_config=ddp", "--beta", "0.5", "--main-process-port", "0"]
        launch_args, script_args = split_launch_args(recipe, args)
        assert launch_args == [
            "--config_file",
            str(Path(__file__).parents[1] / "recipes/accelerate_configs/ddp.yaml"),
            "--num_processes",
            "4",
            "--main_process_port",
            "0",
        ]
        assert script_args == ["--beta", "0.5"]

    def test_names_of_trl(self):
        assert find_accelerate_config("zero1", Recipe(None, {}, {})).parts[-3:] == (
            "trl",
            "accelerate_configs",
            "zero1.yaml",
        )

    def test_never_launches_twice(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "0")
        recipe = Recipe(None, {"accelerate_config": "ddp"}, {})
        assert split_launch_args(recipe, ["--beta", "0.5"]) == (None, ["--beta", "0.5"])


class TestAries:
    @pytest.fixture
    def run(self, workdir):
        """A finished run in runs/made, and r.yaml, whose run it is."""
        run = make_run(Path("runs/made"), TEXTS, [BEFORE, AFTER])
        recipe = json.loads(run.recipe.read_text())
        Path("r.yaml").write_text(yaml.safe_dump(recipe | {"env": {"TRL_EXT_TEST": 1}}))
        return run

    @pytest.fixture
    def calls(self, run, monkeypatch):
        """What the loop is called with; a run of 9 rounds fails in a stage."""
        calls = []

        def stand_in(config, recipe, **options):
            calls.append((config.rounds, config.output_dir, recipe.path, recipe.where("rounds"), options))
            if config.rounds == 9:
                raise ChildError("training failed, see runs/a/logs/training.log")
            return 0

        monkeypatch.setattr("trl_ext.aries.rounds.run", stand_in)
        monkeypatch.setenv("TRL_EXT_TEST", "0")
        return calls

    def test_run_gets_the_recipe_and_what_the_command_line_adds(self, calls):
        options = {"log_format": "text", "quiet": False}
        expected = (2, "runs/made", Path("r.yaml"), "command line", options)
        assert main(["aries", "run", "--config", "r.yaml", "--rounds", "2"]) == 0
        assert os.environ["TRL_EXT_TEST"] == "1"
        assert main(["aries", "run", "r.yaml", "--rounds=2"]) == 0
        assert main(["aries", "run", "--quiet", "r.yaml", "--rounds=2", "--log_format", "json"]) == 0
        assert calls == [expected, expected, (*expected[:4], {"log_format": "json", "quiet": True})]

    def test_run_continues_a_run_directory_wherever_it_is_now(self, calls):
        """With its own recipe."""
        Path("runs/made").rename("moved")
        assert main(["aries", "run", "moved"]) == 0
        assert main(["aries", "run", "moved", "--rounds", "3", "--output_dir", "runs/again"]) == 0
        assert [call[:3] for call in calls] == [
            (1, "moved", Path("moved/recipe.yaml")),
            (3, "runs/again", Path("moved/recipe.yaml")),
        ]

    def test_overrides_do_not_take_the_environment_out_of_the_recipe(self, run, monkeypatch):
        """What is copied into the run directory."""
        from trl_ext.aries.rounds import recipe_text
        from trl_ext.recipe import apply_overrides, export_env, load_yaml

        monkeypatch.setenv("TRL_EXT_TEST", "0")
        monkeypatch.setenv("TRL_EXT_TEST_2", "0")
        recipe = export_env(apply_overrides(load_yaml("r.yaml"), ["--rounds", "2", "--env.TRL_EXT_TEST_2", "a"]))
        copied = yaml.safe_load(recipe_text(recipe))
        assert (copied["rounds"], copied["env"]) == (2, {"TRL_EXT_TEST": 1, "TRL_EXT_TEST_2": "a"})

    def test_a_failed_stage(self, calls, capfd):
        assert main(["aries", "run", "r.yaml", "--rounds", "9"]) == 1
        assert capfd.readouterr().err == "error: training failed, see runs/a/logs/training.log\n"

    @pytest.mark.parametrize("named", [["runs/made"], ["r.yaml"], ["--config", "r.yaml"]])
    def test_a_run_directory_or_a_recipe(self, run, capfd, named):
        assert main(["aries", "status", *named]) == 0
        assert "runs/made: finished" in capfd.readouterr().out
        assert main(["aries", "report", *named]) == 0
        assert main(["aries", "answers", *named, "--output", "answers.json"]) == 0
        assert len(json.loads(Path("answers.json").read_text())) == 10
        for action in (["export", "--output", "model", "--round", "7"], ["pairs", "--output", "pairs"]):
            assert "runs/made" in error_of(capfd, ["aries", action[0], *named, *action[1:]])

    def test_compare_and_list(self, run, capfd):
        assert main(["aries", "compare", "runs/made", "r.yaml", "--output", "c.html"]) == 0
        assert main(["aries", "list"]) == 0
        assert Path("c.html").is_file() and Path("runs/index.html").is_file()

    @pytest.mark.parametrize(
        ("argv", "parts"),
        [
            (["status", "--config", "no.yaml"], ["no.yaml: no such recipe file"]),
            (["status", "no.yaml"], ["no.yaml: no such recipe file"]),
            (["status"], ["`aries status` needs a run directory or a recipe"]),
            (["status", "runs"], ["runs is not a run directory", "trl-ext aries list runs"]),
            (["run", "r.yaml", "stray"], ["command line: unexpected argument `stray`"]),
            (["report", "--config", "r.yaml", "runs/made"], ["command line: unexpected argument `runs/made`"]),
            (["compare", "runs/made"], ["got 1"]),
        ],
    )
    def test_errors(self, run, capfd, argv, parts):
        error = error_of(capfd, ["aries", *argv])
        assert all(part in error for part in parts)


def logged(output_dir: str = "out") -> list[dict]:
    """The logged steps; `save_strategy: no` leaves no trainer_state.json, so the recipe must save."""
    states = sorted(Path(output_dir).glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return [row for row in json.loads(states[-1].read_text())["log_history"] if "loss" in row]


class TestTraining:
    @pytest.mark.parametrize("command", ["tdpo", "self-refine-dpo"])
    def test_two_steps(self, recipe, tiny_model_dir, command):
        """At step 1 the policy is the reference, so the loss is ln 2; the saved weights have moved."""
        path = write(recipe | {"save_strategy": "steps", "save_steps": 2})
        assert main([command, "--config", path]) == 0
        steps = logged()
        assert [row["step"] for row in steps] == [1, 2]
        assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        before, after = (load_file(Path(where) / "model.safetensors") for where in (tiny_model_dir, "out"))
        assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])

    def test_command_line_wins_and_evaluation_split(self, recipe):
        path = write(recipe | {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 0.25})
        flags = ["--max_steps", "1", "--output_dir", "other", "--save_strategy=steps", "--save_steps", "1"]
        assert main(["tdpo", "--config", path, *flags]) == 0
        assert not Path("out").exists()
        state = json.loads(Path("other/checkpoint-1/trainer_state.json").read_text())
        assert state["max_steps"] == 1
        assert any("eval_position_kl/chosen" in row for row in state["log_history"])

    def test_pairs_without_two_answers_are_left_out_and_counted(self, recipe, caplog):
        """Four of the eight, and one epoch of two pairs a step is two steps."""
        spoilt = [{**row, "rejected": row["chosen"]} for row in pairs(2)] + [
            {**row, "chosen": None} for row in pairs(2)
        ]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pairs(4), *spoilt]))
        path = write(recipe | {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2})
        assert main(["tdpo", "--config", path]) == 0
        assert [row["step"] for row in logged()] == [1, 2]
        error = caplog.text
        assert "Left out: 2 of 8 rows of the train dataset have identical answers (first: row 5: " in error
        assert "Left out: 2 of 8 rows of the train dataset have an empty answer (first: row 7)" in error

    def test_resume(self, recipe):
        """`true` continues from the last checkpoint: steps 1 and 2 are read back, 3 is new."""
        path = write(recipe | {"save_strategy": "steps", "save_steps": 2})
        assert main(["tdpo", "--config", path]) == 0
        first = logged()
        assert main(["tdpo", "--config", path, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
        assert logged()[:2] == first
        assert [row["step"] for row in logged()] == [1, 2, 3]

    def test_lora_saves_one_adapter(self, recipe):
        path = write(recipe | {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"})
        assert main(["tdpo", "--config", path]) == 0
        adapter = load_file("out/adapter_model.safetensors")
        assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
        assert not Path("out/ref").exists()

    @pytest.mark.parametrize("command", ["tdpo", "self-refine-dpo"])
    def test_the_model_card_s_recipe_repeats_the_run(self, recipe, command):
        """TRL's card names the method and its paper; the recipe in it, with the data, gives the same weights again."""
        given = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "beta": 0.3, "seed": 7}
        assert main([command, "--config", write(recipe | given)]) == 0
        card = Path("out/README.md").read_text()
        paper = {"tdpo": "2404.11999", "self-refine-dpo": "2405.21040"}[command]
        assert "a method introduced in [" in card and f"https://huggingface.co/papers/{paper})" in card
        assert "8 preference pairs of `pairs.jsonl`." in card
        assert "# Model Card for out\n" in card and 'model="out"' in card
        assert not re.search(r"None\b|licence:|time machine", card)
        (block,) = re.findall("### Recipe\n\n```yaml\n(.*?)```", card, flags=re.DOTALL)
        again = yaml.safe_load(block) | {"dataset_name": "pairs.jsonl", "output_dir": "again", "use_cpu": True}
        assert main([command, "--config", write(again)]) == 0
        first, second = (load_file(Path(where) / "adapter_model.safetensors") for where in ("out", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_script_alone(self, recipe, capfd):
        """`python -m trl_ext.scripts.tdpo`: an error of the recipe is one line, as from `trl-ext`."""
        from trl_ext.scripts import preference, tdpo

        path = write(recipe)
        assert preference.exit_code(tdpo.run, ["--config", path, "--lerning_rate", "1"]) == 2
        assert capfd.readouterr().err.startswith("error: command line: unknown flag `--lerning_rate`")
        assert preference.exit_code(tdpo.run, ["--config", path, "--max_steps", "1"]) == 0
        out, err = capfd.readouterr()
        assert "Model saved to out." in out and "Loading weights" not in err

    @pytest.mark.slow
    def test_script_under_accelerate_launch(self, recipe):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--quiet"]
        script = [*launch, "-m", "trl_ext.scripts.tdpo", "--config", write(recipe)]
        done = subprocess.run([*script, "--max_steps", "1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Model saved to out." in done.stdout

    @pytest.mark.slow
    def test_accelerate_config_launches(self, recipe, laptop, capfd):
        """`--accelerate_config NAME` goes through `accelerate launch`, after a check in a process of its own."""
        assert main(["tdpo", "--config", write(recipe | {"accelerate_config": laptop, "alpha": -1})]) == 2
        assert "`alpha` must be at least 0" in capfd.readouterr().err
        assert main(["tdpo", "--config", write(recipe | {"accelerate_config": laptop, "max_steps": 1})]) == 0
        assert "Model saved to out." in capfd.readouterr().out

    def test_what_is_launched(self, recipe, laptop, monkeypatch):
        """First the check, and if it succeeds the training, with the recipe's environment."""
        launched, codes = [], iter([0, 5, 2])
        monkeypatch.setattr("trl_ext.processes.run_launcher", lambda *call: launched.append(call) or next(codes))
        monkeypatch.setenv("TRL_EXT_TEST", "0")
        path = write(recipe | {"accelerate_config": laptop, "env": {"TRL_EXT_TEST": "1"}})
        assert main(["tdpo", "--config", path, "--beta", "0.5"]) == 5
        script = ["--config", path, "--beta", "0.5"]
        launch = ["--quiet", "--config_file", str(Path("accelerate_configs/laptop.yaml").resolve())]
        assert launched == [
            ("trl_ext.scripts.check", ["tdpo", *script]),
            ("accelerate.commands.launch", [*launch, "--module", "trl_ext.scripts.tdpo", *script]),
        ]
        assert os.environ["TRL_EXT_TEST"] == "1"
        assert main(["tdpo", "--config", path]) == 2 and len(launched) == 3

    @pytest.fixture
    def laptop(self, workdir, monkeypatch) -> str:
        """The name of a configuration of accelerate for one process."""
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_machines": 1}
        Path("accelerate_configs").mkdir()
        Path("accelerate_configs/laptop.yaml").write_text(
            yaml.safe_dump(config | {"num_processes": 1, "debug": False})
        )
        return "laptop"


class TestData:
    """What `dataset_name` may be. The oracle: the same pairs come back, whatever holds them."""

    @pytest.fixture
    def load(self, workdir):
        from trl import DatasetMixtureConfig, ScriptArguments

        from trl_ext.scripts.preference import load_pairs

        def load(name=None, evaluate=False, **kwargs):
            mixture = {key: kwargs.pop(key) for key in ("datasets", "test_split_size") if key in kwargs}
            script_args = ScriptArguments(dataset_name=name, **kwargs)
            return load_pairs(script_args, DatasetMixtureConfig(**mixture), evaluate, seed=3, processing_class=None)

        return load

    def test_files(self, load):
        from datasets import Dataset

        dataset = Dataset.from_list(pairs(8))
        dataset.to_parquet("pairs.parquet")
        dataset.save_to_disk("saved")
        Path("pairs.json").write_text(json.dumps(pairs(8)))
        Path("directory").mkdir()
        Path("directory/train.jsonl").write_text(Path("pairs.jsonl").read_text())
        Path("directory/test.jsonl").write_text(json.dumps(pairs(1)[0]))
        for name in ("pairs.jsonl", "pairs.parquet", "pairs.json", "saved", "directory", str(Path("saved").resolve())):
            train, test = load(name)
            assert train.to_list() == pairs(8), name
            assert test is None
        assert load("directory", evaluate=True)[1].to_list() == pairs(1)
        assert list(load("pairs.jsonl", dataset_streaming=True)[0]) == pairs(8)

    def test_mixture(self, load):
        train, _ = load(datasets=[{"path": "pairs.jsonl"}, {"path": "json", "data_files": "pairs.jsonl"}])
        assert train.to_list() == pairs(8) * 2

    def test_split_is_seeded(self, load):
        first, again = (load("pairs.jsonl", evaluate=True, test_split_size=0.25) for _ in range(2))
        assert [half.to_list() for half in first] == [half.to_list() for half in again]
        assert (len(first[0]), len(first[1])) == (6, 2)

    def test_empty_split(self, load):
        from datasets import Dataset

        from trl_ext.recipe import RecipeError

        Dataset.from_list(pairs(1)).select([]).to_parquet("nothing.parquet")
        with pytest.raises(RecipeError, match="nothing.parquet: no rows"):
            load("nothing.parquet")
