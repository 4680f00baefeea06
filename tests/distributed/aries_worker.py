"""
Runs jobs of ARIES' training stage under DDP, FSDP2 or ZeRO-3 on CPUs, and saves beside each product how it was trained.

Launched by the tests, `python -m tests.distributed.aries_worker <jobs> <strategy> ...`, and imported by them for what one process makes
of the same jobs.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import set_seed

from tests.distributed.launch import two_processes
from tests.distributed.worker import STRATEGIES, held_share
from trl_ext.aries.training import train
from trl_ext.aries.training.settings import Training


@dataclass
class Job:
    training: Training
    stop_at: int | None = None  # after so many steps it is stopped and run again


class Stopped(Exception):
    """In the place of a kill."""


def run(job: Job, options: Callable[[], dict] = dict) -> dict:
    """
    One job, with `options` for its trainer besides.

    Returns:
        `dict`: `processes`; `wrapper`, the classes that the trained model is an instance of; `held`, the share of its parameters
        that this process holds; `reports`, what the last run said of its progress.
    """
    trainers, reports, make_trainer = [], [], train.make_trainer
    settings = job.training.settings

    def making(*args):
        trainers.append(make_trainer(*args))
        return trainers[-1]

    def progress(done: int, total: int) -> None:
        reports.append([done, total])
        if done == job.stop_at and len(trainers) == 1:
            raise Stopped

    train.make_trainer = making
    try:
        for _ in range(1 if job.stop_at is None else 2):
            set_seed(0)  # the adapter's initial weights
            reports.clear()
            try:
                config = settings.config | options()
                train.train(replace(job.training, settings=replace(settings, config=config)), progress)
            except Stopped:
                continue
    finally:
        train.make_trainer = make_trainer
    return {
        "processes": trainers[-1].accelerator.num_processes,
        "wrapper": [cls.__name__ for cls in type(trainers[-1].model_wrapped).__mro__],
        "held": held_share(trainers[-1].model),
        "reports": reports,
    }


def main(jobs: Path, strategies: list[str]) -> None:
    made = TypeAdapter(dict[str, list[Job]]).validate_json(jobs.read_text())
    for strategy in strategies:
        for job in made[strategy]:
            result = run(job, STRATEGIES[strategy])
            torch.distributed.barrier()  # the next job may start from what the main process is saving
            Path(f"{job.training.output}.{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    two_processes(main, Path(sys.argv[1]), sys.argv[2:])
