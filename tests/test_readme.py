"""
The Python blocks of README.md and docs/ run as written, and commands name what exists.

The Hub is a directory here: the ids in the blocks are paths below the working directory, with a tiny random model and eight pairs.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from trl_ext.arguments import ACTIONS, TRAINERS, make_parser, split_passed_args
from trl_ext.aries.config import AriesConfig, RefineConfig
from trl_ext.aries.training import train as training
from trl_ext.cli import named_run, split_launch_args
from trl_ext.launch import find_accelerate_config
from trl_ext.recipe import Recipe, apply_overrides, check_keys, export_env, load_yaml, parse_section, take_flag
from trl_ext.scripts import self_refine_dpo, tdpo


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"tdpo": tdpo, "self-refine-dpo": self_refine_dpo}

# Each block runs in its own namespace. DPOConfig refuses its default, bf16, without a GPU unless `use_cpu` is set, and no environment variable changes that. So the
# blocks are told that bf16 works, and accelerate uses the CPU.
RUNNER = """
import json, sys
import transformers.training_args
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
for code in json.load(open(sys.argv[1])):
    names = {}
    exec(compile(code, "block", "exec"), names)
    trainer = names.get("trainer")
    print("RAN", None if trainer is None else (type(trainer).__name__, trainer.state.global_step))
"""


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the bash blocks, comments removed."""
    lines = (line.partition(" #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_model_dir, conversational_pairs) -> dict[str, list[str]]:
    """For each page, what every Python block's `trainer` was and how many steps it made. One process runs them all."""
    path = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model_dir, path / "Qwen" / "Qwen2.5-0.5B-Instruct")
    dataset = path / "trl-lib" / "ultrafeedback_binarized"
    dataset.mkdir(parents=True)
    scored = conversational_pairs.add_column("score_chosen", [8.0] * 8).add_column("score_rejected", [7.0] * 8)
    scored.to_json(dataset / "train.jsonl")
    pairs = path / "runs" / "quickstart" / "round_01" / "pairs.jsonl"
    pairs.parent.mkdir(parents=True)
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "turn": 0, "draft": null, "weight": 2}\n')

    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    code = {str(page.relative_to(ROOT)): blocks(page.read_text(encoding="utf-8"), "python") for page in pages}
    (path / "blocks.json").write_text(json.dumps([block for found in code.values() for block in found]))
    (path / "runner.py").write_text(RUNNER)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "runner.py", "blocks.json"], cwd=path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = iter(re.findall(r"^RAN (.*)$", done.stdout, flags=re.MULTILINE))
    return {page: [next(results) for _ in found] for page, found in code.items()}


def test_python_blocks_run_as_written(ran):
    # Eight pairs are one batch of the default size, and the default is three epochs
    tdpo_ran, self_refine_ran = str(("TDPOTrainer", 3)), str(("SelfRefineDPOTrainer", 3))
    assert {page: found for page, found in ran.items() if found} == {
        "README.md": [tdpo_ran],
        "docs/aries_data.md": ["None", "None"],
        "docs/custom_losses.md": [str(("MarginDPOTrainer", 3))],
        "docs/migration.md": [tdpo_ran],
        "docs/own_task.md": ["None"],
        "docs/paper_index.md": ["None", "None"],
        "docs/self_refine_dpo.md": [self_refine_ran],
        "docs/tdpo.md": [tdpo_ran],
        "docs/tour.md": [tdpo_ran],
    }


