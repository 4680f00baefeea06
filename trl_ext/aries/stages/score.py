"""Scores a policy's answers."""

from ..children import Reporter, child_main
from ..run_dir import RunDir
from ..scoring.scoring import score
from .messages import AnsweringMessage


def main(message: AnsweringMessage, report: Reporter) -> None:
    run = RunDir(message.run.absolute())
    score(run, run.read_config(), message.answering, report)


if __name__ == "__main__":
    child_main(main, AnsweringMessage)
