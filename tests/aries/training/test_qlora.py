"""
`make aries-qlora-smoke`: three QLoRA rounds by the command line, with real vLLM, and what they leave behind.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_ext.aries.data.records import sha256


ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart"


@pytest.mark.slow
@pytest.mark.vllm
def test_three_qlora_rounds(tmp_path):
    """
    The policy is another one after every round, an adapter on the checkpoint as it came, which nothing has touched, and no
    model is anywhere. What vLLM answered with is that adapter, and the KL to the initial policy starts at 0. With another
    round's weights in the place of a round's adapter the check stops the run.
    """
    sizes = re.search(r"^QLORA_SMOKE := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1).split()
    subprocess.run([sys.executable, str(QUICKSTART / "prepare.py"), f"--output={tmp_path}", *sizes], check=True)
    checkpoint, run = sha256(tmp_path / "model"), tmp_path / "run"
    data = {
        "output_dir": run,
        "model.model_name_or_path": tmp_path / "model",
        "sft.dataset": tmp_path / "sft.jsonl",
        "prompts.dataset": tmp_path / "train.jsonl",
        "evaluation.dataset": tmp_path / "eval.jsonl",
    }
    command = [sys.executable, "-m", "trl_ext.cli", "aries", "run", f"--config={QUICKSTART / 'aries_qlora.yaml'}"]
    command += [f"--{key}={value}" for key, value in data.items()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"after SFT.*\n.*round 1 .*\n.*round 2 .*\n.*round 3 ", done.stdout)

    assert sha256(tmp_path / "model") == checkpoint
    assert sorted({file.parent.relative_to(run).as_posix() for file in run.rglob("*.safetensors")}) == [
        f"round_0{number}/adapter" for number in range(4)
    ]
    adapters = [load_file(run / f"round_0{number}" / "adapter" / "adapter_model.safetensors") for number in range(4)]
    for earlier, later in zip(adapters[:-1], adapters[1:], strict=True):
        assert earlier.keys() == later.keys() and all("lora_" in name for name in later)
        assert any(not torch.equal(earlier[name], later[name]) for name in later)
    for number in range(4):
        directory = run / f"round_0{number}"
        policy = json.loads((directory / "adapter" / "adapter_config.json").read_text())
        assert policy["base_model_name_or_path"] == str(tmp_path / "model")
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest["trained_on_nf4_sampled_at_full_precision"]
        parity, kl = manifest["parity"], json.loads((directory / "metrics.json").read_text())["kl_to_initial"]
        assert parity["difference"] < 1e-4 < parity["trained_precision_difference"]
        assert all(other["distinguishable"] for other in parity["others"].values())
        assert kl["answers"] == 64 and (kl["per_answer"] != 0) == (number > 0)

    # The adapter of another round
    for name in ("parity.json", "manifest.json"):
        (run / "round_02" / name).unlink()
    for path in (run / "round_01" / "adapter").iterdir():
        shutil.copy(path, run / "round_02" / "adapter")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "error: The engine did not answer with the policy of round 2" in done.stderr
    assert "Traceback" not in done.stderr
