"""
The objective of ARIES (https://huggingface.co/papers/2502.05605) with the squared refinement loss, written out in float64 from
full logits.

Conventions as in `tests/oracles/tdpo.py`. The answers of B pairs are read under three prompts: `x`, `(x, y_l, z)` and
`(x, y_w, z)`; z is the refinement template. With `logratio(a | prompt)` summed over the answer's tokens:

    r(a | b) = log pi(a | x, b, z) - log pi_ref(a | x, b, z)
    L_refine = ( 1/2 - beta [ r(y_w | y_l) - r(y_l | y_l) ] )^2  +  ( 1/2 - beta [ r(y_w | y_w) - r(y_l | y_w) ] )^2
    L        = (1 - alpha) mean L_direct  +  alpha mean L_refine           (means over pairs)
"""

import torch

from .tdpo import logratio


def refinement_loss(
    r_w_given_l: torch.Tensor,
    r_l_given_l: torch.Tensor,
    r_w_given_w: torch.Tensor,
    r_l_given_w: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """`L_refine` of each pair, shape `(B,)`."""
    from_rejected = 1 / 2 - beta * (r_w_given_l - r_l_given_l)
    from_chosen = 1 / 2 - beta * (r_w_given_w - r_l_given_w)
    return from_rejected**2 + from_chosen**2


def refinement_loss_from_logits(from_rejected: dict, from_chosen: dict, *, beta: float) -> torch.Tensor:
    """
    `L_refine` of each pair, shape `(B,)`. Each argument has `policy_logits`, `ref_logits`, `labels` and `mask` of the same
    pairs, under the prompt with the rejected and with the chosen draft.
    """
    given_l, given_w = logratio(**from_rejected).chunk(2), logratio(**from_chosen).chunk(2)
    return refinement_loss(*given_l, *given_w, beta=beta)


def total(direct_losses: torch.Tensor, refinement_losses: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """`L`, a scalar, from one direct loss and one `L_refine` per pair."""
    return (1 - alpha) * direct_losses.mean() + alpha * refinement_losses.mean()
