"""Loads a model's tokenizer or processor, in the same way for all parts of the package."""

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin


def load_processing_class(
    name: str, config: PreTrainedConfig, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Load a model's tokenizer, or its processor if the model takes more than text.

    A text-only model may name an image processor that it does not have (Gemma 3's small ones do). DPOTrainer, which always asks for the
    processor, cannot load it.

    Args:
        name (`str`):
            A directory, or a name on the Hub.
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
            As for `from_pretrained`.
    """
    loader = AutoTokenizer if config.get_text_config() is config else AutoProcessor
    return loader.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself, also of a processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
