"""The engine in a process of its own, forked as in a run: only its end gives back what vLLM takes."""

import io
import json
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.aries.children import REPORT, SERVER_OF, Reporter, child_main, run_child
from trl_ext.aries.config import DraftsConfig, RefinementsConfig
from trl_ext.aries.generation.chains import EngineSettings, Task
from trl_ext.aries.generation.generate import ParitySamples, answer_tasks
from trl_ext.aries.generation.refinements import Strategy


@dataclass
class Asked:
    """What a [`Task`] is made of."""

    prompts: Path
    answers: Path
    refinements: RefinementsConfig
    sampling: list[DraftsConfig]
    seed: tuple[Any, ...] = (0, 1)
    answer_pattern: str | None = None


@dataclass
class Job:
    arguments: Path  # of [`answer`], pickled


def run_engine(
    settings: EngineSettings, asked: list[Asked], parity: ParitySamples | None = None, probe: Path = Path("unused")
) -> list[str]:
    """Have a policy answer; what was noted meanwhile."""
    notes = []
    with tempfile.TemporaryDirectory() as directory:
        job = Job(Path(directory) / "arguments")
        job.arguments.write_bytes(pickle.dumps((settings, asked, parity, probe)))
        log = Path(directory) / "engine.log"
        run_child(__name__, job, log, lambda done, total: None, on_note=notes.append)
        print(log.read_text())  # noqa: T201 (for the test that started it)
    return notes


def answer(
    settings: EngineSettings, asked: list[Asked], parity: ParitySamples | None = None, probe: Path = Path("unused")
) -> list[str]:
    """The same in this process."""
    reports = io.StringIO()
    tasks = [
        Task(task.prompts, task.answers, Strategy(task.refinements, task.answer_pattern), task.sampling, task.seed)
        for task in asked
        if not task.answers.exists()
    ]
    answer_tasks(settings, tasks, parity, probe, Reporter(reports))
    lines = [json.loads(line.removeprefix(REPORT)) for line in reports.getvalue().splitlines()]
    return [line["note"] for line in lines if "note" in line]


def main(job: Job, report: Reporter) -> None:
    for note in answer(*pickle.loads(job.arguments.read_bytes())):
        report.note(note)


SERVER_OF["tests.aries.engine_process"] = "vllm"

if __name__ == "__main__":
    child_main(main, Job)
