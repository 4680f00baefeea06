"""The rows a trainer trains on, without a trainer: TRL's own preparation, on a tokenizer alone."""

import copy
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer


@dataclass
class _Preparing:
    """What `DPOTrainer._prepare_dataset` reads of the trainer (TRL 1.16)."""

    _tokenizer: PreTrainedTokenizerBase


def prepared_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> Dataset:
    """
    Tokenized pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids` as the trainer has them before `max_length` cuts them
    and leaves rows out.
    """
    args = copy.copy(args)
    args.max_length, args.dataset_num_proc = None, None
    return DPOTrainer._prepare_dataset(_Preparing(tokenizer), dataset, tokenizer, args, "train")
