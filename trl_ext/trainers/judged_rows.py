"""
Lets a [`~trl.DPOTrainer`] take rows of any known shape, and judges them before training (`trl_ext/rows`).
"""

from typing import ClassVar

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from ..rows.judge import MOST_DROPPED, TOKENS
from ..rows.pairs import prepare_pairs
from ..rows.processing import load_processing_class


logger = get_logger(__name__)


def model_config(model: str | nn.Module, args: DPOConfig | None) -> PreTrainedConfig:
    """The configuration of a model, given as an object or by its name."""
    if isinstance(model, nn.Module):
        return model.config
    options = (None if args is None else args.model_init_kwargs) or {}
    trust = options.get("trust_remote_code", args is not None and args.trust_remote_code)
    return AutoConfig.from_pretrained(model, revision=options.get("revision"), trust_remote_code=trust)


def count_truncated(dataset: Dataset, max_length: int) -> tuple[int, int]:
    """
    Count the tokens of a tokenized preference dataset that `max_length` cuts off.

    Returns:
        `tuple[int, int]`: rows with a longer sequence, and the tokens beyond `max_length` in chosen and rejected together.
    """
    rows = tokens = 0
    for table in dataset.select_columns(list(TOKENS)).with_format("arrow").iter(batch_size=1000):
        prompt, chosen, rejected = (pc.list_value_length(table[column]).to_numpy() for column in TOKENS)
        beyond = np.maximum(prompt + chosen - max_length, 0) + np.maximum(prompt + rejected - max_length, 0)
        rows, tokens = rows + int((beyond > 0).sum()), tokens + int(beyond.sum())
    return rows, tokens


class JudgedRows:
    """
    Mixin for a [`~trl.DPOTrainer`]: datasets may have any known shape, rows that cannot be used are left out and counted, and a text-only
    model's tokenizer is loaded without the image processor that it may name.

    Args:
        max_dropped (`float`, *optional*, defaults to `0.5`):
            Largest share of a dataset's rows that may be left out; `None` for any share below all.

    Raises:
        [`RecipeError`], a `ValueError`: the data are no preference pairs, no row can be used, or too many cannot.
    """

    # Columns that the trainer reads besides those of a pair
    columns: ClassVar[tuple[str, ...]] = ()
    # Whether text that was already rendered with the chat template can be used
    takes_rendered = True

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *pos,
        max_dropped: float | None = MOST_DROPPED,
        **kwargs,
    ):
        if self.columns and isinstance(train_dataset, Dataset | IterableDataset):
            found = list(next(iter(train_dataset), {}))
            if missing := [name for name in self.columns if name not in found]:
                raise ValueError(
                    f"{type(self).__name__} reads `{'`, `'.join(missing)}` of each row, and the first row of `train_dataset` has "
                    f"only {', '.join(found)}. Add the column, for example with `dataset.add_column`."
                )
        self._max_dropped = max_dropped
        config = model_config(model, args)
        self._vocabulary = config.get_text_config().vocab_size
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision") if args and isinstance(model, str) else None
            trust = args is not None and args.trust_remote_code
            processing_class = load_processing_class(get_config_model_id(config), config, revision, trust)
        super().__init__(
            model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, *pos, **kwargs
        )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        def tokenize(rows, args):
            return super(JudgedRows, self)._prepare_dataset(rows, processing_class, args, dataset_name)

        prepared, account = prepare_pairs(
            dataset,
            processing_class,
            args,
            dataset_name,
            tokenize,
            vocabulary=self._vocabulary,
            takes_rendered=self.takes_rendered,
            max_dropped=self._max_dropped,
        )
        for line in account.lines:
            logger.warning(line)
        if isinstance(prepared, Dataset) and args.max_length is not None:
            rows, tokens = count_truncated(prepared, args.max_length)
            if rows > 0:
                logger.warning(
                    f"{rows} of {len(prepared)} rows of the {dataset_name} dataset are longer than "
                    f"`max_length={args.max_length}`: {tokens} tokens are cut off."
                )
        return prepared


class JudgedDPOTrainer(JudgedRows, DPOTrainer):
    """[`~trl.DPOTrainer`] with [`JudgedRows`]."""
