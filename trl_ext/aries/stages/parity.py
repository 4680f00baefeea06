"""Checks that the answers are from the policy that was trained."""

from ..checks.parity import check_parity
from ..children import Reporter, child_main
from ..policies import answers_of, comparison
from ..run_dir import RunDir
from .messages import AnsweringMessage


def main(message: AnsweringMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    config, own = run.read_config(), run.round(message.answering)
    answers = [answers.answers for answers in answers_of(run, config, message.answering)]
    check_parity(comparison(run, config, message.answering), own.samples, own.parity, [own.samples, *answers])


if __name__ == "__main__":
    child_main(main, AnsweringMessage)
