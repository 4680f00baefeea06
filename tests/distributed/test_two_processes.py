"""
Two processes against one that takes the doubled batch, for each way of distributing the trainers.

Oracle: the same training in one process. The losses, the metrics and the gradient norm of every step and the trained weights
must agree within fp32 rounding; so a gradient that is summed over the pairs of one process only, or a reference that is
not the initial policy on every process, shows.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_module
from tests.distributed.worker import CASES, IN_PARTS, train


# Tolerance of logged values; the largest are sums of log-probabilities around 50 nats
LOG_TOLERANCE = {"rel": 1e-5, "abs": 2e-5}
# Tolerance of weights, relative to the largest change of their tensor in the training
WEIGHT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def models(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny Llama, another, and one whose head is its input embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model_dir, path / "untied")
    for seed, (name, tied) in enumerate({"other": False, "tied": True}.items(), start=1):
        shutil.copytree(tiny_model_dir, path / name)
        config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=tied)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """Returns a function that gives what one process makes of a case, trained once."""
    results = {}

    def result(name: str) -> dict:
        if name not in results:
            results[name] = train(CASES[name], models, tmp_path_factory.mktemp("one_process"))
        return results[name]

    return result


def launch(strategies: list[str], models: Path, output: Path, **environment: str) -> Path:
    """Trains every case on two processes, with one strategy after another, and returns the directory of the results."""
    run_module("tests.distributed.worker", str(models), str(output), *strategies, **environment)
    return output


@pytest.fixture(scope="module")
def ddp_and_fsdp2(models, tmp_path_factory) -> Path:
    return launch(["ddp", "fsdp2"], models, tmp_path_factory.mktemp("ddp_and_fsdp2"), ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def zero(models, tmp_path_factory) -> Path:
    return launch(["zero2", "zero3"], models, tmp_path_factory.mktemp("zero"), DS_ACCELERATOR="cpu")


def load(output: Path, strategy: str, name: str) -> list[dict]:
    return [torch.load(output / f"{strategy}.{name}.{rank}.pt") for rank in (0, 1)]


def check(ranks: list[dict], expected: dict, *, wrapper: str, held: float) -> None:
    """
    Compares the results of both processes with those of one. `held` is the share of the parameters that a process must
    hold of the model and, if there is one, of the reference, give or take a head: after an evaluation DeepSpeed keeps
    a frozen one whole.
    """
    for result in ranks:
        assert result["processes"] == 2
        assert wrapper in result["wrapper"]
        assert result["held"] == pytest.approx(held, abs=0.15)
        assert (result["ref_held"] is None) == (expected["ref_held"] is None)
        assert result["ref_held"] is None or result["ref_held"] == pytest.approx(held, abs=0.15)

        assert len(result["logs"]) == len(expected["logs"]) > 1
        for step, (log, expected_log) in enumerate(zip(result["logs"], expected["logs"], strict=True)):
            assert log == pytest.approx(expected_log, **LOG_TOLERANCE), f"step {step}"

        assert result["weights"].keys() == expected["weights"].keys()
        for parameter, weight in expected["weights"].items():
            change = (weight - expected["initial"][parameter]).abs().max()
            error = (result["weights"][parameter] - weight).abs().max()
            assert error <= WEIGHT_TOLERANCE * change, f"{parameter}: off by {error:.1e}, trained by {change:.1e}"
    for parameter, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][parameter]), f"{parameter} differs between the processes"


@pytest.mark.parametrize("name", CASES)
def test_the_case_trains(one_process, name):
    """Or the comparisons below would be of nothing: every trained tensor moves, away from the reference."""
    result = one_process(name)
    trained = [key for key in result["weights"] if "lora_" in key or "modules_to_save" in key] or result["weights"]
    for parameter in trained:
        assert (result["weights"][parameter] - result["initial"][parameter]).abs().max() > 5e-4, parameter
    assert abs(result["logs"][0].get("position_kl/margin", 1.0)) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_ddp(ddp_and_fsdp2, one_process, name):
    check(load(ddp_and_fsdp2, "ddp", name), one_process(name), wrapper="DistributedDataParallel", held=1.0)


@pytest.mark.parametrize("name", CASES)
def test_fsdp2(ddp_and_fsdp2, one_process, name):
    """
    accelerate trains with FSDP2 on GPUs only, so the worker writes that choice into its state; the rest, from the sharding
    of policy and reference to the optimizer, is accelerate's, TRL's and the Trainer's own, with gloo.
    """
    check(load(ddp_and_fsdp2, "fsdp2", name), one_process(name), wrapper="FSDPModule", held=0.5)


@pytest.mark.parametrize(
    ("strategy", "wrapper", "held"), [("ddp", "DistributedDataParallel", 1.0), ("fsdp2", "FSDPModule", 0.5)]
)
@pytest.mark.parametrize("name", IN_PARTS)
def test_in_parts(ddp_and_fsdp2, models, tmp_path, strategy, wrapper, held, name):
    """Parts of a process's batch, which have other pairs in the other process. Oracle: one process, and its batch in one part."""
    expected, ranks = (
        train(IN_PARTS[name], models, tmp_path, max_batch_tokens=None),
        load(ddp_and_fsdp2, strategy, name),
    )
    means = {
        "loss",
        "grad_norm",
        *(key for key in expected["logs"][0] if key.startswith(("rewards", "logps", "position_kl"))),
    }
    for result in (expected, *ranks):
        if result is not expected:
            assert all(1 <= log["batch/pairs"] < 4 for log in result["logs"] if "loss" in log)
        result["logs"] = [{key: log[key] for key in means} for log in result["logs"] if "loss" in log]
    check(ranks, expected, wrapper=wrapper, held=held)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("stage", "held"), [("zero2", 1.0), ("zero3", 0.5)])
def test_zero(zero, one_process, stage, held, name):
    check(load(zero, stage, name), one_process(name), wrapper="DeepSpeedEngine", held=held)
