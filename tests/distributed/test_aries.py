"""
ARIES' training stage on two processes against one that takes the doubled batch: DDP, FSDP2 and ZeRO, LoRA and all weights.

Oracle: the same jobs in one process. Losses, gradient norms and what is saved must agree within fp32 rounding; what was stopped half-way
must end as what was not.
"""

import importlib.util
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from tests.aries.tiny_run import MINIMAL
from tests.conftest import PAIRS
from tests.distributed.aries_worker import Job, run
from tests.distributed.launch import ROOT, run_module
from trl_ext.aries.children import run_child
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.data.records import to_line, write_json
from trl_ext.aries.policies import Policy
from trl_ext.aries.run_dir import RunDir
from trl_ext.aries.stages.messages import RoundMessage
from trl_ext.aries.training.settings import TrainerSettings, Training
from trl_ext.launch import Launch
from trl_ext.recipe import Recipe, parse_section


GLOBAL_BATCH, STEPS = 4, 4
LOG_TOLERANCE = {"rel": 1e-5, "abs": 2e-5}
WEIGHT_TOLERANCE = 1e-3  # relative to the largest change in the training of its tensor

LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
STOPPED = {"stop_at": 3}
# In this order: a case may start from the product of one before it
CASES = {
    "sft_full": {"trainer": "sft", "model_args": {}},
    "tdpo_full": {"trainer": "tdpo", "model_args": {}, **STOPPED},
    "dpo_full_initial": {"trainer": "dpo", "model_args": {}, "from": "tdpo_full"},
    "dpo_lora": {"trainer": "dpo", "model_args": LORA},
    "dpo_lora_previous": {"trainer": "dpo", "model_args": LORA, "from": "dpo_lora", **STOPPED},
    "self_refine_lora_initial": {
        "trainer": "self_refine_dpo",
        "model_args": LORA,
        "from": "dpo_lora",
        "reference": "initial",
        "objective_alpha": 0.8,
        **STOPPED,
    },
}


