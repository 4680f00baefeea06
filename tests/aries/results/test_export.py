"""
Export: what is written is the policy, by the weights and by its log-probabilities, and nothing is written over.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from trl_ext.aries.children import ChildError
from trl_ext.aries.config.templates import REFINEMENT_TEMPLATE
from trl_ext.aries.data.records import Answer, Chain, to_line, write_json, write_jsonl
from trl_ext.aries.policies import Policy
from trl_ext.aries.results.export import measure
from trl_ext.aries.scoring.evaluation import evaluation_metrics
from trl_ext.cli import main


RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def base(tiny_model_path, tmp_path) -> Path:
    """The tiny model as a bfloat16 checkpoint."""
    path = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


def write_round(run: Path, number: int, tokenizer) -> Path:
    """A finished round, but for its product, and the files of the run that export reads."""
    directory = run / f"round_{number:02d}"
    directory.mkdir(parents=True)
    prompts = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": f"Sort : {i} 3 1"}]} for i in range(4)]
    answer = {"turn": 1, "text": "1 3 4", "tokens": 4, "finish_reason": "stop"}
    chains = [{"prompt_id": str(i), "answers": [answer], "stopped": None} for i in range(4)]
    chains[2] |= {"answers": [], "stopped": "prompt_too_long"}
    (run / "evaluation_prompts.jsonl").write_text("".join(map(to_line, prompts)))
    (directory / "evaluation.jsonl").write_text("".join(map(to_line, chains)))
    (directory / "manifest.json").write_text("{}")
    return directory


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    """
    A recipe whose run has finished round 1 of 2, with the adapter of a QLoRA run on a bfloat16 checkpoint, or with all
    weights; returns its path.
    """
    monkeypatch.chdir(tmp_path)

    def make(use_peft: bool = True) -> str:
        directory = write_round(tmp_path / "run", 1, AutoTokenizer.from_pretrained(base))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if use_peft:
            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if not use_peft or "lora_B" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        product = directory / ("adapter" if use_peft else "model")
        model.save_pretrained(product)
        AutoTokenizer.from_pretrained(base).save_pretrained(product)
        content = {
            "output_dir": "run",
            "rounds": 2,
            "model": {"model_name_or_path": str(base), "use_peft": use_peft, "load_in_4bit": use_peft},
            "prompts": {"dataset": "unused"},
            "evaluation": {"dataset": "unused"},
            "pairs": {"selection": "rule_based"},
            "training": {"use_cpu": True},
        }
        for file in ("r.yaml", "run/recipe.yaml"):
            Path(file).write_text(yaml.safe_dump(content))
        return "r.yaml"

    return make


def export(*options: str) -> int:
    return main(["aries", "export", "--config", "r.yaml", *options])


def test_the_adapter_is_merged_into_the_checkpoint_not_into_nf4(recipe, base, capsys):
    """Oracle: W + α/r · B A in float64, rounded once to bfloat16: equal, but for halves that a second rounding may turn."""
    recipe()
    assert export("--round", "1", "--output", "deep/merged") == 0
    assert "the adapter merged into the base model, in bfloat16" in capsys.readouterr().out
    merged, weights = load_file("deep/merged/model.safetensors"), load_file(base / "model.safetensors")
    adapter = load_file("run/round_01/adapter/adapter_model.safetensors")
    assert merged.keys() == weights.keys()
    changed = 0
    for name, weight in weights.items():
        expected = weight.double()
        prefix = "base_model.model." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.weight" in adapter:
            a, b = (adapter[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
            expected = expected + ALPHA / RANK * b @ a
            changed += 1
        assert merged[name].dtype == torch.bfloat16
        torch.testing.assert_close(merged[name].double(), expected, rtol=2**-7, atol=2**-12)
    assert changed == 4
    assert "quantization_config" not in json.loads(Path("deep/merged/config.json").read_text())
    assert AutoTokenizer.from_pretrained("deep/merged").chat_template
    card = Path("deep/merged/README.md").read_text()
    assert "licence:" not in card and "time machine" not in card
    assert "library_name: transformers\n" in card and "# Model Card for merged\n" in card
    for text in (
        "fine-tuned version of `base` on",
        "trained with ARIES, a method introduced in [",
        "https://huggingface.co/papers/2502.05605)",
        "The policy after round 1 of 2: the adapter merged into the base model, in bfloat16.",
        "Prompts: `unused`.",
        "selection: rule_based",
    ):
        assert text in card
    assert [path.name for path in Path("deep").iterdir()] == ["merged"]


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_the_best_round_is_the_default_if_it_is_clearly_better(recipe, capsys, last):
    """Round 1 has all 20 direct answers right, and round 2 none, or all."""
    recipe()
    content = yaml.safe_load(Path("r.yaml").read_text()) | {"scores": {"verifier": "v.py:f"}}
    Path("r.yaml").write_text(yaml.safe_dump(content))
    shutil.copytree("run/round_01", "run/round_02")
    for number, score in ((1, 1.0), (2, last)):
        chains, scores = [Chain(str(i), "x", [Answer(1, "a", 1, "stop")]) for i in range(20)], [[score]] * 20
        directory = Path(f"run/round_0{number}")
        write_json(directory / "metrics.json", evaluation_metrics(chains, scores, turns=1))
        write_jsonl(directory / "evaluation_scores.jsonl", [{"scores": row} for row in scores])
    assert export("--adapter", "--output", "exported") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "Exporting the best round in place of the last: round 1" in printed
        and "`--round 2` exports the last one" in printed
    ) == (last == 0)
    assert f"The policy after round {1 if last == 0 else 2} of 2" in Path("exported/README.md").read_text()


def test_an_adapter_is_saved_as_it_is(recipe):
    recipe()
    Path("adapter").mkdir()  # an empty directory is as good as none
    assert export("--round", "1", "--output", "adapter", "--adapter") == 0
    product = Path("run/round_01/adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("adapter", name).read_bytes() == (product / name).read_bytes()
    assert AutoTokenizer.from_pretrained("adapter").chat_template
    assert "library_name: peft\n" in Path("adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "policy"),
    [(["--adapter"], {"model": "base", "adapter": "saved"}), ([], {"model": "saved"})],
)
def test_the_card_says_how_to_refine(recipe, base, monkeypatch, options, policy):
    """Its program runs, and asks with the policy, the turns and the template of the run."""
    recipe()
    assert export("--round", "1", "--output", "saved", *options) == 0
    [code] = re.findall(r"```python\n(from trl_ext .*?)```", Path("saved/README.md").read_text(), flags=re.DOTALL)
    asked = {}
    monkeypatch.setattr(
        trl_ext,
        "refine",
        lambda prompts, **given: asked.update(given, prompts=prompts) or [{"answer": "1"}],
        raising=False,
    )
    exec(code, {})
    policy = {name: str(base) if value == "base" else value for name, value in policy.items()}
    assert asked == policy | {
        "prompts": [[{"role": "user", "content": "A question."}]],
        "turns": 4,
        "refinements": {"template": REFINEMENT_TEMPLATE},
    }


def test_full_weights_are_copied(recipe, capfd):
    recipe(use_peft=False)
    assert export("--round", "1", "--output", "model") == 0
    product = Path("run/round_01/model/model.safetensors")
    assert Path("model/model.safetensors").read_bytes() == product.read_bytes()
    assert "differ from those of round 1's policy by 0 nats" in capfd.readouterr().out
    assert export("--round", "1", "--output", "again", "--adapter") == 2
    assert "round 1 of run has no adapter" in capfd.readouterr().err


def test_what_cannot_be_exported_is_refused(recipe, capfd):
    recipe()
    Path("full").mkdir()
    Path("full/kept").write_text("kept")
    for options, message in (
        (["--round", "1", "--output", "full"], "error: --output: full is there already, and is not overwritten."),
        (["--round", "2", "--output", "new"], "error: `--round`: round 2 of run is not finished; 1 can be named.\n"),
        (["--round", "0", "--output", "new"], "error: `--round`: round 0 of a run without SFT"),
    ):
        assert export(*options) == 2
        assert message in capfd.readouterr().err
    assert not Path("new").exists() and Path("full/kept").read_text() == "kept"


def test_a_model_that_is_not_the_policy_is_found(recipe, base):
    """The base in the place of the merged model, as after a merge that did nothing."""
    recipe()
    row = {"prompt_token_ids": list(range(6, 16)), "token_ids": list(range(6, 14))}
    policy = Policy(str(base), "run/round_01/adapter")
    with pytest.raises(ChildError, match=r"is not the policy, and was removed: .*from the base model's by 0\)"):
        measure(policy, Policy(str(base), None), [row] * 4, {}, {"use_cpu": True})
