"""
Self-refined DPO and IPO (https://huggingface.co/papers/2405.21040) as a pure function of sequence sums.

In: per-pair log-ratios and the refinement margin Δ. Out: per-pair losses and rewards. How the prompt is augmented and
who computes Δ is not known here.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def self_refine_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    refinement_margin: torch.Tensor,
    *,
    beta: float = 0.1,
    refinement_weight: float = 0.3,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Sr-DPO (`"sigmoid"`) and Sr-IPO (`"ipo"`) losses of a batch of B preference pairs.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `log π(y|x) − log π_ref(y|x)` in nats. The paper's Sr-IPO takes sums over the response; TRL's IPO takes means
            over its tokens, and then `refinement_margin` must be made of means too.
        refinement_margin (`torch.Tensor` of shape `(B,)`):
            The refinement function Δ (Eq. 12), `β [logratio(y_w | p⊕x) − logratio(y_l | p⊕x)]`. Detached here.
        beta (`float`, *optional*, defaults to `0.1`):
            The paper's β.
        refinement_weight (`float`, *optional*, defaults to `0.3`):
            The paper's λ. `0` is DPO or IPO.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` or `"ipo"`.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B,)`: losses, chosen rewards, rejected rewards. The rewards are
        DPO's, `β logratio`, detached.

    Raises:
        `ValueError`: unknown `loss_type`.

    Example:

    ```python
    >>> zeros = torch.zeros(1)
    >>> self_refine_dpo_loss(zeros, zeros, zeros)[0]  # policy = reference: ln 2
    tensor([0.6931])
    ```
    """
    shift = refinement_weight * refinement_margin.detach()  # λ sg[Δ]
    logratio_margins = chosen_logratios - rejected_logratios
    if loss_type == "sigmoid":
        # Sr-DPO: −log σ(u − λ sg[Δ])
        losses = -F.logsigmoid(beta * logratio_margins - shift)
    elif loss_type == "ipo":
        # Sr-IPO: (logratio(y_w) − logratio(y_l) − λ sg[Δ] − 1/(2β))²
        losses = (logratio_margins - shift - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"Unknown loss type: {loss_type!r}. Should be 'sigmoid' or 'ipo'.")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
