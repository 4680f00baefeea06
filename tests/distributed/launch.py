"""Two processes on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds, of a launch


def torchrun(module: str, *arguments: str, **environment: str) -> None:
    """Run a module as two processes, to its end; the test fails with what they wrote to stderr."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", module, *arguments),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONFAULTHANDLER": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        _, stderr = process.communicate()
        stderr += f"\nNot done after {TIMEOUT} s."
    if process.returncode != 0:
        pytest.fail(f"The workers failed.\n{stderr[-10_000:]}", pytrace=False)
