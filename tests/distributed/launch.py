"""Two processes on this machine's CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
TIMEOUT = 1800  # seconds, of a launch that hangs; it takes about one minute


def run_module(module: str, *arguments: str, **environment: str) -> None:
    """Run a module that calls [`two_processes`] to its end; the test fails with what it wrote to stderr."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
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
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"Not done after {TIMEOUT} s.\n{(error.stderr or b'').decode()[-10_000:]}", pytrace=False)
    if done.returncode != 0:
        pytest.fail(f"The workers failed.\n{done.stderr[-10_000:]}", pytrace=False)


def two_processes(work: Callable[..., None], *arguments: object) -> None:
    """
    Run a function in two processes, in the environment that torchrun makes. They are forked, so that the libraries are imported once and not
    three times.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.multiprocessing.start_processes(_rank, (work, arguments), nprocs=2, start_method="fork")


def _rank(rank: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    work(*arguments)
    torch.distributed.destroy_process_group()
