from dataclasses import dataclass, field

from trl import DPOConfig


@dataclass
class TDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`TDPOTrainer`].

    [`TDPOConfig`] inherits every parameter from [`~trl.DPOConfig`] and adds the two of Token-level DPO
    (https://huggingface.co/papers/2404.11999), and `share_prompt`. Every preference loss in `loss_type` sees log-ratios raised by the
    KLs; with `"sigmoid"` that is the paper's loss.

    Parameters:
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo1"` or `"tdpo2"`. The paper's code advises TDPO1 for a low learning rate and TDPO2 for a higher one.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight α of the difference of the sequential KLs in TDPO2, at least 0; 0.5 is the paper's default. Larger
            values keep the policy closer to the reference; `0` is DPO. TDPO1 does not use it.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether to compute the prompt of a pair once, with chosen and rejected behind it, and what all prompts of a batch begin with once
            for all. The batch is packed as with `padding_free`, for the same loss and gradients. Models for which it is not exact are
            refused.
        max_batch_tokens (`int`, *optional*):
            With `padding_free` or `share_prompt`: the largest number of tokens that a device computes at a time. The pairs of
            `per_device_train_batch_size` are computed in as many parts as that takes, with the gradient of all of them. One pair may have
            more.

    Raises:
        `ValueError`: unknown `variant`, or a negative `alpha`.
    """

    variant: str = field(
        default="tdpo2",
        metadata={
            "help": "'tdpo1' or 'tdpo2'. The paper's code advises TDPO1 for a low learning rate and TDPO2 for a higher "
            "one.",
            "choices": ["tdpo1", "tdpo2"],
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the difference of the sequential KLs in TDPO2, at least 0; 0.5 is the paper's default. "
            "Larger values keep the policy closer to the reference; 0 is DPO. TDPO1 does not use it."
        },
    )
    share_prompt: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute the prompt of a pair once, with chosen and rejected behind it, and what all prompts of a batch "
            "begin with once for all. The batch is packed as with `padding_free`, for the same loss and gradients. Models for which "
            "it is not exact are refused."
        },
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With `padding_free` or `share_prompt`: the largest number of tokens that a device computes at a time. The pairs of "
            "`per_device_train_batch_size` are computed in as many parts as that takes, with the gradient of all of them."
        },
    )

    def __post_init__(self):
        if self.variant not in ("tdpo1", "tdpo2"):
            raise ValueError(f"`variant` must be 'tdpo1' or 'tdpo2', got {self.variant!r}.")
        if self.alpha < 0:
            raise ValueError(f"`alpha` must be at least 0, got {self.alpha}. 0 is DPO; the paper's default is 0.5.")
        super().__post_init__()
