"""
Stores the reference's last hidden states at the responses as columns of a dataset. With the reference's head they give its exact
next-token distribution, at H numbers a token. `precompute_ref_log_probs` uses it for TDPO, on disk beside the dataset's cache.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset


COLUMNS = ("ref_chosen_states", "ref_rejected_states")


@dataclass
class DataCollatorWithStates:
    """
    Adds `ref_states` to the batches of another collator, if the rows have them: the bytes of the states `(N, H)` of a batch's N response
    tokens.

    Args:
        collator (`Callable`):
            The other collator.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if COLUMNS[0] in examples[0]:
            states = bytearray().join(example[column] for column in COLUMNS for example in examples)
            batch["ref_states"] = (
                torch.frombuffer(states, dtype=torch.uint8) if states else torch.empty(0, dtype=torch.uint8)
            )
        return batch


def as_rows(hidden: torch.Tensor, mask: torch.Tensor) -> list[tuple[bytes, ...]]:
    """
    Split the states of a batch into rows.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            The states of a batch's N response tokens.
        mask (`torch.Tensor` of shape `(2B, T)`):
            True for these tokens.

    Returns:
        `list` of B pairs of `bytes`: the states of chosen and of rejected.
    """
    parts = hidden.cpu().contiguous().split(mask.sum(dim=1).tolist())
    rows = [part.view(torch.uint8).numpy().tobytes() for part in parts]
    return list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))


def check_room(dataset: Dataset, bytes_per_token: int, file: str) -> None:
    """
    Check that the states fit on the disk.

    Raises:
        `OSError`: there is not enough space for the states of all responses.
    """
    answers = dataset.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow")
    lengths = (
        pc.sum(pc.list_value_length(table[column])) for table in answers.iter(1000) for column in table.column_names
    )
    needed, free = (
        bytes_per_token * sum(length.as_py() or 0 for length in lengths),
        shutil.disk_usage(os.path.dirname(file)).free,
    )
    if needed > free:
        raise OSError(
            f"`precompute_ref_log_probs=True` keeps the reference's states of each response token, {needed / 1e9:.1f} GB for this dataset, and "
            f"{os.path.dirname(file)} has {free / 1e9:.1f} GB left. Set HF_DATASETS_CACHE to another disk, or leave it `False`."
        )


def write(file: str, rows: Iterable[list[tuple[bytes, ...]]]) -> None:
    """Write the rows of all batches. The file gets its final name when it is complete."""
    schema = pa.schema([(column, pa.large_binary()) for column in COLUMNS])
    with pa.OSFile(f"{file}.tmp", "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in rows:
            columns = [pa.array(values, pa.large_binary()) for values in zip(*batch, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    os.replace(f"{file}.tmp", file)
