"""
Prepares preference rows for a trainer: reads them in any known shape (`formats.py`), judges them (`judge.py`), lets TRL tokenize them, and
judges the tokens. Whatever a chat template, TRL or `datasets` raises on the way becomes a [`RecipeError`] with the row and its
content. A dataset in TRL's form stays as it is.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, extract_prompt

from ..recipe_values import RecipeError, show
from .formats import (
    CONVERSIONS,
    Columns,
    Pair,
    are_messages,
    form_fault,
    is_filled,
    is_text,
    read_pair,
    repeats_prompt,
)
from .judge import MOST_DROPPED, TOKENS, Findings, Judge


logger = get_logger(__name__)

# Columns that may contain a part of the question
QUESTIONS = ("question", "instruction", "query", "input", "context", "history")

# Rows of a stream that are judged before the training
STREAMED_ROWS = 1000

Rows = Dataset | IterableDataset
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


@dataclass
class Account:
    """
    What became of a dataset's rows.

    Args:
        findings ([`~rows.judge.Findings`]):
            Rows that were left out, and odd ones.
        converted (`Counter`):
            Number of rows by conversion, keys of [`~rows.formats.CONVERSIONS`].
        format (`str`, *optional*):
            Name of the columns' format, if it is not TRL's own.
    """

    findings: Findings
    converted: Counter[str] = field(default_factory=Counter)
    format: str | None = None

    @property
    def conversion(self) -> str | None:
        """The conversions of rows that were not in TRL's form, as a sentence, or `None` if all were."""
        if not self.converted:
            return None
        what = self.findings.what + (f" ({self.format})" if self.format else "")
        counts = "; ".join(f"{CONVERSIONS[done]} ({count:,})" for done, count in self.converted.most_common())
        return f"The {what} are converted to TRL's form: {counts}."

    @property
    def lines(self) -> list[str]:
        return [*filter(None, [self.conversion]), *self.findings.drops, *self.findings.warnings]


def prepare_pairs(
    dataset: Rows,
    processing_class: ProcessingClass,
    args: DPOConfig,
    name: str,
    tokenize: Callable[[Rows, DPOConfig], Rows],
    vocabulary: int | None = None,
    takes_rendered: bool = True,
    max_dropped: float | None = MOST_DROPPED,
) -> tuple[Rows, Account]:
    """
    Select the rows that can be used for training, and tokenize them as DPOTrainer does.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in any known shape.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer, with its pad token set.
        args ([`~trl.DPOConfig`]):
            `max_length` and how to cut there.
        name (`str`):
            `"train"` or `"eval"`.
        tokenize (`Callable`):
            TRL's own preparation, `(rows, args) -> rows` with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        vocabulary (`int`, *optional*):
            Number of the model's embeddings. Default: not checked.
        takes_rendered (`bool`, *optional*, defaults to `True`):
            Whether text that was already rendered can be used. Sr-DPO cannot: it puts its prompt into the user's turn.
        max_dropped (`float`, *optional*, defaults to `0.5`):
            Largest share of rows that may be left out; `None` for any share below all.

    Returns:
        `tuple`: the rows, and the [`Account`] of them. A stream's account covers its first 1,000 rows; later rows that cannot be
        used are left out without a count.

    Raises:
        [`RecipeError`]: the data are no preference pairs, no row can be used, or too many cannot.
    """
    account = Account(Findings(f"rows of the {name} dataset"))
    judge = Judge(processing_class, account.findings, vocabulary, takes_rendered)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, judge, args, account, tokenize, max_dropped), account
    if len(dataset) == 0:
        raise RecipeError(f"the {name} dataset has no rows. A preference dataset has one pair per row.")
    if dataset.format["type"] == "custom":
        raise RecipeError(
            f"the {name} dataset has a transform, which would be applied to the tokens again. Use `dataset.map(...)` instead of "
            "`dataset.set_transform(...)`."
        )
    if dataset.format["type"] is not None:  # NumPy, pandas ...: its values would not be Python objects
        dataset = dataset.with_format(None)
    rows, usable = standard_rows(dataset, judge, account)
    account.findings.check(max_dropped)
    numbers = [index + 1 for index, can in enumerate(usable) if can]
    if len(numbers) < len(rows):
        rows = rows.select([number - 1 for number in numbers])
    uncut = copy.copy(args)
    uncut.max_length = None  # TRL leaves out rows that are too long without counting them
    try:
        prepared = tokenize(rows, uncut)
    except Exception as error:
        raise _named(error, rows, numbers, lambda row: tokenize(row, uncut)) from error
    cut = args.max_length if args.truncation_mode == "keep_start" else None
    can = judge.ids(prepared, numbers, cut)
    account.findings.check(max_dropped)
    # TRL caches precomputed references by the fingerprint, which depends on the length if TRL itself leaves rows out
    fingerprint = Hasher.hash((prepared._fingerprint, args.max_length, args.truncation_mode, can.tolist()))
    kept = range(len(prepared)) if can.all() else can.nonzero()[0]
    return prepared.select(kept, new_fingerprint=fingerprint), account