def jobs(output: Path, model: Path, processes: int) -> list[Job]:
    """The cases, each with its own directory below `output`."""
    rows = output / "rows.jsonl"
    sft_rows = output / "sft.jsonl"
    output.mkdir(exist_ok=True)
    rows.write_text(
        "".join(
            to_line({"prompt": p, "chosen": f" {chosen}", "rejected": f" {rejected}", "turn": i % 2, "weight": 1})
            for i, (p, chosen, rejected) in enumerate(PAIRS)
        )
    )
    sft_rows.write_text("".join(to_line({"prompt": p, "completion": f" {chosen}"}) for p, chosen, _ in PAIRS))
    made = []
    for name, case in CASES.items():
        start = str(output / case["from"]) if "from" in case else None
        lora = bool(case["model_args"])
        initial = Policy(str(model), None)
        policy = Policy(str(model), start) if lora else Policy(start or str(model), None)
        reference = initial if case.get("reference") == "initial" or not lora else policy
        config = {
            "output_dir": str(output / f"{name}-training"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "steps" if "stop_at" in case else "no",
            "save_steps": 2,
            "optim": "adamw_torch",
            "adam_epsilon": 1.0,  # or the first steps are the gradient's sign, which rounding decides where it is nearly zero
            "learning_rate": 0.3,
            "lr_scheduler_type": "constant",
            "seed": 1,
        }
        training = Training(
            TrainerSettings(case["trainer"], config, case.get("objective_alpha")),
            {"model_name_or_path": str(model), "dtype": "float32", **case["model_args"]},
            policy,
            reference,
            rows=sft_rows if case["trainer"] == "sft" else rows,
            output=output / name,
            max_dropped=0.5,
        )
        made.append(Job(training, case.get("stop_at")))
    return made


@pytest.fixture(scope="module")
def one_process(tiny_model_dir, tmp_path_factory) -> Path:
    """What one process makes of the cases, none of them stopped."""
    output = tmp_path_factory.mktemp("one_process")
    for job in jobs(output, tiny_model_dir, 1):
        run(replace(job, stop_at=None))
    return output


def launch(strategies: list[str], model: Path, output: Path, **environment: str) -> Path:
    """Runs the cases on two processes, with one strategy after another, and returns the directory of the results."""
    made = {strategy: jobs(output / strategy, model, 2) for strategy in strategies}
    (output / "jobs.json").write_bytes(TypeAdapter(dict[str, list[Job]]).dump_json(made))
    run_module("tests.distributed.aries_worker", str(output / "jobs.json"), *strategies, **environment)
    return output


@pytest.fixture(scope="module")
def ddp(tiny_model_dir, tmp_path_factory) -> Path:
    return launch(["ddp"], tiny_model_dir, tmp_path_factory.mktemp("ddp"), ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def fsdp2(tiny_model_dir, tmp_path_factory) -> Path:
    return launch(["fsdp2"], tiny_model_dir, tmp_path_factory.mktemp("fsdp2"), ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def zero(tiny_model_dir, tmp_path_factory) -> Path:
    return launch(["zero2", "zero3"], tiny_model_dir, tmp_path_factory.mktemp("zero"), DS_ACCELERATOR="cpu")


def weights(path: Path) -> dict[str, torch.Tensor]:
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def check_product(found: Path, expected: Path, name: str, model: Path) -> None:
    """The logs of a case and what it saved, against those of one process."""
    logs = [json.loads((path / f"{name}-training" / "log_history.json").read_text()) for path in (found, expected)]
    steps = [[entry for entry in log if "loss" in entry] for log in logs]
    assert len(steps[0]) == len(steps[1]) == STEPS
    case = CASES[name]
    counted = {"num_tokens"} if "stop_at" in case else set()  # TRL counts them anew
    for log, expected_log in zip(*steps, strict=True):
        assert log.keys() == expected_log.keys()
        for key in log.keys() - counted:
            assert log[key] == pytest.approx(expected_log[key], **LOG_TOLERANCE), key

    files = [sorted(file.name for file in (path / name).iterdir()) for path in (found, expected)]
    assert files[0] == files[1]
    file = "adapter_config.json" if case["model_args"] else "config.json"
    configs = [json.loads((path / name / file).read_text()) for path in (found, expected)]
    for config in configs:
        config["target_modules"] = sorted(config.get("target_modules", ()))  # a set
    assert configs[0] == configs[1]
    start = expected / case["from"] if "from" in case else None if case["model_args"] else model
    before = None if start is None else weights(start)
    saved, wanted = weights(found / name), weights(expected / name)
    assert saved.keys() == wanted.keys()
    for parameter, weight in wanted.items():
        change = (weight - before[parameter] if before else weight).abs().max()
        assert change > 0
        assert (saved[parameter] - weight).abs().max() <= WEIGHT_TOLERANCE * change, parameter


def check(path: Path, expected: Path, name: str, model: Path, *, wrapper: str, held: float) -> None:
    """How both processes trained, and what came out; `held` is the share of the parameters that a process must hold."""
    for rank in (0, 1):
        result = json.loads((path / f"{name}.{rank}.json").read_text())
        assert result["processes"] == 2
        assert wrapper in result["wrapper"]
        assert result["held"] == pytest.approx(held, abs=0.01)
        first = 2 if "stop_at" in CASES[name] else 0
        assert result["reports"] == [[step, STEPS] for step in range(first, STEPS + 1)]
    counts = json.loads((path / f"{name}-training" / "rows.json").read_text())
    assert counts == {"rows": 8, "trained_rows": 8, "processes": 2, "batch_size": GLOBAL_BATCH}
    check_product(path, expected, name, model)


@pytest.mark.parametrize("name", CASES)
def test_ddp(ddp, one_process, tiny_model_dir, name):
    check(ddp / "ddp", one_process, name, tiny_model_dir, wrapper="DistributedDataParallel", held=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fsdp2(fsdp2, one_process, tiny_model_dir, name):
    """As in `test_two_processes.py`, the worker writes the choice of FSDP into accelerate's state."""
    check(fsdp2 / "fsdp2", one_process, name, tiny_model_dir, wrapper="FSDPModule", held=0.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("stage", "held"), [("zero2", 1.0), ("zero3", 0.5)])
def test_zero(zero, one_process, tiny_model_dir, stage, held, name):
    check(zero / stage, one_process, name, tiny_model_dir, wrapper="DeepSpeedEngine", held=held)


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_the_loop_launches_it(one_process, tiny_model_dir, tmp_path, monkeypatch, stopped):
    """`accelerate launch` with recipes/accelerate_configs/ddp.yaml, also ended in the middle and run again."""
    name = "dpo_lora_previous"
    [job] = [job for job in jobs(tmp_path, tiny_model_dir, 2) if job.training.output.name == name]
    training, run_dir = job.training, RunDir(tmp_path / "run")
    round_dir = run_dir.round(1)
    round_dir.path.mkdir(parents=True)
    sections = {"model": training.model, "training": {**training.settings.config}, "sft": {"dataset": "sft.jsonl"}}
    del sections["training"]["output_dir"]
    write_json(run_dir.resolved, asdict(parse_section(Recipe(None, MINIMAL | sections, {}), AriesConfig)))
    shutil.copytree(one_process / "dpo_lora", run_dir.round(0).adapter)
    shutil.copy(training.rows, round_dir.pairs)
    (tmp_path / name).symlink_to(round_dir.adapter)  # where the cases have them
    (tmp_path / f"{name}-training").symlink_to(round_dir.training)
    message, log = RoundMessage(run_dir.path, 1), tmp_path / "training.log"
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    launch = Launch(str(ROOT / "recipes/accelerate_configs/ddp.yaml"), num_processes=2)
    reports = []

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stopped

    if stopped:
        with pytest.raises(Stopped):
            run_child("trl_ext.aries.stages.train", message, log, stop, launch=launch)
        assert not round_dir.adapter.exists()
    run_child("trl_ext.aries.stages.train", message, log, lambda *at: reports.append(at), launch=launch)
    assert reports == [(step, STEPS) for step in range(2 if stopped else 0, STEPS + 1)]
    assert json.loads((tmp_path / f"{name}-training" / "rows.json").read_text())["processes"] == 2
    check_product(tmp_path, one_process, name, tiny_model_dir)
