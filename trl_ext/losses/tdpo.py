"""
Token-level DPO (https://huggingface.co/papers/2404.11999) as a pure function of sequence sums.

In: per-pair log-ratios and sequential KLs. Out: per-pair losses and the paper's rewards. How the sums are computed
from a model is not known here.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def sequential_kl_difference(
    chosen_position_kl: torch.Tensor,
    rejected_position_kl: torch.Tensor,
    *,
    alpha: float = 0.5,
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2",
) -> torch.Tensor:
    r"""
    What TDPO takes off DPO's margin, in nats and before the factor β: the paper's `δ` (TDPO1) or `α δ₂` (TDPO2).

    Args:
        chosen_position_kl, rejected_position_kl (`torch.Tensor` of shape `(B,)`), alpha (`float`, *optional*, defaults to `0.5`), variant (`str`, *optional*, defaults to `"tdpo2"`):
            As for [`tdpo_loss`].

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        `ValueError`: unknown `variant`.
    """
    if variant == "tdpo1":
        # TDPO1: −log σ(u − δ), δ = β SeqKL(x, y_l) − β SeqKL(x, y_w); the gradient flows through both KLs
        return rejected_position_kl - chosen_position_kl
    if variant == "tdpo2":
        # TDPO2: −log σ(u − α δ₂), δ₂ = β SeqKL(x, y_l) − sg[β SeqKL(x, y_w)]; the chosen KL is a baseline, so it
        # carries no gradient
        return alpha * (rejected_position_kl - chosen_position_kl.detach())
    raise ValueError(f"Unknown TDPO variant: {variant!r}. Should be 'tdpo1' or 'tdpo2'.")


def tdpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_position_kl: torch.Tensor,
    rejected_position_kl: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    TDPO1 and TDPO2 losses of a batch of B preference pairs.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `log π(y|x) − log π_ref(y|x)` in nats, summed over the response.
        chosen_position_kl, rejected_position_kl (`torch.Tensor` of shape `(B,)`):
            The paper's `SeqKL(x, y) = Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t))` in nats, summed over the response.
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the log-ratios and of the KLs, the paper's β.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the KL difference in TDPO2, the paper's α. `0` is DPO. TDPO1 does not use it.
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo1"` or `"tdpo2"`.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B,)`: losses, chosen rewards, rejected rewards. The rewards are the
        paper's `β (logratio + SeqKL)`, detached.

    Raises:
        `ValueError`: unknown `variant`.

    Example:

    ```python
    >>> zeros = torch.zeros(1)
    >>> tdpo_loss(zeros, zeros, zeros, zeros)[0]  # policy = reference: ln 2
    tensor([0.6931])
    ```
    """
    kl_difference = sequential_kl_difference(chosen_position_kl, rejected_position_kl, alpha=alpha, variant=variant)
    margins = beta * (chosen_logratios - rejected_logratios)  # (B,), the paper's u
    losses = -F.logsigmoid(margins - beta * kl_difference)
    chosen_rewards = beta * (chosen_logratios + chosen_position_kl).detach()
    rejected_rewards = beta * (rejected_logratios + rejected_position_kl).detach()
    return losses, chosen_rewards, rejected_rewards
