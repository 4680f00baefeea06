"""Tries the scorers on the first prompts, before any work is done."""

from itertools import chain

from ..children import Reporter, child_main
from ..run_dir import RunDir
from ..scoring.scoring import check_scorers, recipe_scorers
from ..scoring.watch import Watch
from .messages import CheckScorersMessage


def main(message: CheckScorersMessage, report: Reporter) -> None:
    run = RunDir(message.run.absolute())
    scorers = recipe_scorers(run.read_config(), Watch(run.verifier_call))
    check_scorers(chain(*scorers.values()), message.files)


if __name__ == "__main__":
    child_main(main, CheckScorersMessage)
