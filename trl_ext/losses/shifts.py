"""
The shifts that TDPO and self-refined DPO add to the log-ratios of a pair, in nats, as pure functions of sequence sums. The loss on the
shifted log-ratios is TRL's DPO.
"""

from typing import Literal

import torch


def tdpo_shifts(
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    alpha: float = 0.5,
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Token-level DPO (https://huggingface.co/papers/2404.11999): the log-ratios are raised by the sequential KLs.

    The paper subtracts `δ = SeqKL(y_l) − SeqKL(y_w)` from the log-ratios' difference, TDPO2 `α (SeqKL(y_l) − sg[SeqKL(y_w)])`, before the
    factor β. Adding each response's own KL gives the same difference, and the paper's reward `β (logratio + SeqKL)`.

    Args:
        chosen_kl, rejected_kl (`torch.Tensor` of shape `(B,)`):
            `SeqKL(x, y) = Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t))` in nats, summed over the response.
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the KLs in TDPO2, the paper's α. `0` is DPO. TDPO1 does not use it.
        variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo1"` or `"tdpo2"`.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B,)`: the shifts of the chosen and of the rejected responses, in nats.

    Raises:
        `ValueError`: unknown `variant`.

    Example:

    ```python
    >>> tdpo_shifts(torch.tensor([2.0]), torch.tensor([4.0]), alpha=0.5)
    (tensor([1.]), tensor([2.]))
    ```
    """
    if variant == "tdpo1":
        # TDPO1: the gradient flows through both KLs
        return chosen_kl, rejected_kl
    if variant == "tdpo2":
        # TDPO2: the chosen KL is a baseline, so it carries no gradient
        return alpha * chosen_kl.detach(), alpha * rejected_kl
    raise ValueError(f"Unknown TDPO variant: {variant!r}. Should be 'tdpo1' or 'tdpo2'.")


def self_refine_shifts(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float = 0.1,
    refinement_weight: float = 0.3,
    loss_type: str = "sigmoid",
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    r"""
    Self-refined DPO and IPO (https://huggingface.co/papers/2405.21040): the chosen response's log-ratio is lowered by `λ Δ`.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `logratio(y | p⊕x)` in nats, summed over the response. Detached here.
        beta (`float`, *optional*, defaults to `0.1`):
            The paper's β.
        refinement_weight (`float`, *optional*, defaults to `0.3`):
            The paper's λ. `0` is DPO.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"ipo"` is Sr-IPO, whose `λ Δ` is not divided by β. Any other type subtracts it from the margin `u`, as Sr-DPO does.
        lengths (`torch.Tensor` of shape `(2, B)`, *optional*):
            Numbers of tokens, for a loss of means over tokens: Δ is then made of means, and multiplied by the length by which the loss
            will divide.

    Returns:
        `tuple` of a `torch.Tensor` of shape `(B,)` and 0: the shifts of the chosen and of the rejected responses, in nats.

    Example:

    ```python
    >>> self_refine_shifts(torch.tensor([3.0]), torch.tensor([1.0]), refinement_weight=0.5)
    (tensor([-1.]), 0.0)
    ```
    """
    chosen_lengths, rejected_lengths = (1.0, 1.0) if lengths is None else lengths
    # Δ (Eq. 12): β [logratio(y_w | p⊕x) − logratio(y_l | p⊕x)], always under stop-gradient
    delta = beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths).detach()
    # Sr-DPO: −log σ(u − λ sg[Δ]), and u is β times the log-ratios. Sr-IPO: (logratio(y_w) − logratio(y_l) − λ sg[Δ] − 1/(2β))²
    margin = refinement_weight * delta if loss_type == "ipo" else refinement_weight * delta / beta
    return -margin * chosen_lengths, 0.0
