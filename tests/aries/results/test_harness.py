"""
`trl-ext aries lm-eval`: the command line it builds. `lm_eval` itself is a stand-in that writes down what it was called with;
the real one is not among the packages of the tests.
"""

import json
from pathlib import Path

import pytest
import yaml

from trl_ext.arguments import split_passed_args
from trl_ext.aries.policies import Policy
from trl_ext.aries.results.harness import lm_eval_command
from trl_ext.cli import main
from trl_ext.recipe import RecipeError


STAND_IN = """
import json, pathlib, sys
pathlib.Path("called.json").write_text(json.dumps(sys.argv[1:]))
sys.exit(3)
"""
MODEL = {"model_name_or_path": "org/base", "dtype": "bfloat16"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A run of LoRA rounds without SFT, of which the first has been trained."""
    monkeypatch.chdir(tmp_path)
    Path("run/round_01/adapter").mkdir(parents=True)
    settings = {
        "output_dir": "run",
        "model": {**MODEL, "use_peft": True},
        "prompts": {"dataset": "p.jsonl"},
        "evaluation": {"dataset": "e.jsonl"},
        "scores": {"verifier": "v.py:f"},
        "training": {"trainer": "dpo"},
    }
    Path("r.yaml").write_text(yaml.safe_dump(settings))
    return "r.yaml"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


class TestCommand:
    @pytest.mark.parametrize(
        ("policy", "model", "expected"),
        [
            (Policy("org/base", None), {}, "pretrained=org/base,dtype=bfloat16"),
            (Policy("org/base", "r/adapter"), {}, "pretrained=org/base,peft=r/adapter,dtype=bfloat16"),
            (Policy("r/model", None), {"model_revision": "v2"}, "pretrained=r/model,dtype=bfloat16"),
            (
                Policy("org/base", "r/adapter"),
                {"model_revision": "v2"},
                "pretrained=org/base,peft=r/adapter,revision=v2,dtype=bfloat16",
            ),
        ],
    )
    def test_model_args(self, policy, model, expected):
        command = lm_eval_command(policy, {**MODEL, **model}, False, "gsm8k,ifeval", "out")
        assert command[0] == "lm_eval"
        assert value(command, "--model") == "hf"
        assert value(command, "--model_args") == expected
        assert value(command, "--tasks") == "gsm8k,ifeval"
        assert value(command, "--output_path") == "out"

    def test_quantized(self):
        """NF4 as TRL trains on it: computed in `dtype`."""
        model = {**MODEL, "load_in_4bit": True, "use_bnb_nested_quant": True}
        command = lm_eval_command(Policy("org/base", "r/adapter"), model, True, "gsm8k", "out")
        assert command[0] == "trl_ext.aries.results.harness_quantized"
        assert value(command, "--model") == "hf-bitsandbytes"
        assert value(command, "--model_args").split(",") == [
            "pretrained=org/base",
            "peft=r/adapter",
            "dtype=bfloat16",
            "load_in_4bit=True",
            "bnb_4bit_quant_type=nf4",
            "bnb_4bit_use_double_quant=True",
            "bnb_4bit_compute_dtype=bfloat16",
            "trust_remote_code=True",
        ]

    def test_a_comma_would_split_the_path(self):
        with pytest.raises(RecipeError, match="cannot take a path with a comma"):
            lm_eval_command(Policy("a,b", None), MODEL, False, "gsm8k", "out")


def test_the_last_trained_round_and_what_is_passed_on(recipe, installed):
    """Overrides of the recipe go before `--`, arguments of `lm_eval` after it; its exit code is ours."""
    flags = ["--tasks", "gsm8k", "--model.dtype", "float32", "--", "--limit", "10", "--seed", "1"]
    assert main(["aries", "lm-eval", "--config", recipe, *flags]) == 3
    called = json.loads(Path("called.json").read_text())
    assert value(called, "--model_args") == "pretrained=org/base,peft=run/round_01/adapter,dtype=float32"
    assert value(called, "--output_path") == "run/round_01/lm_eval"
    assert called[-4:] == ["--limit", "10", "--seed", "1"]


def test_round_0_is_the_model_as_it_came(recipe, installed):
    assert main(["aries", "lm-eval", "--config", recipe, "--round", "0", "--tasks", "gsm8k"]) == 3
    assert "pretrained=org/base,dtype=bfloat16" in json.loads(Path("called.json").read_text())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--round", "2"], "`--round`: round 2 of run is not trained; 0, 1 can be named"),
        (["--limit", "10"], "command line: unknown key `limit`"),
    ],
)
def test_errors(recipe, installed, capsys, flags, message):
    assert main(["aries", "lm-eval", "--config", recipe, "--tasks", "gsm8k", *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not Path("called.json").exists()


def test_a_missing_extra_is_named(recipe, monkeypatch, capsys):
    monkeypatch.setattr("trl_ext.aries.results.harness.find_spec", lambda name: None)
    assert main(["aries", "lm-eval", "--config", recipe, "--tasks", "gsm8k"]) == 2
    assert 'pip install -e ".[eval]"' in capsys.readouterr().err


def test_only_lm_eval_takes_passed_arguments():
    assert split_passed_args(["aries", "lm-eval", "--tasks", "a", "--", "--limit", "1"]) == (
        ["aries", "lm-eval", "--tasks", "a"],
        ["--limit", "1"],
    )
    assert split_passed_args(["tdpo", "--", "x"]) == (["tdpo", "--", "x"], [])
