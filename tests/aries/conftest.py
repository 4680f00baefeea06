"""
The quickstart's task at a tiny size, made by its own script: four digits to sort, a model small enough for seconds and
with heads that vLLM's CPU attention takes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock


ROOT = Path(__file__).parents[2]
PREPARE = ROOT / "recipes" / "quickstart" / "prepare.py"


@pytest.fixture(scope="session")
def shared(tmp_path_factory, request) -> Path:
    """A directory of all processes that run these tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def sorting(shared) -> Path:
    """A directory with `model/`, `sft.jsonl`, `train.jsonl` and `eval.jsonl`."""
    path = shared / "sorting"
    sizes = {"digits": 4, "train_size": 60, "eval_size": 20, "sft_problems": 200, "sft_direct_rows": 256}
    sizes |= {"sft_refine_rows": 256}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    with FileLock(path.with_suffix(".lock")):
        if not path.with_suffix(".made").exists():
            subprocess.run(
                [sys.executable, str(PREPARE), f"--output={path}", *options], check=True, capture_output=True
            )
            path.with_suffix(".made").touch()
    return path


@pytest.fixture(scope="session")
def tiny_model_path(sorting) -> str:
    """The random model of the task."""
    return str(sorting / "model")


@pytest.fixture(scope="session")
def whole_run(sorting, shared) -> tuple[Path, str]:
    """
    The directory of a tiny run that nothing disturbed, and what it printed. Its recipe lies beside it. Processes that share the tests
    share the run.
    """
    from tests.aries.tiny_run import recipe, run

    whole = shared / "whole"
    file, printed = whole.with_suffix(".yaml"), whole.with_suffix(".out")
    with FileLock(whole.with_suffix(".lock")):
        if not printed.exists():
            tracked = recipe(sorting, whole)
            tracked["training"]["report_to"] = "tensorboard"
            file.write_text(yaml.safe_dump(tracked))
            printed.write_text(run(file))
    return whole, printed.read_text()
