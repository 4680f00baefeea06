"""What the loop writes for a child, read back. Oracle: what the loop has itself."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.data.records import write_json
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.stages.messages import PreflightMessage
from trl_ext.recipe import apply_overrides, load_yaml, parse_section


ROOT = Path(__file__).parents[3]
RECIPES = sorted([*ROOT.glob("recipes/*/aries/*.yaml"), *ROOT.glob("recipes/quickstart/*.yaml")])


def read_back(message: PreflightMessage) -> PreflightMessage:
    return TypeAdapter(PreflightMessage).validate_python(json.loads(json.dumps(asdict(message), default=str)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_the_recipe_and_its_settings(path, tmp_path):
    recipe = apply_overrides(load_yaml(path), ["--training.beta", "0.2"])
    recipe.mapping.pop("env", None)  # exported by now
    config = parse_section(recipe, AriesConfig)
    run = RunDir(tmp_path)
    write_json(run.resolved, asdict(config) | {"inputs": {"prompts.dataset": "abc"}})
    assert run.read_config() == config

    message = read_back(PreflightMessage.of(run.path, recipe, conversational=True))
    found = message.read_recipe()
    assert found == recipe and found.where("training", "beta") == "command line"
    assert message.run == tmp_path and message.conversational


def test_nothing_heavy_is_imported_to_read_them():
    code = "import sys, trl_ext.aries.stages.running; print(*{'torch', 'transformers', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
