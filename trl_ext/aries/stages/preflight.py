"""Constructs every setting of a recipe, before any work is done."""

from ..checks.preflight import check_recipe
from ..children import Reporter, child_main
from ..run_dir import RunDir
from .messages import PreflightMessage


def main(message: PreflightMessage, report: Reporter) -> None:
    run = RunDir(message.run)
    check_recipe(run, run.read_config(), message.read_recipe(), message.conversational, report)


if __name__ == "__main__":
    child_main(main, PreflightMessage)
