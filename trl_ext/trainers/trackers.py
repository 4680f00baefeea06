"""Experiment trackers: `report_to`, as transformers' trainers take it."""

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks


def check_trackers(args: TrainingArguments) -> None:
    """
    Raises:
        `ValueError`: a tracker of `report_to` is not known or not installed. A trainer would say so after the model was loaded.
    """
    for callback_class in get_reporting_integration_callbacks(args.report_to):
        try:
            callback_class()
        except RuntimeError as error:
            raise ValueError(f"`report_to`: {error}") from error
