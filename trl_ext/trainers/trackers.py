"""Experiment trackers, transformers' `report_to`."""

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks


def check_trackers(args: TrainingArguments) -> None:
    """
    Check `report_to` before a model is loaded.

    Raises:
        `ValueError`: a tracker of `report_to` is unknown or not installed.
    """
    for callback_class in get_reporting_integration_callbacks(args.report_to):
        try:
            callback_class()
        except RuntimeError as error:
            raise ValueError(f"`report_to`: {error}") from error
