"""The engine in a process of its own, as in a run: only its end gives back what vLLM takes."""

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trl_ext.aries.children import REPORT, Reporter
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


def run_engine(
    settings: EngineSettings, asked: list[Asked], parity: ParitySamples | None = None, probe: Path = Path("unused")
) -> list[str]:
    """Have a policy answer; what was noted meanwhile."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answer, settings, asked, parity, probe).result()


def answer(
    settings: EngineSettings, asked: list[Asked], parity: ParitySamples | None = None, probe: Path = Path("unused")
) -> list[str]:
    """The same in this process."""
    pattern, reports = settings.config.answer_pattern, io.StringIO()
    tasks = [
        Task(task.prompts, task.answers, Strategy(task.refinements, pattern), task.sampling, task.seed)
        for task in asked
        if not task.answers.exists()
    ]
    answer_tasks(settings, tasks, parity, probe, Reporter(reports))
    lines = [json.loads(line.removeprefix(REPORT)) for line in reports.getvalue().splitlines()]
    return [line["note"] for line in lines if "note" in line]
