"""
`python -m lm_eval` with one more model, `hf-bitsandbytes`: a base that is quantized to 4 or 8 bits as it is loaded, as QLoRA trains on.

`lm_eval` up to 0.4.13 passes `load_in_4bit=True` to `from_pretrained`, which transformers 5 no longer accepts, and takes no
`quantization_config` in its place.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import BitsAndBytesConfig


QUANTIZATION_KEYS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)


@register_model("hf-bitsandbytes")
class QuantizedHFLM(HFLM):
    """The only change w.r.t. `HFLM` is that `_create_model` makes a `BitsAndBytesConfig` of the arguments meant for it."""

    def _create_model(self, *args, **kwargs) -> None:
        quantization = {key: kwargs.pop(key) for key in QUANTIZATION_KEYS if key in kwargs}
        super()._create_model(*args, **kwargs | {"quantization_config": BitsAndBytesConfig(**quantization)})


if __name__ == "__main__":
    cli_evaluate()
