"""What a recipe's model sees: its configuration and tokenizer, and texts as they are rendered."""

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..model_files import load_problem
from ..recipe import RecipeError
from ..rows.processing import load_processing_class
from .checks import Check, Report


SHOWN_CHARACTERS = 400
SAMPLED_ROWS = 1000


def read_model(
    name: str, revision: str | None, trust_remote_code: bool, key: str
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | ProcessorMixin]:
    """
    A model's configuration and its tokenizer or processor, as the training loads them; no weights.

    Raises:
        [`RecipeError`]: neither there nor reachable, in one line.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        return config, load_processing_class(name, config, **options)
    except Exception as error:  # of a broken file each library raises its own
        cause = load_problem(name, error).strip().splitlines()[0]
        raise RecipeError(
            f"`{key}`: {cause} Is the name right, are you logged in (`hf auth login`), is there a network?"
        ) from error


def checkpoint_dtype(config: PreTrainedConfig) -> str:
    """The data type that the checkpoint names; float32 where it names none."""
    return str(config.dtype or "float32").removeprefix("torch.")


def show(report: Report, title: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """A rendered text with its number of tokens, special tokens included, its middle left out where it is long."""
    text = tokenizer.decode(ids)
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    report.detail(f"{title}, {len(ids)} tokens:")
    report.detail(text, indent=11)


def check_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Check | None:
    """Two BOS tokens at the start: one from the template, one from the tokenizer."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:2] != [bos, bos]:
        return None
    way_out = "The data or the chat template has a BOS of its own, and the tokenizer adds another: take one away."
    return Check("warning", "BOS", "two BOS tokens at the start", way_out)


def percent(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"
