from dataclasses import dataclass, field

from trl import DPOConfig


@dataclass
class TokenLevelConfig(DPOConfig):
    r"""
    What the configurations of both trainers add to [`~trl.DPOConfig`].

    Parameters:
        variant (`str`, *optional*):
            `"tdpo1"` or `"tdpo2"`: the log-ratios are raised by TDPO's KLs (https://huggingface.co/papers/2404.11999). With
            `loss_type="sigmoid"`, `−log σ(u − TDPO's term − λ Δ)`.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight α of the difference of the sequential KLs in TDPO2, at least 0; 0.5 is the paper's default. Larger
            values keep the policy closer to the reference; `0` is DPO. Only used with `variant="tdpo2"`.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether to compute the prompt of a pair once, with chosen and rejected behind it, and what all prompts of a batch begin with once
            for all. The batch is packed as with `padding_free`, for the same loss and gradients. Models for which it is not exact are
            refused. Sr-DPO computes its augmented prompts once in any case.
        max_batch_tokens (`int`, *optional*):
            With `padding_free` or `share_prompt`: the largest number of tokens that a device computes at a time. The pairs of
            `per_device_train_batch_size` are computed in as many parts as that takes, with the gradient of all of them. One pair may have
            more.

    Raises:
        `ValueError`: an unknown `variant`, or a negative `alpha`.
    """

    variant: str | None = field(
        default=None,
        metadata={
            "help": "'tdpo1' or 'tdpo2': TDPO's KLs are added to the log-ratios.",
            "choices": ["tdpo1", "tdpo2"],
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the difference of the sequential KLs in TDPO2, at least 0; 0.5 is the paper's default. "
            "Larger values keep the policy closer to the reference; 0 is DPO. Only used with variant='tdpo2'."
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
        if self.variant not in (type(self).variant, "tdpo1", "tdpo2"):
            raise ValueError(f"`variant` must be 'tdpo1' or 'tdpo2', got {self.variant!r}.")
        if self.alpha < 0:
            raise ValueError(f"`alpha` must be at least 0, got {self.alpha}. 0 is DPO; the paper's default is 0.5.")
        super().__post_init__()
