"""Writes the report of a run that goes on or has just stopped."""

from ..children import Reporter, child_main
from ..results.report import write_report
from .messages import ReportMessage


def main(message: ReportMessage, report: Reporter) -> None:
    write_report(message.run, message.running)


if __name__ == "__main__":
    child_main(main, ReportMessage)