def standard_rows(
    dataset: Dataset, judge: Judge, account: Account, always: bool = False
) -> tuple[Dataset, list[bool]]:
    """Convert rows to TRL's form (unchanged if they have it, unless `always`), and say which can be used."""
    columns = Columns.of(dataset.column_names)
    account.format = columns.format
    looked_at = _Dataset(columns, (row for row, _ in _read(dataset, columns)))
    as_messages, cut_prompt = looked_at.as_messages, looked_at.cut_prompt
    usable, done = [], Counter()
    for number, (row, had_nulls) in enumerate(_read(dataset, columns), start=1):
        pair = read_pair(row, columns, as_messages, cut_prompt)
        done.update({*pair.done, "nulls"} if had_nulls else set(pair.done))
        usable.append(_judge(number, pair, columns, judge, row))
    if not any(usable):
        return dataset, usable
    if as_messages and judge.template is None and not looked_at.messages:
        raise RecipeError(
            f"`{columns.system}` contains a system message, but the tokenizer has no chat template for it. Put it into the prompt: "
            f"`dataset.map(lambda row: {{'prompt': row['{columns.system}'] + '\\n\\n' + row['{columns.prompt}']}})`, and remove "
            f"`{columns.system}`."
        )
    account.converted.update(done)
    # TRL looks for messages in these columns too, in an order that differs from process to process
    gone = [name for name in ("messages", "completion") if name in dataset.column_names]
    if not (always or done or gone):
        return dataset, usable
    padded, features = padded_columns(dataset.features), Features(dataset.features)
    kind = List(Json()) if looked_at.messages or as_messages else Value("string")
    for column in ("prompt", "chosen", "rejected"):
        features[column] = kind
    if "chat_template_kwargs" in features:
        features["chat_template_kwargs"] = Json()
    if isinstance(features.get("tools"), List | LargeList):
        features["tools"] = List(Json())
    for column in gone:
        del features[column]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        row = _plain(row, padded)
        converted = _columns(read_pair(row, columns, as_messages, cut_prompt), columns)
        # Rows that are left out later must fit into the columns too
        fits, empty = (are_messages, []) if kind != Value("string") else (is_text, "")
        converted = {key: value if fits(value) else empty for key, value in converted.items()}
        if "chat_template_kwargs" in row:
            options = row["chat_template_kwargs"]
            converted["chat_template_kwargs"] = options if isinstance(options, dict) else {}
        if "tools" in row:
            converted["tools"] = row["tools"]
        return converted

    try:
        rows = dataset.map(convert, features=features, remove_columns=gone, desc="Reading preference pairs")
    except Exception as error:  # for example half a surrogate pair, which no file can store
        raise RecipeError(f"the rows cannot be converted to TRL's form: {type(error).__name__}: {error}") from error
    return rows, usable


class _Dataset:
    """Decisions that depend on the whole dataset, not on a single row."""

    def __init__(self, columns: Columns, rows: Iterable[dict[str, Any]]):
        texts = repeated = systems = self.messages = 0
        for row in rows:
            pair = read_pair(row, columns)
            has_system = bool({"system", "history"} & set(pair.done))
            self.messages += pair.fault is None and pair.is_conversational and not has_system
            systems += has_system
            texts += isinstance(pair.prompt, str)
            repeated += repeats_prompt(pair)
        self.as_messages = bool(self.messages or systems)
        self.cut_prompt = 2 * repeated > texts


def _read(dataset: Dataset, columns: Columns) -> Iterator[tuple[dict[str, Any], bool]]:
    """The columns that are read, as Python objects, and whether nulls had to be left out."""
    others = ("system", "messages", "conversations", "completion", "tools", "chat_template_kwargs")
    names = [*columns.read, *QUESTIONS, *others]
    read = dataset.select_columns([name for name in dict.fromkeys(names) if name in dataset.column_names])
    padded = padded_columns(read.features)
    for row in read:
        plain = _plain(row, padded)
        yield plain, plain != row


def padded_columns(features: Features | None) -> dict[str, Any]:
    """The columns to which Arrow may add keys: with others than the two of a message. Most have none, and `without_nulls` takes time."""

    def is_padded(feature: Any) -> bool:
        if isinstance(feature, List | LargeList):
            return is_padded(feature.feature)
        return isinstance(feature, dict) and (
            not feature.keys() <= {"role", "content"} or any(map(is_padded, feature.values()))
        )

    return {name: feature for name, feature in (features or {}).items() if is_padded(feature)}


