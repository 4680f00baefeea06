"""The rows a trainer trains on, without a trainer: what it does to them, on a tokenizer alone."""

from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from ..rows.pairs import Account, prepare_pairs
from ..rows.processing import tokenizer_of


@dataclass
class _Preparing:
    """What `DPOTrainer._prepare_dataset` reads of the trainer (TRL 1.16)."""

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
    Tokenized pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids`, as the trainers of this package make them, and the account of
    them; the arguments are those of [`~rows.pairs.prepare_pairs`].

    Raises:
        [`RecipeError`]: nothing can be trained on, or more than half cannot.
    """
    preparing = _Preparing(tokenizer_of(processing_class))

    def tokenize(rows, args):
        return DPOTrainer._prepare_dataset(preparing, rows, processing_class, args, name)

    return prepare_pairs(dataset, processing_class, args, name, tokenize, vocabulary, takes_rendered)
