"""Prepares rows as a trainer does, with a tokenizer alone."""

from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from ..rows.pairs import Account, prepare_pairs
from ..rows.processing import tokenizer_of


@dataclass
class _Preparing:
    """What `DPOTrainer._prepare_dataset` (TRL 1.16) reads from the trainer."""

    _tokenizer: PreTrainedTokenizerBase


def prepared_pairs(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: DPOConfig,
    name: str = "train",
    vocabulary: int | None = None,
    takes_rendered: bool = True,
) -> tuple[Dataset | IterableDataset, Account]:
    """
    Tokenize pairs as the trainers of this package do. The arguments, and the account that is returned with the rows, are those of
    [`~rows.pairs.prepare_pairs`].

    Raises:
        [`RecipeError`]: no row can be used for training, or more than half cannot.
    """
    preparing = _Preparing(tokenizer_of(processing_class))

    def tokenize(rows, args):
        return DPOTrainer._prepare_dataset(preparing, rows, processing_class, args, name)

    return prepare_pairs(dataset, processing_class, args, name, tokenize, vocabulary, takes_rendered)
