"""Sends a round's metrics to the trackers."""

from ..children import Reporter, child_main
from ..results.tracking import log_round
from ..run_dir import RunDir
from .messages import RoundMessage


def main(message: RoundMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    log_round(run, run.read_config(), message.number)


if __name__ == "__main__":
    child_main(main, RoundMessage)
