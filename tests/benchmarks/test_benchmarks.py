"""The benchmarks run: on tiny shapes, once. What they measure is not looked at, but for what is counted."""

import csv
import subprocess
import sys

import pytest

from tests.benchmarks import gemma, gpu, padding_free, self_refine_dpo, shared_prompt, tdpo
from tests.benchmarks.steps import Shape


TINY = Shape(4096, 64, 1, 2, 8, 8)

pytestmark = pytest.mark.usefixtures("single_thread")


def run(module, monkeypatch, tmp_path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--repeats", "1", "--output", str(tmp_path), *arguments])
    module.main()


def rows(path) -> list[dict[str, str]]:
    with open(path.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_tdpo(monkeypatch, tmp_path):
    """docs/tdpo.md, Cost: one head GEMM less than DPO."""
    monkeypatch.setattr(tdpo, "SHAPES", [TINY])
    run(tdpo, monkeypatch, tmp_path)
    counted = {(row["trainer"], row["weights"]): float(row["head GEMMs"]) for row in rows(tmp_path / "tdpo")}
    assert counted["TDPOTrainer", "LoRA"] == 3
    assert counted["TDPOTrainer", "full"] == 4
    assert counted["DPOTrainer, completions only", "LoRA"] == 4
    assert counted["DPOTrainer, completions only", "full"] == 5
    assert "| DPOTrainer |" in (tmp_path / "tdpo.md").read_text()


def test_self_refine_dpo(monkeypatch, tmp_path):
    """Beside DPO's, two more without gradient, or one with precomputed references, and one less in the policy's own head."""
    monkeypatch.setattr(self_refine_dpo, "SHAPES", [TINY])
    run(self_refine_dpo, monkeypatch, tmp_path)
    counted = {
        (row["trainer"], row["weights"]): float(row["head GEMMs"]) for row in rows(tmp_path / "self_refine_dpo")
    }
    assert counted["SelfRefineDPOTrainer", "LoRA"] == 5
    assert counted["SelfRefineDPOTrainer", "full"] == 6
    assert counted["SelfRefineDPOTrainer, precomputed", "LoRA"] == 3
    assert counted["SelfRefineDPOTrainer, precomputed", "full"] == 4


def test_gpu_script(monkeypatch, tmp_path):
    names = [
        "DPOTrainer",
        "TDPOTrainer, padding_free, share_prompt",
        "SelfRefineDPOTrainer, padding_free, share_prompt",
    ]
    contestants = {name: gemma.CONTESTANTS[name] for name in names}
    cases = [("LoRA", True, 1, contestants), ("full", False, 1, contestants), ("LoRA on NF4", True, 1, contestants)]
    monkeypatch.setattr(gemma, "CASES", cases)
    run(gpu, monkeypatch, tmp_path, "--tiny")
    assert {row["loss"] for row in rows(tmp_path / "gpu_heads")} >= {"DPO, TRL", "TDPO", "TDPO without Triton"}
    assert {row["trainer"] for row in rows(tmp_path / "gpu_steps")} >= {"DPOTrainer", "TDPOTrainer"}
    found = [(row["weights"], row["checkpointing"], row["trainer"]) for row in rows(tmp_path / "gpu_gemma")]
    expected = [("LoRA", "yes"), ("full", "no"), ("LoRA on NF4", "yes")]
    assert found == [(*case, name) for case in expected for name in names]


@pytest.mark.slow
@pytest.mark.vllm
def test_generation(tmp_path):
    """docs/running_aries.md, Speed: a loop over turns takes at least 1.25 as many steps; nothing waits for anything takes no fewer than 0.9."""
    code = "import sys; from tests.benchmarks import generation as g; g.WORKLOADS = (g.Workload(1.3),); g.main()"
    arguments = ["--repeats", "1", "--slots", "8", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = {row["schedule"]: int(row["steps"]) for row in rows(tmp_path / "generation")}
    assert steps["turn by turn"] >= 1.25 * steps["chain driver"]
    assert steps["one call"] >= 0.9 * steps["chain driver"]


@pytest.mark.slow
@pytest.mark.vllm
def test_orchestrator(tmp_path):
    arguments = ["--prompts", "100", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.orchestrator", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds = {row["stage"]: float(row["seconds"]) for row in rows(tmp_path / "orchestrator")}
    assert 0 < seconds["all but generate and train"] < seconds["round"]


@pytest.mark.slow
def test_scale(tmp_path):
    """Every stage has its row, and holds little more than its imports."""
    arguments = ["--prompts", "300", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.scale", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = {row["stage"]: int(row["peak MiB"]) for row in rows(tmp_path / "scale")}
    assert list(peaks) == ["prompts", "answers", "scores", "pairs", "answers, scores and pairs"]
    assert max(peaks.values()) < 1024


def test_shared_prompt(monkeypatch, tmp_path):
    """docs/shared_prompt.md, When it pays: fewer bytes and the same head. By hand, layers alone: 4 + 2 · 4 of 2 · (4 + 4) tokens."""
    monkeypatch.setattr(shared_prompt, "CASES", [(TINY, True), (TINY, False)])
    run(shared_prompt, monkeypatch, tmp_path)
    found = {(row["trainer"], row["weights"]): row for row in rows(tmp_path / "shared_prompt")}
    for trainer, gemms in (("TDPOTrainer", 3), ("SelfRefineDPOTrainer", 5)):
        for weights, more in (("LoRA", 0), ("full", 1)):
            shared, unshared = found[f"{trainer}, share_prompt", weights], found[trainer, weights]
            assert float(shared["head GEMMs"]) == float(unshared["head GEMMs"]) == gemms + more
            assert float(shared["to unshared, predicted"]) < float(unshared["to unshared, predicted"]) == 1

    wide = Shape(4096, 65536, 1, 1, 4, 3)  # nothing but layers
    contestants = shared_prompt.CONTESTANTS
    flop = [
        shared_prompt.step_flop(contestants[name], wide, lora=True)
        for name in ("TDPOTrainer, share_prompt", "TDPOTrainer")
    ]
    assert flop[0] / flop[1] == pytest.approx(12 / 16, rel=1e-2)


def needed(lengths: list[tuple[int, int, int, int]], pairs: int) -> tuple[float, float]:
    """Tokens of TRL's batches of so many pairs, and of sequences without padding, to those without second prompts, by arithmetic."""
    padded = apart = once = 0
    for start in range(0, len(lengths) - pairs + 1, pairs):
        batch = lengths[start : start + pairs]
        padded += 2 * pairs * max(prompt + max(chosen, rejected) for prompt, chosen, rejected, _ in batch)
        apart += sum(2 * prompt + chosen + rejected for prompt, chosen, rejected, _ in batch)
        once += sum(prompt + chosen + rejected - alike for prompt, chosen, rejected, alike in batch)
    return padded / once, apart / once


def test_real_lengths():
    """docs/shared_prompt.md: 2.4, 3.9 and 4.8 tokens for each one that is needed, at 2, 8 and 16 pairs a device."""
    lengths = padding_free.real_lengths(10_000)
    assert len(lengths) == 2308 and all(
        0 < alike + 1 <= min(chosen, rejected) for _, chosen, rejected, alike in lengths
    )
    for pairs, expected in ((2, 2.4), (8, 3.9), (16, 4.8)):
        assert needed(lengths, pairs)[0] == pytest.approx(expected, rel=0.02)


def test_padding_free(monkeypatch, tmp_path):
    """The layers' products are those of the tokens: counted, and by arithmetic on the lengths."""
    shape = padding_free.real_shape(64, 1, batches=2, pairs=3, vocabulary=256)
    monkeypatch.setattr(padding_free, "SHAPE", shape)
    monkeypatch.setattr(padding_free, "COUNTED", shape)
    run(padding_free, monkeypatch, tmp_path)
    found = {row["trainer"]: float(row["linear FLOP"]) for row in rows(tmp_path / "padding_free")}
    padded, apart = needed(padding_free.real_lengths(6), 3)
    assert found["DPOTrainer"] == 1
    assert found["TDPOTrainer, padding_free"] == pytest.approx(apart / padded, rel=5e-3)
    assert found["TDPOTrainer, padding_free, share_prompt"] == pytest.approx(1 / padded, rel=5e-3)
