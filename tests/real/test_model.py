"""
Gemma 3 270M, pretrained and text-only, as it is published: with the name of an image processor that is not there, and with a token more than
it has embeddings. Oracles: doctor finds nothing, a policy that is its own reference has the loss ln 2, and steps lower it.
"""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from tests.rows.shapes import CONVERTED
from trl_ext.cli import main


MESSAGES = CONVERTED["messages"][0]
LORA = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"], "dtype": "float32"}
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


def write_rows(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def write_recipe(recipe: dict) -> str:
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    return "r.yaml"


@pytest.mark.parametrize("method", ["tdpo", "self-refine-dpo"])
def test_two_steps(method, gemma, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(
        {
            "model_name_or_path": gemma,
            **LORA,
            **ON_CPU,
            "dataset_name": write_rows("pairs.jsonl", MESSAGES * 2),
            "output_dir": "out",
            "learning_rate": 1.0e-3,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "max_length": 128,
        }
    )
    assert main(["doctor", "--config", recipe]) == 0
    assert main([method, "--config", recipe]) == 0
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", capfd.readouterr().out)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] < losses[0]


def test_a_small_round_of_aries(gemma, tmp_path, monkeypatch):
    """SFT on eight rows, chains of two answers on eight prompts in the embedded engine, TDPO with LoRA on what the verifier prefers."""
    monkeypatch.chdir(tmp_path)
    questions = [f"Write the word {word}." for word in "one two three four five six seven eight nine ten".split()]
    sft = [{"prompt": f"{q}\nAnswer:", "completion": f" {q.split()[-1]}"} for q in questions[:4]]
    sft += [{"prompt": f"{q}\nAnswer:", "draft": " no", "completion": f" {q.split()[-1]}"} for q in questions[:4]]
    Path("verifier.py").write_text(
        "def words(prompts, completions, **kwargs):\n    return [-float(len(text.split())) for text in completions]\n"
    )
    recipe = write_recipe(
        {
            "output_dir": "run",
            "rounds": 1,
            "model": {"model_name_or_path": gemma, **LORA},
            "sft": {"dataset": write_rows("sft.jsonl", sft), **ON_CPU, "max_steps": 2, "max_length": 64},
            "prompts": {"dataset": write_rows("train.jsonl", [{"prompt": f"{q}\nAnswer:"} for q in questions[:8]])},
            "generation": {"max_model_len": 128, "max_num_seqs": 16, "cpu_kv_cache_gib": 1},
            "drafts": {"temperature": 1.0, "max_tokens": 12, "stop": ["\n"]},
            "refinements": {"turns": 2, "template": "{{ question }}{{ draft }}\nA shorter answer:"},
            "scores": {"verifier": "verifier.py:words"},
            "pairs": {"selection": "best_over_worst"},
            "health": {"max_dropped": None},
            "training": {"trainer": "tdpo", **ON_CPU, "max_steps": 2, "max_length": 128},
            "evaluation": {"dataset": write_rows("eval.jsonl", [{"prompt": f"{q}\nAnswer:"} for q in questions[8:]])},
        }
    )
    assert main(["doctor", "--config", recipe]) == 0
    assert main(["aries", "run", "--config", recipe]) == 0
    answers = [json.loads(line) for line in Path("run/round_01/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and all("\n" not in a["text"] for chain in answers for a in chain["answers"])
    assert Path("run/round_01/adapter/adapter_model.safetensors").exists()
    assert Path("run/round_01/manifest.json").exists()
