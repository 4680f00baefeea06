"""
Sr-DPO and Sr-IPO (https://huggingface.co/papers/2405.21040) written out in float64 from full logits.

Conventions as in `tests/oracles/tdpo.py`: `2B` rows, chosen first; `logits[:, t]` is the distribution over
`labels[:, t]`. `Delta_pi` comes from the same responses after the augmented prompt `p + x`, whose tensors may have another
`T`. With `sg` the stop-gradient:

    Delta_pi(y_l, y_w; x) = beta [ logratio(y_w | p + x) - logratio(y_l | p + x) ]                      (eq. 12)
    u                     = beta logratio(y_w | x) - beta logratio(y_l | x)

    Sr-DPO = -log sigmoid( u - lambda sg[Delta_pi] )
    Sr-IPO = ( logratio(y_w | x) - logratio(y_l | x) - lambda sg[Delta_pi] - 1 / (2 beta) )^2

TRL divides each logratio of its IPO by the number of response tokens. That form is the same equation on means: pass
`length_normalized=True`, or means if a function takes sequence sums.
"""

import torch

from .losses import dpo
from .tdpo import logratio


def refinement_margin_from_logits(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float,
    length_normalized: bool = False,
) -> torch.Tensor:
    """`Delta_pi` of eq. 12, shape `(B,)`, from the logits under the augmented prompt. Not detached here."""
    logratios = logratio(policy_logits, ref_logits, labels, mask)
    if length_normalized:
        logratios = logratios / mask.sum(dim=1)
    logratio_w, logratio_l = logratios.chunk(2)
    return beta * (logratio_w - logratio_l)


def self_refine_losses(
    logratio_w: torch.Tensor,
    logratio_l: torch.Tensor,
    delta: torch.Tensor,
    *,
    beta: float,
    refinement_weight: float,
    loss_type: str,
) -> torch.Tensor:
    """The losses above from sequence sums (or means), shape `(B,)`."""
    shift = refinement_weight * delta.detach()
    if loss_type == "ipo":
        return (logratio_w - logratio_l - shift - 1 / (2 * beta)) ** 2
    return {"sigmoid": dpo}[loss_type](beta * logratio_w - beta * logratio_l - shift)


def self_refine_loss_from_logits(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    delta: torch.Tensor,
    *,
    length_normalized: bool = False,
    **options,
) -> torch.Tensor:
    """
    A loss of [`self_refine_losses`] given `Delta_pi`, one value per pair, shape `(B,)`. With `length_normalized` the caller
    gives a `Delta_pi` made of means, too.
    """
    logratios = logratio(policy_logits, ref_logits, labels, mask)
    if length_normalized:
        logratios = logratios / mask.sum(dim=1)
    return self_refine_losses(*logratios.chunk(2), delta, **options)