def _plain(row: dict[str, Any], padded: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls of [`without_nulls`], and with its template options as `template_options` reads them."""
    row = row | {name: without_nulls(row[name], feature) for name, feature in padded.items()}
    if row.get("chat_template_kwargs", {}) is None:
        row["chat_template_kwargs"] = {}
    if "tools" in row:
        row["tools"] = row["tools"] or None
    return row


def without_nulls(value: Any, feature: Any) -> Any:
    """
    A value without the keys that are null because Arrow gives every row the keys of all rows: `{"city": "Paris", "day": null}` as the
    arguments of a call. A message keeps its `content`, and a JSON column, whose rows have their own keys, its nulls.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        is_kept = {"content"} if "role" in feature else set()
        return {k: without_nulls(v, feature.get(k)) for k, v in value.items() if v is not None or k in is_kept}
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        return [without_nulls(item, feature.feature) for item in value]
    return value


def _columns(pair: Pair, columns: Columns) -> dict[str, Any]:
    """The pair as TRL's columns. For texts without a prompt column, the prompt is their common beginning, as in TRL."""
    texts = {"chosen": pair.chosen, "rejected": pair.rejected}
    if pair.prompt is None and columns.prompt is None and all(map(is_text, texts.values())):
        return extract_prompt(texts)
    return {"prompt": pair.prompt, **texts}


def _judge(number: int, pair: Pair, columns: Columns, judge: Judge, row: dict[str, Any]) -> bool:
    if pair.fault is None:
        prompt = pair.prompt
        if prompt is None and columns.prompt is None and not pair.is_conversational:
            prompt = ""  # TRL takes the common beginning
        usable = judge.row(number, prompt, [pair.chosen, pair.rejected], row)
        read = {*columns.read} - ({columns.history} - {*pair.done})  # a `history` in an unknown form is not read
        unread = [name for name in QUESTIONS if name not in read and is_filled(row.get(name))]
        if usable and unread and columns.prompt is not None:
            judge.findings.warn("unread", number, f"`{unread[0]}`")
        if usable and isinstance(prompt, str) and not _columns(pair, columns)["prompt"].strip():
            judge.findings.warn("no question", number)
        return usable
    values = (pair.prompt, pair.chosen, pair.rejected)
    shown = next((value for value in values if form_fault(value) == pair.fault), pair.prompt or pair.chosen)
    judge.findings.total += 1
    judge.findings.drop(pair.fault, number, show(shown))
    return False


def _named(error: Exception, rows: Dataset, numbers: list[int], tokenize: Callable[[Dataset], Any]) -> RecipeError:
    """The error, with the first row that raises it on its own."""
    for index, number in enumerate(numbers):
        row = rows.select([index])
        try:
            tokenize(row)
        except Exception as own:
            values = {key: show(value) for key, value in row[0].items() if key in ("prompt", "chosen", "rejected")}
            seen = "; ".join(f"`{key}` is {value}" for key, value in values.items())
            return RecipeError(
                f"row {number:,} cannot be rendered: {type(own).__name__}: {own}. Its {seen}. Change the row, or remove it: "
                f"`dataset.select(i for i in range(len(dataset)) if i != {number - 1})`."
            )
    return RecipeError(f"the rows cannot be prepared: {type(error).__name__}: {error}")


def _prepare_stream(
    dataset: IterableDataset,
    judge: Judge,
    args: DPOConfig,
    account: Account,
    tokenize: Callable[[Rows, DPOConfig], Rows],
    max_dropped: float | None,
) -> IterableDataset:
    """Decide by the first rows; later rows that cannot be used are left out as they come."""
    dataset = dataset.map(_plain, fn_kwargs={"padded": padded_columns(dataset.features)})
    head = list(dataset.take(STREAMED_ROWS))
    if not head:
        raise RecipeError("the stream has no rows. A preference dataset has one pair per row.")
    account.findings.what += f" among the first {len(head):,}"
    sample = Dataset.from_list(head, on_mixed_types="use_json")
    _, usable = standard_rows(sample, judge, account)
    account.findings.check(max_dropped)
    columns = Columns.of(sample.column_names)
    looked_at = _Dataset(columns, sample)
    quiet = copy.copy(judge)
    quiet.findings = Findings("rows")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        pair = read_pair(row, columns, looked_at.as_messages, looked_at.cut_prompt)
        row = {key: value for key, value in row.items() if key not in ("messages", "completion")}
        return {**row, **_columns(pair, columns)}

    def can_use(row: dict[str, Any]) -> bool:
        pair = read_pair(row, columns, looked_at.as_messages, looked_at.cut_prompt)
        # TRL decides by the first row whether the dataset is conversational
        return pair.is_conversational == looked_at.as_messages and _judge(0, pair, columns, quiet, row)

    dataset = dataset.filter(can_use).map(convert)
    try:
        prepared = tokenize(dataset, args)
        next(iter(prepared))
    except StopIteration:
        raise RecipeError("no row of the stream has a prompt shorter than `max_length`. Raise it.") from None
    except Exception as error:
        raise RecipeError(f"the stream cannot be prepared: {type(error).__name__}: {error}") from error
    cut = args.max_length if args.truncation_mode == "keep_start" else None

    def can_train(row: dict[str, Any]) -> bool:
        prompt, *answers = (np.array(row[name], dtype=np.int64) for name in TOKENS)
        return quiet.row_ids(0, prompt, answers, cut)

    return prepared.filter(can_train)
