"""
`training.accelerate_config`: what is refused before any work, and how a stage of two processes ends. That it trains what one process
does is in `tests/distributed/test_aries.py`.
"""

import json
import os
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tests.aries.launched_child import Job
from tests.aries.test_signals import Run
from tests.aries.tiny_run import MINIMAL
from tests.aries.tiny_run import recipe as tiny_recipe
from tests.aries.tiny_run import run as run_recipe

from trl_ext.aries.children import ChildError, run_child
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.training.launch_check import launch_problem
from trl_ext.launch import Launch, recipe_launch
from trl_ext.recipe import RecipeError, load_yaml, parse_section


CONFIGS = Path(__file__).parents[3] / "recipes" / "accelerate_configs"
TWO_PROCESSES = Launch(str(CONFIGS / "ddp.yaml"), num_processes=2)
CHILD = "tests.aries.launched_child"


def load(tmp_path: Path, **training) -> Launch | None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"training": training}))
    recipe = load_yaml(file)
    parse_section(recipe, AriesConfig)
    return recipe_launch(recipe)


def test_names_and_files(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path, accelerate_config="fsdp2") == Launch(str(CONFIGS / "fsdp2.yaml"))
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / "mine.yaml").write_text("")
    mine = str(tmp_path / "accelerate_configs" / "mine.yaml")
    assert load(tmp_path, accelerate_config="mine", num_processes=4) == Launch(mine, 4)
    assert load(tmp_path, accelerate_config=mine) == Launch(mine)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"accelerate_config": "dpp"},
            r"r.yaml:\d+: `training`: accelerate_config: dpp is neither a file nor one of ddp",
        ),
        (
            {"accelerate_config": 2},
            "`training.accelerate_config` must be text, got 2",
        ),
        ({"num_processes": 2}, "`training.num_processes` belongs to `training.accelerate_config`. Set that too"),
        ({"accelerate_config": "ddp", "num_processes": 0}, "`training.num_processes` must be positive, got 0"),
        (
            {"accelerate_config": "ddp", "num_processes": True},
            "`training.num_processes` must be a whole number, got true",
        ),
    ],
)
def test_keys(tmp_path, training, message):
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, **training)


def problem(tmp_path: Path, config: str, processes: int | None = None, gpus: int = 8, **keys) -> str | None:
    """Of a configuration with `changes`; `cpu`, `sft_cpu` and `nf4` are the recipe's."""
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()) | keys.get("changes", {})
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(values))
    sections = [{"use_cpu": keys.get("cpu", False)}]
    if "sft_cpu" in keys:
        sections.append({"use_cpu": keys["sft_cpu"]})
    return launch_problem(Launch(str(file), processes), {"load_in_4bit": keys.get("nf4", False)}, sections, gpus)


@pytest.mark.parametrize("config", ["single_gpu", "ddp", "fsdp2"])
def test_what_can_work(tmp_path, config):
    assert problem(tmp_path, config) is None


def test_on_cpus_and_quantized(tmp_path):
    assert problem(tmp_path, "ddp", 2, gpus=0, cpu=True, sft_cpu=True) is None
    assert problem(tmp_path, "ddp", nf4=True) is None


