"""
Runs the stages that need a process of their own, so that their memory is returned: generation, training, reward models.

Stages that import torch, TRL or vLLM are forked from a process that has imported them (`fork_server.py`), one for TRL and, forked from
it, one for vLLM, so that trainings do not see what vLLM changes in the libraries that they share. Everything else is a fresh process.

A child reads its job, a dataclass, from a JSON file, and answers with lines of JSON, each one of the dataclasses [`Done`], [`Note`],
[`Peak`], [`BadInput`] and [`Failure`]; whatever it or its libraries print goes to a log file. It ends with its parent. If a launcher starts
several processes for it, the first one reports progress and its memory, and each one reports errors.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from ..fork_server import CannotFork, ForkedChild, ForkServer
from ..launch import Launch
from ..processes import LAUNCHER, die_with_launcher, launcher_command, process_group
from ..recipe import RecipeError


LOG_TAIL_LINES = 25
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # PEFT writes a set of module names: the same order in every process
}
REPORT = "trl-ext-report: "

# Modules that are forked, and the server that has imported what they need
SERVER_OF = {
    **dict.fromkeys(
        (f"trl_ext.aries.stages.{name}" for name in ("parity", "preflight", "probe", "report", "track", "train")),
        "trl",
    ),
    **dict.fromkeys((f"trl_ext.aries.stages.{name}" for name in ("generate", "reward_model")), "vllm"),
}
# What a server imports before its first child, and after it
IMPORTS = {
    "trl": (
        ["trl_ext.import_bitsandbytes", "trl_ext.aries.checks.preflight"],
        ["trl_ext.aries.results.report_figures"],
    ),
    "vllm": (["vllm.entrypoints.llm"], ["vllm.v1.worker.gpu_model_runner"]),
}
# Variables that are set in the servers only
DEFAULTS = {
    # Without it, `torch.cuda.is_available()` starts the driver, which a fork does not survive. vLLM sets it, too
    "trl": {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    # As the engine sets them before it imports vLLM
    "vllm": {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
}
_servers: dict[str, ForkServer] = {}


def one_gpu() -> dict[str, str]:
    """The environment of a stage in one process on one GPU. If it saw several, TRL would refuse `nn.DataParallel`."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


@dataclass
class Done:
    """How much is done, and of how much."""

    done: int
    total: int


@dataclass
class Note:
    """Something that the user should know."""

    note: str


@dataclass
class BadInput:
    """A [`RecipeError`] raised in the child."""

    error: str


@dataclass
class Failure:
    """A [`ChildError`] raised in the child: a failure that it can explain."""

    failed: str


@dataclass
class Peak:
    """The most memory that it held, in bytes: of the machine, and what torch allocated on its GPU, `None` if it used none."""

    memory: int
    gpu: int | None


Report = Done | Note | BadInput | Failure | Peak


class ChildError(RuntimeError):
    """A stage's process failed. The message says why, or has the end of its log and the log's path."""


