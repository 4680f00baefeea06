from dataclasses import dataclass, field

from trl import DPOConfig


# The prompt p of the paper (https://huggingface.co/papers/2405.21040)
REFINEMENT_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is the "
    "minimum. Query:"
)


@dataclass
class SelfRefineDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`SelfRefineDPOTrainer`].

    [`SelfRefineDPOConfig`] inherits every parameter from [`~trl.DPOConfig`] and adds those of Sr-DPO and Sr-IPO
    (https://huggingface.co/papers/2405.21040). `loss_type="sigmoid"` is Sr-DPO, `"ipo"` is Sr-IPO; TRL's other preference
    losses see the chosen log-ratio lowered in the same way.

    Parameters:
        refinement_weight (`float`, *optional*, defaults to `0.3`):
            Weight λ of the refinement function Δ, at least 0. The paper tries 0.1, 0.3, 0.5 and 1, finds 0 (plain DPO)
            worst and warns that too large a value hurts; 0.3 lies in the middle of its range (our choice).
        refinement_prompt (`str`, *optional*, defaults to the paper's text):
            The prompt p put before the query for Δ.
        refinement_prompt_role (`str`, *optional*, defaults to `"user"`):
            Where p goes in a conversational sample: `"user"` puts it before the text of the first user message, the
            paper's p ⊕ x; `"system"` before the system message, which is created if there is none. Plain-text prompts
            take it in front, and only `"user"` is accepted for them.
        ipo_length_normalization (`bool`, *optional*, defaults to `True`):
            For `loss_type="ipo"`: whether log-ratios are means over the response's tokens, as TRL's IPO does with the
            IPO authors' consent (`True`), or sums, as the paper writes it (`False`).
        variant (`str`, *optional*):
            `"tdpo1"` or `"tdpo2"`: the log-ratios are raised by TDPO's KLs (https://huggingface.co/papers/2404.11999) as well. With
            `loss_type="sigmoid"`, `−log σ(u − TDPO's term − λ Δ)`.
        alpha (`float`, *optional*, defaults to `0.5`):
            TDPO2's α, as in [`TDPOConfig`]. Only used with `variant="tdpo2"`.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether to compute the prompt of a pair once, with chosen and rejected behind it, and what all prompts of a batch begin with once
            for all. The batch is packed as with `padding_free`, for the same loss and gradients. Models for which it is not exact are
            refused.
            The augmented prompts are computed once in any case.
        max_batch_tokens (`int`, *optional*):
            With `padding_free` or `share_prompt`: the largest number of tokens that a device computes at a time. The pairs of
            `per_device_train_batch_size` are computed in as many parts as that takes, with the gradient of all of them. One pair may have
            more.

    Raises:
        `ValueError`: a negative `refinement_weight` or `alpha`, an unknown `refinement_prompt_role` or `variant`.
    """

    refinement_weight: float = field(
        default=0.3,
        metadata={
            "help": "Weight λ of the refinement function, at least 0. The paper tries 0.1, 0.3, 0.5 and 1; 0 is plain "
            "DPO."
        },
    )
    refinement_prompt: str = field(
        default=REFINEMENT_PROMPT,
        metadata={"help": "The prompt p put before the query for the refinement function; default: the paper's text."},
    )
    refinement_prompt_role: str = field(
        default="user",
        metadata={
            "help": "Where the refinement prompt goes in a conversational sample: before the first user message "
            "('user', the paper's form) or before the system message ('system').",
            "choices": ["user", "system"],
        },
    )
    ipo_length_normalization: bool = field(
        default=True,
        metadata={
            "help": "For loss_type='ipo': whether log-ratios are means over the response's tokens, as in TRL (True), or "
            "sums, as the paper writes it (False)."
        },
    )
    variant: str | None = field(
        default=None,
        metadata={
            "help": "'tdpo1' or 'tdpo2': TDPO's KLs are added to the log-ratios as well.",
            "choices": ["tdpo1", "tdpo2"],
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={"help": "TDPO2's weight of the difference of the sequential KLs, with variant='tdpo2'."},
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
        if self.refinement_weight < 0:
            raise ValueError(
                f"`refinement_weight` must be at least 0, got {self.refinement_weight}. 0 is DPO; the paper's range is "
                "0.1 to 1."
            )
        if self.refinement_prompt_role not in ("user", "system"):
            raise ValueError(
                f"`refinement_prompt_role` must be 'user' or 'system', got {self.refinement_prompt_role!r}."
            )
        if self.variant not in (None, "tdpo1", "tdpo2"):
            raise ValueError(f"`variant` must be 'tdpo1', 'tdpo2' or left out, got {self.variant!r}.")
        if self.alpha < 0:
            raise ValueError(f"`alpha` must be at least 0, got {self.alpha}.")
        super().__post_init__()
