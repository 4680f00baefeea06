from dataclasses import dataclass, field

from .token_level_config import TokenLevelConfig


@dataclass
class TDPOConfig(TokenLevelConfig):
    r"""
    Configuration class for the [`TDPOTrainer`].

    [`TDPOConfig`] inherits every parameter from [`~trl.DPOConfig`] and adds the two of Token-level DPO
    (https://huggingface.co/papers/2404.11999), and those of packing. Every preference loss in `loss_type` sees log-ratios raised by the
    KLs; with `"sigmoid"` that is the paper's loss.

    Parameters:
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo1"` or `"tdpo2"`. The paper's code advises TDPO1 for a low learning rate and TDPO2 for a higher one.

    Raises:
        `ValueError`: an unknown `variant`, or a negative `alpha`.
    """

    variant: str = field(
        default="tdpo2",
        metadata={
            "help": "'tdpo1' or 'tdpo2'. The paper's code advises TDPO1 for a low learning rate and TDPO2 for a higher "
            "one.",
            "choices": ["tdpo1", "tdpo2"],
        },
    )
