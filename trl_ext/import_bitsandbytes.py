"""
Imports bitsandbytes without starting the driver of the GPU, for a process that is to be forked (`fork_server.py`).

When bitsandbytes (0.50) is imported, which PEFT does, it asks torch for the compute capability of each GPU, and torch starts the driver to answer.
Here `nvidia-smi` answers. If there is no GPU, no `nvidia-smi` or no bitsandbytes, importing this module does nothing.
"""

import os
import subprocess
from contextlib import suppress
from importlib.util import find_spec


def compute_capability() -> tuple[int, int] | None:
    """The highest of the visible GPUs, such as `(9, 0)`, and `None` if `nvidia-smi` does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if devices := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={devices}")
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return max((int(major), int(minor)) for major, _, minor in (line.partition(".") for line in lines))
    return None


def import_bitsandbytes() -> None:
    import torch

    capability = compute_capability() if torch.cuda.is_available() else None
    if capability is None:
        return
    ask_driver = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.cuda.get_device_capability = ask_driver


if find_spec("bitsandbytes") is not None:
    import_bitsandbytes()
