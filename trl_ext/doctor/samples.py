"""A recipe's model and tokenizer, and rendered texts as the model sees them."""

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
