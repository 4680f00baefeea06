"""bitsandbytes is imported without asking the driver of a GPU. Oracle: which calls torch gets, on a machine that says it has two GPUs."""

import subprocess
import sys

import pytest


pytest.importorskip("bitsandbytes")

IMPORT = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
asked = []
torch.cuda.get_device_capability = lambda device=None: asked.append(device) or (8, 0)
try:
    import {module}
except AttributeError:  # torch for CPUs lacks what bitsandbytes does next
    pass
print(len(asked), "bitsandbytes.cuda_specs" in sys.modules)
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Lets `nvidia-smi` print this, and fail if it is empty."""

    def prints(text: str):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '{text}' && test -n '{text}'\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    return prints


def imported(module: str) -> str:
    return subprocess.check_output([sys.executable, "-W", "ignore", "-c", IMPORT.format(module=module)], text=True)


def test_driver_is_not_asked(nvidia_smi):
    nvidia_smi("8.9\\n9.0\\n")
    assert imported("trl_ext.import_bitsandbytes").split() == ["0", "True"]
    assert imported("bitsandbytes").split() == ["2", "True"]  # what this is for


def test_without_an_answer_nothing_is_imported(nvidia_smi):
    nvidia_smi("")
    assert imported("trl_ext.import_bitsandbytes").split() == ["0", "False"]


def test_highest_of_the_visible_devices(nvidia_smi):
    from trl_ext.import_bitsandbytes import compute_capability

    nvidia_smi("8.9\\n12.0\\n9.0\\n")
    assert compute_capability() == (12, 0)
    nvidia_smi("No devices were found\\n")
    assert compute_capability() is None
