from dataclasses import dataclass, field

from .token_level_config import TokenLevelConfig


# The prompt p of the paper (https://huggingface.co/papers/2405.21040)
REFINEMENT_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is the "
    "minimum. Query:"
)


@dataclass
class SelfRefineDPOConfig(TokenLevelConfig):
    r"""
    Configuration class for the [`SelfRefineDPOTrainer`].

    [`SelfRefineDPOConfig`] inherits every parameter from [`~trl.DPOConfig`] and adds those of Sr-DPO and Sr-IPO
    (https://huggingface.co/papers/2405.21040), TDPO's `variant`, and the keys of packing. `loss_type="sigmoid"` is Sr-DPO, `"ipo"` is Sr-IPO; TRL's other preference
    losses see the chosen log-ratio lowered in the same way.

    Parameters:
        refinement_weight (`float`, *optional*, defaults to `0.3`):
            Weight λ of the refinement function Δ, at least 0. The paper tries 0.1, 0.3, 0.5 and 1, finds 0 (plain DPO)
            worst and warns that too large a value hurts. 0.3, in the middle of its range, is our choice.
        refinement_prompt (`str`, *optional*, defaults to the paper's text):
            The prompt p that is put before the query to compute Δ.
        refinement_prompt_role (`str`, *optional*, defaults to `"user"`):
            Where p goes in a conversational sample: `"user"` puts it before the text of the first user message, the
            paper's p ⊕ x; `"system"` puts it before the system message, which is created if it is missing. Plain-text prompts
            accept only `"user"`, which puts p first.
        ipo_length_normalization (`bool`, *optional*, defaults to `True`):
            For `loss_type="ipo"`: whether log-ratios are means over the response's tokens, as TRL's IPO does with the
            IPO authors' consent (`True`), or sums, as the paper writes it (`False`).

    Raises:
        `ValueError`: a negative `refinement_weight` or `alpha`, or an unknown `refinement_prompt_role` or `variant`.
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
        metadata={
            "help": "The prompt p that is put before the query to compute the refinement function. Default: the paper's text."
        },
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
        super().__post_init__()
