"""Generates a policy's answers, and its samples for the parity check."""

from ..children import Reporter, child_main
from ..generation.generate import generate
from ..run_dir import RunDir
from .messages import AnsweringMessage


def main(message: AnsweringMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    generate(run, run.read_config(), message.answering, report)


if __name__ == "__main__":
    child_main(main, AnsweringMessage)
