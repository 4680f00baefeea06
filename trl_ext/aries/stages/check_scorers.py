"""Tries the scorers on the first prompts, before any work is done."""

from ..children import Reporter, child_main
from ..run_dir import RunDir
from ..scoring.scoring import check_scorers
from .messages import CheckScorersMessage


def main(message: CheckScorersMessage, report: Reporter) -> None:
    run = RunDir(message.run.absolute())
    check_scorers(run, run.read_config(), message.rows)


if __name__ == "__main__":
    child_main(main, CheckScorersMessage)
