"""
TRL's preference losses written out in float64, as functions of the log-ratios of B pairs; from each paper's equation if there is one.

With `w` and `l` the log-ratios of the chosen and of the rejected response (shifted or not), `u = beta (w − l)`, `L(u) = −log sigmoid(u)`,
`epsilon` the label smoothing and `|y|` the number of tokens of a response:

    sigmoid (DPO, https://huggingface.co/papers/2305.18290)            L(u)
    hinge (SLiC, https://huggingface.co/papers/2305.10425)             max(0, 1 − u)
    ipo (https://huggingface.co/papers/2310.12036), on means           (w/|y_w| − l/|y_l| − 1/(2 beta))²
    exo_pair (EXO, https://huggingface.co/papers/2402.00856, eq. 16)   KL( (sigmoid(u), sigmoid(−u)) ‖ (1 − epsilon, epsilon) )
    nca_pair (NCA, https://huggingface.co/papers/2402.05369)           L(beta w) + ½ L(−beta w) + ½ L(−beta l)
    robust (rDPO, https://huggingface.co/papers/2403.00409)            [(1 − epsilon) L(u) − epsilon L(−u)] / (1 − 2 epsilon)
    bco_pair (BCO, https://huggingface.co/papers/2404.04656)           L(beta w) + L(−beta l)
    sppo_hard (SPPO, https://huggingface.co/papers/2405.00675)         (w − 1/(2 beta))² + (l + 1/(2 beta))²
    aot (AOT, https://huggingface.co/papers/2406.05882)                policy's and reference's margins, each sorted: smoothed L of the difference
    aot_unpaired                                                       w and l, each sorted: smoothed L of the difference
    apo_zero (APO, https://huggingface.co/papers/2408.06266, eq. 7)    1 − sigmoid(beta w) + sigmoid(beta l)
    apo_down (eq. 8)                                                   sigmoid(beta w) + 1 − sigmoid(u)
    discopop (https://huggingface.co/papers/2406.08414, eq. 5)         (1 − m) L(u) + m exp(−u), m = sigmoid(u / tau)
    sigmoid_norm (https://huggingface.co/papers/2411.15124, eq. 6)     L(beta (w/|y_w| − l/|y_l|))
"""

import torch


def dpo(u: torch.Tensor) -> torch.Tensor:
    """`L(u)`: the cross-entropy of a two-way softmax whose logits are `u` and 0."""
    return -torch.stack([u, torch.zeros_like(u)]).log_softmax(dim=0)[0]


def losses(
    loss_type: str,
    w: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    *,
    lengths: torch.Tensor,
    ref_margins: torch.Tensor,
    beta: float,
    epsilon: float = 0.0,
    tau: float = 0.05,
    of_sums: bool = False,
) -> torch.Tensor:
    """
    The losses above, shape `(B,)`. `lengths` are `(2, B)`, `ref_margins` the reference's `log π_ref(y_w) − log π_ref(y_l)`, `(B,)`, and
    `of_sums` leaves the lengths out of IPO.
    """
    if loss_type in ("ipo", "sigmoid_norm") and not of_sums:
        w, l = w / lengths[0], l / lengths[1]  # noqa: E741
    u = beta * (w - l)
    smoothed = {
        "aot": lambda: (w - l + ref_margins).sort().values - ref_margins.sort().values,
        "aot_unpaired": lambda: w.sort().values - l.sort().values,
    }
    if loss_type in smoothed:
        delta = beta * smoothed[loss_type]()
        return (1 - epsilon) * dpo(delta) + epsilon * dpo(-delta)
    if loss_type == "exo_pair":
        log_policy = torch.stack([u, torch.zeros_like(u)]).log_softmax(dim=0)  # (2, B)
        log_preference = torch.tensor([1 - epsilon, epsilon], dtype=u.dtype).log().unsqueeze(1)
        return (log_policy.exp() * (log_policy - log_preference)).sum(dim=0)
    modulation = torch.sigmoid(u / tau)
    return {
        "sigmoid": lambda: dpo(u),
        "sigmoid_norm": lambda: dpo(u),
        "hinge": lambda: torch.where(u < 1, 1 - u, 0 * u),
        "ipo": lambda: (w - l - 1 / (2 * beta)) ** 2,
        "nca_pair": lambda: dpo(beta * w) + dpo(-beta * w) / 2 + dpo(-beta * l) / 2,
        "robust": lambda: ((1 - epsilon) * dpo(u) - epsilon * dpo(-u)) / (1 - 2 * epsilon),
        "bco_pair": lambda: dpo(beta * w) + dpo(-beta * l),
        "sppo_hard": lambda: (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * w) + torch.sigmoid(beta * l),
        "apo_down": lambda: torch.sigmoid(beta * w) + 1 - torch.sigmoid(u),
        "discopop": lambda: (1 - modulation) * dpo(u) + modulation * torch.exp(-u),
    }[loss_type]()