def check_command(command: str) -> None:
    """Fail if a command names a target, sub-command, option or file that does not exist."""
    words = shlex.split(command)
    program, *arguments = itertools.dropwhile(re.compile(r"\w+=").match, words)
    if program == "trl-ext":
        check_trl_ext(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "accelerate":
        assert arguments[0] == "launch"
        assert all((ROOT / word).exists() for word in arguments if word.endswith(".yaml"))
    elif program == "python":
        assert all((ROOT / word).exists() for word in arguments if re.search(r"^(docs|tests|recipes)/", word))
    elif program == "trl":  # TRL's own
        assert arguments[:2] == ["sft", "--config"] and (ROOT / arguments[2]).exists()
    elif program == "vllm":
        check_vllm(arguments)
    else:
        pytest.fail(f"an unknown kind of command: {command}")


def check_vllm(arguments: list[str]) -> None:
    """Check options against vLLM's source, since its parser takes seconds to import."""
    assert arguments[0] == "serve"
    package = find_spec("vllm")
    if package is not None:
        options = (Path(package.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8")
        for word in arguments:
            if word.startswith("--") and word != "--port":  # the HTTP server's
                assert re.search(rf"^    {word[2:].replace('-', '_')}: ", options, flags=re.MULTILINE), word


def check_trl_ext(arguments: list[str]) -> None:
    arguments, _ = split_passed_args(arguments)
    args, rest = make_parser().parse_known_args(arguments)
    if args.command == "migrate" or (args.command, getattr(args, "action", None)) == ("aries", "init"):
        assert rest == []
        return
    if args.command == "completion":
        assert rest[0] == ">"
        return
    if args.command == "doctor":
        if args.config is None:
            assert rest == []
            return
        if args.config.parts[0] == "my-task":
            return
        mapping = load_yaml(ROOT / args.config).mapping
        return check_trl_ext(
            [*(["aries", "run"] if "prompts" in mapping else ["tdpo"]), "--config", str(args.config), *rest]
        )
    if args.command == "aries":
        if args.action not in ACTIONS:
            assert rest == []
            return
        if args.action == "refine":
            overrides = rest[1:] if rest and not rest[0].startswith("-") else rest
            settings = Recipe(None, {"model": {"model_name_or_path": "any"}}, {})
            parse_section(apply_overrides(settings, overrides), RefineConfig)
            return
        named, overrides = named_run(args, rest)
        if named.startswith("my-task/"):  # what `aries init` writes
            return
        if named.startswith("runs/"):
            assert overrides == []
            return
        recipe = export_env(apply_overrides(load_yaml(ROOT / named), overrides))
        trainer = parse_section(recipe, AriesConfig).training.get("trainer", "dpo")
        check_keys(recipe, [training.TRAINERS[trainer][1]], ("training",), also=("trainer", "reference"))
        return
    path, _ = take_flag(rest, "config")
    recipe = load_yaml(ROOT / path)
    _, script_args = split_launch_args(recipe, [word if word != path else str(ROOT / path) for word in rest])
    SCRIPTS[args.command].parse_args([*script_args, "--use_cpu"])
    name, _ = take_flag(rest, "accelerate_config")
    if name is not None:
        assert find_accelerate_config(name, recipe).is_file()


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.MULTILINE))
    variables = dict(word.split("=", 1) for word in arguments if "=" in word)
    assert {word for word in arguments if "=" not in word} <= targets
    assert variables.keys() <= {"DEVICE", "PYTHON", "VENV", "TORCH_CPU_INDEX", "RECIPE", "RUN", "TRL", "ARGS"}
    if "RECIPE" in variables:
        (target,) = (word for word in arguments if "=" not in word)
        action = ["aries", "run"] if target == "aries" else [target]
        check_trl_ext([*action, "--config", variables["RECIPE"], *shlex.split(variables.get("ARGS", ""))])


def check_pip(arguments: list[str]) -> None:
    install_sh = (ROOT / "requirements" / "install.sh").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if arguments[0] == "uninstall":
        assert " ".join(arguments) in install_sh
        return
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == "--constraint":
            assert (ROOT / following).is_file()
        elif word.startswith("torch=="):
            assert f'torch_cpu="{word}"' in install_sh
        elif word.startswith("."):
            assert set(re.fullmatch(r"\.\[(.*)\]", word).group(1).split(",")) <= extras.keys()


@pytest.mark.parametrize("command", commands(README))
def test_commands_name_what_exists(command):
    check_command(command)


def test_inline_commands_name_what_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`make ([a-z-]+)", prose)) <= targets
    assert set(re.findall(r"`trl-ext ([a-z-]+)", prose)) <= {*TRAINERS, "aries", "doctor", "migrate", "completion"}


def test_extras_are_all_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == extras.keys()
