"""
Sr-DPO and Sr-IPO (https://huggingface.co/papers/2405.21040) written out in float64 from full logits, and the other losses
of DPO's margin with the margin lowered in the same way.

Conventions as in `tests/oracles/tdpo.py`: `2B` rows, chosen first; `logits[:, t]` is the distribution over
`labels[:, t]`. `Delta_pi` comes from the same responses after the augmented prompt `p + x`, whose tensors may have another
`T`. With `sg` the stop-gradient:

    Delta_pi(y_l, y_w; x) = beta [ logratio(y_w | p + x) - logratio(y_l | p + x) ]                      (eq. 12)
    u                     = beta logratio(y_w | x) - beta logratio(y_l | x)

    Sr-DPO = -log sigmoid( u - lambda sg[Delta_pi] )
    Sr-IPO = ( logratio(y_w | x) - logratio(y_l | x) - lambda sg[Delta_pi] - 1 / (2 beta) )^2

TRL divides each logratio of its IPO by the number of response tokens. That form is the same equation on means: pass
`length_normalized=True`, or means where a function takes sequence sums.

Below, `u` stands for `u - lambda sg[Delta_pi]`, and `L(u) = -log sigmoid(u)`:

    hinge (SLiC, https://huggingface.co/papers/2305.10425; RSO, https://huggingface.co/papers/2309.06657)
        max(0, 1 - u)
    exo_pair (EXO, https://huggingface.co/papers/2402.00856, eq. 16), epsilon the label smoothing
        KL( (sigmoid(u), sigmoid(-u)) || (1 - epsilon, epsilon) )
    robust (rDPO, https://huggingface.co/papers/2403.00409), epsilon the rate of flipped preferences
        [ (1 - epsilon) L(u) - epsilon L(-u) ] / (1 - 2 epsilon)
    discopop (DiscoPOP's log-ratio modulated loss, https://huggingface.co/papers/2406.08414, eq. 5)
        (1 - sigmoid(u / tau)) L(u) + sigmoid(u / tau) exp(-u)
    sigmoid_norm (length-normalized DPO, https://huggingface.co/papers/2411.15124, eq. 6)
        L(u), with the means of the responses in u and in Delta_pi
    TDPO (tests/oracles/tdpo.py), delta its term for the variant
        L(u - delta)
"""

import torch

from .tdpo import logratio, sequence_kl


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


def dpo_loss(u: torch.Tensor) -> torch.Tensor:
    """`L(u)`: the cross-entropy of a two-way softmax whose logits are `u` and 0."""
    return -torch.stack([u, torch.zeros_like(u)]).log_softmax(dim=0)[0]


def exo_loss(u: torch.Tensor, epsilon: float) -> torch.Tensor:
    """EXO for two responses: the reverse KL from the smoothed preference to the policy's."""
    log_policy = torch.stack([u, torch.zeros_like(u)]).log_softmax(dim=0)  # (2, B)
    log_preference = torch.tensor([1 - epsilon, epsilon], dtype=u.dtype).log().unsqueeze(1)  # (2, 1)
    return (log_policy.exp() * (log_policy - log_preference)).sum(dim=0)


def robust_loss(u: torch.Tensor, epsilon: float) -> torch.Tensor:
    """rDPO, the unbiased estimate of DPO's loss under flips."""
    return ((1 - epsilon) * dpo_loss(u) - epsilon * dpo_loss(-u)) / (1 - 2 * epsilon)


def discopop_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """DiscoPOP's log-ratio modulated loss."""
    modulation = 1 / (1 + torch.exp(-u / tau))
    return (1 - modulation) * dpo_loss(u) + modulation * torch.exp(-u)


def self_refine_losses(
    logratio_w: torch.Tensor,
    logratio_l: torch.Tensor,
    delta: torch.Tensor,
    *,
    beta: float,
    refinement_weight: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> torch.Tensor:
    """The losses above from sequence sums (or means), shape `(B,)`."""
    shift = refinement_weight * delta.detach()
    if loss_type == "ipo":
        return (logratio_w - logratio_l - shift - 1 / (2 * beta)) ** 2
    u = beta * logratio_w - beta * logratio_l - shift
    return {
        "sigmoid": lambda: dpo_loss(u),
        "sigmoid_norm": lambda: dpo_loss(u),
        "hinge": lambda: torch.where(u < 1, 1 - u, 0 * u),
        "exo_pair": lambda: exo_loss(u, label_smoothing),
        "robust": lambda: robust_loss(u, label_smoothing),
        "discopop": lambda: discopop_loss(u, discopop_tau),
    }[loss_type]()


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


def self_refine_tdpo_loss_from_logits(
    policy_logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    delta: torch.Tensor,
    *,
    beta: float,
    refinement_weight: float,
    alpha: float,
    variant: str,
) -> torch.Tensor:
    """TDPO with the refinement margin: `-log sigmoid( u - TDPO's term - lambda sg[Delta_pi] )`, shape `(B,)`."""
    logratio_w, logratio_l = logratio(policy_logits, ref_logits, labels, mask).chunk(2)
    kl_w, kl_l = sequence_kl(policy_logits, ref_logits, mask).chunk(2)
    if variant == "tdpo1":
        tdpo_term = beta * kl_l - beta * kl_w
    elif variant == "tdpo2":
        tdpo_term = alpha * (beta * kl_l - (beta * kl_w).detach())
    else:
        raise ValueError(variant)
    u = beta * logratio_w - beta * logratio_l
    return dpo_loss(u - tdpo_term - refinement_weight * delta.detach())
