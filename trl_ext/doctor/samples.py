"""A recipe's model and tokenizer, and texts as the model sees them: rendered, counted, and what its vocabulary lacks."""

from collections.abc import Sequence

import numpy as np
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..model_files import load_problem
from ..recipe import RecipeError
from ..rows.processing import load_processing_class
from .checks import Check, Report


SHOWN_CHARACTERS = 400
SAMPLED_ROWS = 1000
BINS, BAR = 6, 30  # of a histogram, and the characters of its longest bar


def read_model(
    name: str, revision: str | None, trust_remote_code: bool, key: str
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | ProcessorMixin]:
    """
    A model's configuration and its tokenizer or processor, as the training loads them, without weights.

    Raises:
        [`RecipeError`]: the model is neither local nor on the Hub.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        return config, load_processing_class(name, config, **options)
    except Exception as error:  # each library raises its own errors for broken files
        cause = load_problem(name, error).strip().splitlines()[0]
        raise RecipeError(f"`{key}`: {cause} Check the name, the login (`hf auth login`) and the network.") from error


def checkpoint_dtype(config: PreTrainedConfig) -> str:
    """The checkpoint's data type; float32 if it names none."""
    return str(config.dtype or "float32").removeprefix("torch.")


def show(report: Report, title: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a rendered text with its special tokens and its length in tokens; a long text without its middle."""
    text = tokenizer.decode(ids)
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    report.detail(f"{title}, {len(ids)} tokens:")
    report.detail(text, indent=11)


def check_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Check | None:
    """A warning if the text starts with two BOS tokens, one from the template and one from the tokenizer."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:2] != [bos, bos]:
        return None
    fix = "The data or the chat template has a BOS, and the tokenizer adds another: remove one."
    return Check("warning", "BOS", "two BOS tokens at the start", fix)


def percent(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def show_lengths(report: Report, lengths: Sequence[int]) -> None:
    """Print a histogram of numbers of tokens."""
    if min(lengths) == max(lengths):
        return report.detail(f"each has {lengths[0]:,} tokens", indent=11)
    counts, edges = np.histogram(lengths, bins=bins(lengths))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * max(round(BAR * count / counts.max()), int(count > 0))
        report.detail(f"{low:>7,.0f} to {high - 1:>7,.0f}  {bar:<{BAR}}  {count:,}".rstrip(), indent=11)


def bins(lengths: Sequence[int]) -> np.ndarray:
    """The edges of a few bins of the same whole width, a round one."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high + 1 - low) // BINS))
    digit = 10 ** max(0, len(str(width)) - 1)
    width = -(-width // digit) * digit
    return np.arange(low // width * width, high + width + 1, width)


def check_unknown(what: str, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Check | None:
    """How many tokens stand for words that the tokenizer does not know; `None` if it has no such token of its own."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return None
    counts = [list(ids).count(unknown) for ids in rows]
    found = f"{percent(sum(counts), sum(map(len, rows)))} tokens of the {what} are {tokenizer.unk_token}"
    if not any(counts):
        return Check("ok", "unknown", found)
    first = next(number for number, count in enumerate(counts, start=1) if count)
    fix = "The model cannot read these words, nor learn to write them. Is this the model's own tokenizer?"
    return Check("warning", "unknown", f"{found}, the first in row {first}", fix)
