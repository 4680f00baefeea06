"""Runs the SFT or a round's preference training, in one process or in each of several."""

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from ..children import Reporter, child_main
from ..results.tracking import training_name
from ..run_dir import RunDir
from ..training.settings import training_of
from ..training.train import train
from .messages import RoundMessage


def main(message: RoundMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    config = run.read_config()
    training = training_of(run, config, message.number)
    name = training_name(run, config, message.number)
    if name is not None:
        training.settings.config["run_name"] = name
    train(training, report)


if __name__ == "__main__":
    # Among several processes torchrun shows the traceback of the one that failed first
    child_main(record(main), RoundMessage)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
