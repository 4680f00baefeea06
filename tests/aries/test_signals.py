"""
Signals to real runs, whose work would take longer than anyone waits: how they end, and that nothing they started is left. Processes are found
by a variable in their environment, which everything that a run starts inherits, and by their sessions, since vLLM's workers write their names
over theirs.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import IO

import pytest
import yaml
from tests.aries.tiny_run import command, recipe


LONGEST_WAIT = 300  # seconds, so that a test that fails does not hang
COPIES = 500  # of the prompts
MARK = "TRL_EXT_TEST_RUN"


class Run:
    """A command with a mark of its own."""

    def __init__(self, arguments: list[str], output: IO[str] | int = subprocess.PIPE, **environment: str):
        self.mark = uuid.uuid4().hex
        self.sessions: set[int] = set()
        self.process = subprocess.Popen(
            arguments,
            env={**os.environ, MARK: self.mark, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell has what it starts in the background ignore SIGINT, tests and what they start included
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def alive(self) -> list[str]:
        """Command lines of the run's processes: those with its mark, and those in a session that one of these was ever seen in."""
        processes = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.mark}".encode() in (directory / "environ").read_bytes().split(b"\0")
                words = (directory / "cmdline").read_bytes().split(b"\0")
                session = os.getsid(int(directory.name))
            except OSError:  # one that has ended
                continue
            if words != [b""]:  # ended, and not yet waited for
                processes[directory.name] = (session, b" ".join(words).decode())
                if marked:
                    self.sessions.add(session)
        return [command_line for session, command_line in processes.values() if session in self.sessions]

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 2 * LONGEST_WAIT
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to the command alone; its exit code and what it printed, once all has ended."""
        self.process.send_signal(number)
        printed, _ = self.process.communicate(timeout=LONGEST_WAIT)
        self.wait_until_none_is_left()
        return self.process.returncode, printed

    def wait_until_none_is_left(self) -> None:
        deadline = time.monotonic() + LONGEST_WAIT
        while left := self.alive():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def grows(file: Path):
    """Whether a file has grown since now."""
    size = file.stat().st_size if file.exists() else 0
    return lambda: file.exists() and file.stat().st_size > size


def many_prompts(sorting: Path, directory: Path) -> dict[str, str | int]:
    """Prompts that take many minutes to answer."""
    rows = (sorting / "train.jsonl").read_text() * COPIES
    (directory / "prompts.jsonl").write_text(rows)
    return {"dataset": str(directory / "prompts.jsonl"), "per_round": rows.count("\n")}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("number", "grown"), [(signal.SIGINT, "answers.jsonl.part"), (signal.SIGTERM, "logs/training.log")]
)
def test_a_loop_that_is_asked_to_end(number, grown, sorting, tmp_path):
    """SIGINT while answers are generated, SIGTERM while the policy is trained. That it then continues: test_kills.py."""
    output, file = tmp_path / "run", tmp_path / "r.yaml"
    settings = recipe(sorting, output, rounds=1)
    if number == signal.SIGINT:
        settings["prompts"] = many_prompts(sorting, tmp_path)
        del settings["sft"]
    else:
        settings["training"] |= {"max_steps": 100_000, "save_steps": 100}
    file.write_text(yaml.safe_dump(settings))
    run = Run(command(file))
    run.wait_for(grows(output / "round_01" / grown))
    run.wait_for(lambda: len(run.alive()) == 4)  # the loop, its stage, and the servers for TRL and for vLLM
    code, printed = run.end(number)
    assert code == 128 + number
    assert f"interrupted ({number.name}): finished work is kept; the same command continues." in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_with_processes_of_its_own(number, sorting, tmp_path):
    """With tensor parallelism, vLLM starts workers; on a CPU they must be told where to run."""
    output, file = tmp_path / "run", tmp_path / "r.yaml"
    settings = recipe(sorting, output, rounds=1)
    settings["prompts"] = many_prompts(sorting, tmp_path)
    settings["generation"]["tensor_parallel_size"] = 2
    del settings["sft"]
    file.write_text(yaml.safe_dump(settings))
    run = Run(command(file), VLLM_CPU_OMP_THREADS_BIND="0|1")
    run.wait_for(grows(output / "round_01" / "answers.jsonl.part"))
    assert len(run.alive()) >= 6, "the loop, two servers, the engine and two workers"
    run.end(number)


@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL]
)
def test_a_launched_training_that_is_asked_to_end(number, tiny_model_dir, conversational_pairs, tmp_path):
    """`trl-ext tdpo` through accelerate's launcher, on two processes."""
    conversational_pairs.to_json(tmp_path / "pairs.jsonl")
    file = tmp_path / "r.yaml"
    settings = {
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "accelerate_config": "ddp",
        "num_processes": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 100_000,
        "save_steps": 1,
        "save_total_limit": 1,
        "report_to": "none",
    }
    file.write_text(yaml.safe_dump(settings))
    run = Run([sys.executable, "-m", "trl_ext.cli", "tdpo", "--config", str(file)], ACCELERATE_USE_CPU="true")
    run.wait_for(lambda: list((tmp_path / "out").glob("checkpoint-*")))
    assert len(run.alive()) == 4, "the command, the launcher and two processes"
    mapped = Path(f"/proc/{run.process.pid}/maps").read_text()
    assert "libtorch" not in mapped and "libcuda" not in mapped, "the command waits, and holds nothing of a device"
    code, printed = run.end(number)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert f"interrupted ({number.name}): `--resume_from_checkpoint true` continues" in printed