@pytest.mark.parametrize(
    ("config", "processes", "keys", "message"),
    [
        ("ddp", None, {"gpus": 4}, "8 processes need a GPU each, and there are 4. Set `training.num_processes`"),
        ("ddp", 2, {"gpus": 0, "cpu": True, "sft_cpu": False}, "2 processes need a GPU each, and there are 0"),
        ("single_gpu", 2, {}, "is for one process, and `num_processes` is 2. Use ddp"),
        ("fsdp2", 2, {"cpu": True}, "accelerate trains with FSDP on GPUs only.*Remove that, or use ddp"),
        ("fsdp2", 2, {"nf4": True}, "a quantized base cannot be sharded. Use ddp or deepspeed_zero2"),
        ("deepspeed_zero3", None, {"nf4": True}, "a quantized base cannot be sharded. Use ddp or deepspeed_zero2"),
        (
            "deepspeed_zero3",
            None,
            {"changes": {"deepspeed_config": {"zero_stage": 3}}},
            "does not gather weights for saving",
        ),
        ("ddp", None, {"changes": {"num_machines": 2}}, "has `num_machines: 2`.*on its own machine only"),
        (
            "ddp",
            None,
            {"changes": {"distributed_type": "MEGATRON_LM"}},
            "has `distributed_type: MEGATRON_LM`; known types are NO",
        ),
        ("ddp", None, {"changes": {"gpus": 4}}, r"cannot be read: .*unknown keys \(\['gpus'\]\)"),
        ("fsdp2", None, {"changes": {"fsdp_config": {"fsdp_version": 1}}}, "first version of FSDP. Use fsdp2"),
    ],
)
def test_what_cannot_work(tmp_path, config, processes, keys, message):
    assert re.search(message, problem(tmp_path, config, processes, **keys))


@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_is_no_dependency(tmp_path, config):
    missing = find_spec("deepspeed") is None
    assert problem(tmp_path, config) == (
        "DeepSpeed is not installed: `pip install deepspeed`, or use ddp or fsdp2." if missing else None
    )


@pytest.mark.parametrize(("stage", "gathers"), [(3, True), (3, False), (2, False)])
def test_deepspeeds_own_file(tmp_path, stage, gathers):
    settings = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": settings}))
    changes = {"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
    found = problem(tmp_path, "deepspeed_zero3", changes=changes) or ""
    assert ("does not gather weights" in found) == (stage == 3 and not gathers)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the tests' child as two processes, with these faults; what it reported."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    def run(seconds: float = 60, **faults: str) -> list[tuple[int, int]]:
        reports, job = [], Job({name.removeprefix("rank_"): fault for name, fault in faults.items()}, seconds)
        run_child(CHILD, job, tmp_path / "child.log", lambda *at: reports.append(at), launch=TWO_PROCESSES)
        return reports

    return run


def test_the_first_process_reports(run):
    assert run(seconds=0) == [(0, 2)]


def test_bad_input_that_one_process_finds(run):
    with pytest.raises(RecipeError, match="process 1 found bad input"):
        run(rank_1="bad input")


@pytest.mark.parametrize(
    ("fault", "diagnosis"), [("failure", "RuntimeError: process 1 failed"), ("kill", r"Signal 9 \(SIGKILL\) received")]
)
def test_one_process_that_fails(run, fault, diagnosis):
    """The others are ended, and the error has the reason, not the launcher's own traceback alone."""
    with pytest.raises(ChildError, match=rf"(?s)launched_child ended with exit code 1\..*{diagnosis}"):
        run(rank_1=fault)


def test_processes_that_end_with_the_loop(tmp_path):
    """SIGKILL to the process that launched them."""
    code = f"""if True:
        from pathlib import Path
        from tests.aries.launched_child import Job
        from trl_ext.aries.children import run_child
        from trl_ext.launch import Launch
        run_child("{CHILD}", Job({{}}, 3600), Path("{tmp_path}/child.log"), print, launch={TWO_PROCESSES})
    """
    process = Run([sys.executable, "-c", code], PYTHONPATH=os.pathsep.join(sys.path))
    process.wait_for(lambda: len(process.alive()) == 4)  # the loop, the launcher and two processes
    process.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_run(sorting, tmp_path):
    """SFT and a round, each on two processes; its manifest says so."""
    settings = tiny_recipe(sorting, tmp_path / "run", rounds=1)
    settings["training"] |= {"accelerate_config": "ddp", "num_processes": 2}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(settings))
    run_recipe(file)
    for number, batch_size in ((0, 16), (1, 16)):  # 8 on each
        manifest = json.loads((tmp_path / "run" / f"round_{number:02d}" / "manifest.json").read_text())
        assert (manifest["processes"], manifest["batch_size"]) == (2, batch_size)
