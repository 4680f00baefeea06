"""
Quality-aware self-refined DPO and IPO, Sr-DPO and Sr-IPO (https://huggingface.co/papers/2405.21040), and the same shift of
the margin in TRL's other losses of the margin, as a pure function of log-ratios.

In: per-pair log-ratios and the refinement margin. Out: per-pair losses and DPO's rewards. How they are computed from a
model, and for which prompt, is not known here.
"""

import torch
import torch.nn.functional as F


# The losses of TRL that are functions of the margin β (logratio(y_w) − logratio(y_l)) alone
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")


def self_refine_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    refinement_margin: torch.Tensor,
    *,
    beta: float = 0.1,
    refinement_weight: float = 0.3,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    kl_difference: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Losses of a batch of B preference pairs, whose margin is lowered by `λ Δ`.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `log π(y|x) − log π_ref(y|x)` in nats. The paper's Sr-IPO takes sums over the response; TRL's `"ipo"` and
            `"sigmoid_norm"` take means over its tokens, and then `refinement_margin` must be made of means too.
        refinement_margin (`torch.Tensor` of shape `(B,)`):
            The refinement function Δ (Eq. 12), `β [logratio(y_w | p⊕x) − logratio(y_l | p⊕x)]`. Detached here.
        beta (`float`, *optional*, defaults to `0.1`):
            The paper's β.
        refinement_weight (`float`, *optional*, defaults to `0.3`):
            The paper's λ. `0` is TRL's loss of the same name.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            One of [`LOSS_TYPES`]: `"sigmoid"` is Sr-DPO, `"ipo"` is Sr-IPO, and in the others, which the paper does not
            have, the margin `u` is replaced by `u − λ Δ` as in Sr-DPO.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For `"exo_pair"` and `"robust"`.
        discopop_tau (`float`, *optional*, defaults to `0.05`):
            For `"discopop"`.
        kl_difference (`torch.Tensor` of shape `(B,)`, *optional*):
            TDPO's term, [`~losses.tdpo.sequential_kl_difference`], in nats: the margin is lowered by β times it as well.

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
    logratio_margins = chosen_logratios - rejected_logratios - kl_difference

    def margins() -> torch.Tensor:
        # Made anew where TRL multiplies by β anew: so gradients are summed in TRL's order, to the last bit
        return beta * logratio_margins - shift  # u − λ sg[Δ]

    if loss_type in ("sigmoid", "sigmoid_norm"):
        # Sr-DPO: −log σ(u − λ sg[Δ])
        losses = -F.logsigmoid(margins())
    elif loss_type == "ipo":
        # Sr-IPO: (logratio(y_w) − logratio(y_l) − λ sg[Δ] − 1/(2β))²
        losses = (logratio_margins - shift - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - margins())
    elif loss_type == "exo_pair":
        epsilon = torch.tensor(label_smoothing, device=logratio_margins.device)
        q_chosen, log_q_chosen = torch.sigmoid(margins()), F.logsigmoid(margins())
        q_rejected, log_q_rejected = torch.sigmoid(-margins()), F.logsigmoid(-margins())
        losses = q_chosen * (log_q_chosen - torch.log1p(-epsilon)) + q_rejected * (log_q_rejected - torch.log(epsilon))
    elif loss_type == "robust":
        clean = -(1 - label_smoothing) * F.logsigmoid(margins())
        flipped = -label_smoothing * F.logsigmoid(-margins())
        losses = (clean - flipped) / (1 - 2 * label_smoothing)
    elif loss_type == "discopop":
        logits = margins()
        modulation = torch.sigmoid(logits / discopop_tau)
        losses = -F.logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation
    else:
        raise ValueError(f"Unknown loss type: {loss_type!r}. Should be one of {list(LOSS_TYPES)}.")
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