def run_child(
    module: str,
    job: Any,
    log: Path,
    on_progress: Callable[[int, int], None],
    env: dict[str, str] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    launch: Launch | None = None,
) -> Peak | None:
    """
    Run `python -m module` on a job and wait for it.

    Args:
        module (`str`):
            A module that ends in `child_main(main, Job)`.
        job (a dataclass):
            Passed to its `main`, through a JSON file beside the log.
        log (`Path`):
            The file that its output is appended to.
        on_progress (`Callable[[int, int], None]`):
            Called with (done, total).
        env (`dict[str, str]`, *optional*):
            Environment variables to add.
        on_note (`Callable[[str], None]`, *optional*):
            Called with each note.
        launch ([`~launch.Launch`], *optional*):
            Run it through `accelerate launch`.

    Returns:
        [`Peak`]: the memory that it took.

    Raises:
        [`RecipeError`]: it found bad input.
        [`ChildError`]: it ended with another error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    job_file = log.with_suffix(".job.json")
    job_file.write_text(json.dumps(asdict(job), indent=2, default=str), encoding="utf-8")  # `str` for paths
    peak = None
    arguments = (module, str(job_file)) if launch is None else launch.command(module, str(job_file))
    with (
        open(log, "a", encoding="utf-8") as log_file,
        start(arguments, {**os.environ, **ENVIRONMENT, **(env or {})}, log_file) as child,
    ):
        for line in child.stdout:
            if not line.startswith(REPORT):  # printed while the module was being imported
                log_file.write(line)
                continue
            found = TypeAdapter(Report).validate_python(json.loads(line.removeprefix(REPORT)))
            match found:
                case Done(done, total):
                    on_progress(done, total)
                case Note(text):
                    on_note(text)
                case Peak():
                    peak = found
                case BadInput(text):
                    raise RecipeError(text)
                case Failure(text):
                    raise ChildError(text)
        code = child.wait()
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as the kernel does when memory runs out"
        raise ChildError(
            f"{module} {how}. The same command continues. The end of {log}:\n\n" + "\n".join(lines[-LOG_TAIL_LINES:])
        )
    return peak


def start(
    arguments: Sequence[str], env: dict[str, str], log: TextIO
) -> AbstractContextManager[subprocess.Popen | ForkedChild]:
    """A module with its arguments, forked if that is possible. If one that should be forked cannot be, the log says why."""
    module, *rest = arguments
    if module in SERVER_OF and not is_child():
        try:
            return server(SERVER_OF[module]).fork(module, rest, env, log)
        except CannotFork as reason:
            log.write(f"{module} starts as a fresh process: {reason}\n")
            log.flush()
    return process_group(
        launcher_command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=env,
    )


def server(name: str) -> ForkServer:
    """
    The server of this name. It is started if necessary.

    Raises:
        [`CannotFork`]: it cannot be started.
    """
    if name not in _servers:
        base = server("trl") if name == "vllm" else None
        environment, defaults = {**os.environ, **ENVIRONMENT}, DEFAULTS.get(name)
        _servers[name] = ForkServer(*IMPORTS[name], environment=environment, defaults=defaults, base=base)
    return _servers[name]


def warm_up(name: str) -> None:
    """Start a server before its first child, so that it imports while this process does something else."""
    if not is_child():
        with suppress(CannotFork):
            server(name)


def is_child() -> bool:
    """Whether this process is a stage itself. A stage has no servers: it starts a single process, which ends with it."""
    return LAUNCHER in os.environ


class Reporter:
    """Reports from a stage's `main` to the loop: its progress, by a call with (done, total), and notes."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __call__(self, done: int, total: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            self.send(Done(done, total))

    def note(self, text: str) -> None:
        self.send(Note(text))

    def close(self) -> None:
        self._stream.close()

    def send(self, report: Report) -> None:
        self._stream.write(f"{REPORT}{json.dumps(asdict(report))}\n")
        self._stream.flush()


def child_main(main: Callable[[Any, Reporter], None], job_class: type) -> None:
    """The child's side of [`run_child`]: call `main(job, report)` with the job that the command line names, a `job_class`."""
    [job_file] = sys.argv[1:]
    die_with_launcher()
    # Reports keep the real stdout; prints, also those of C libraries, join stderr in the log
    report = Reporter(os.fdopen(os.dup(1), "w"))
    # A process forked by user code may outlive this one, and the reader of the pipe would wait for it
    os.register_at_fork(after_in_child=report.close)
    os.dup2(2, 1)
    try:
        job = json.loads(Path(job_file).read_text(encoding="utf-8"))
        main(TypeAdapter(job_class).validate_python(job), report)
        if os.environ.get("RANK", "0") == "0":
            report.send(peak_memory())
    except RecipeError as error:
        report.send(BadInput(str(error)))
    except ChildError as error:
        report.send(Failure(str(error)))


def peak_memory() -> Peak:
    """What this process, or the largest of its children, has held so far."""
    kibibytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return Peak(1024 * kibibytes, torch.cuda.max_memory_allocated() if on_gpu else None)
