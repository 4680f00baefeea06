"""
The refinement objective of ARIES (https://huggingface.co/papers/2502.05605) as pure functions of log-ratios.

In: log-ratios of pairs whose prompt asks to refine a draft, and what the pairs' own loss is for direct answering. Out:
per-row losses, weighted so that a mean over rows estimates the paper's total. How the log-ratios are computed from a model is not
known here.
"""

import torch


def squared_refinement_loss(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, *, beta: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    One square of the refinement loss for each of B rows. With `r(a|b) = log π(a|x, b, z) − log π_ref(a|x, b, z)`, a pair has two of
    them, `L_refine = (½ − β [r(y_w|y_l) − r(y_l|y_l)])² + (½ − β [r(y_w|y_w) − r(y_l|y_w)])²`: a row from each draft.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B,)`):
            `r(y_w|draft)` and `r(y_l|draft)` in nats, summed over the response.
        beta (`float`, *optional*, defaults to `0.1`):
            The paper's β.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B,)`: losses, chosen rewards, rejected rewards. The rewards are DPO's,
        `β logratio`, detached.

    Example:

    ```python
    >>> zeros = torch.zeros(1)
    >>> squared_refinement_loss(zeros, zeros)[0]  # policy = reference: ¼
    tensor([0.2500])
    ```
    """
    # β² times IPO's (logratio margin − 1/(2β))², on sums over the response
    losses = (0.5 - beta * (chosen_logratios - rejected_logratios)) ** 2
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def row_weights(direct_rows: int, refinement_rows: int, *, alpha: float = 0.8) -> tuple[float, float]:
    r"""
    Weights of a direct and of a refinement row with which the mean over a batch is an unbiased estimate of
    `(1 − α) L_direct + α L_refine`, whichever rows are in it: `L_direct` is the mean over the direct rows, and `L_refine` twice the
    mean over the refinement rows, since a pair has two squares. The weights come from the dataset, not from the batch, whose
    own shares would make the estimate biased.

    Args:
        direct_rows, refinement_rows (`int`):
            Rows of the dataset, each as often as an epoch shows it.
        alpha (`float`, *optional*, defaults to `0.8`):
            The paper's α.

    Returns:
        `tuple[float, float]`: the weight of a direct row and of a refinement row.

    Raises:
        `ValueError`: a part of the objective has no rows.

    Example:

    ```python
    >>> row_weights(1, 2, alpha=0.5)  # a row of each kind: the mean of 1.5 d, 1.5 r₁, 1.5 r₂ is ½ d + ½ (r₁ + r₂)
    (1.5, 1.5)
    ```
    """
    if refinement_rows == 0 or (direct_rows == 0 and alpha < 1):
        raise ValueError(
            f"(1 − α) L_direct + α L_refine with α = {alpha} needs rows of both kinds; there are {direct_rows} direct and "
            f"{refinement_rows} refinement rows."
        )
    rows = direct_rows + refinement_rows
    direct_weight = (1 - alpha) * rows / direct_rows if direct_rows > 0 else 0.0
    return direct_weight, 2 * alpha * rows / refinement_rows


def aries_loss(
    direct_losses: torch.Tensor,
    refinement_losses: torch.Tensor,
    turns: torch.Tensor,
    *,
    direct_weight: float,
    refinement_weight: float,
) -> torch.Tensor:
    r"""
    The weighted loss of each of B rows: the preference loss where the row is for direct answering, the square where it is for
    refining.

    Args:
        direct_losses, refinement_losses (`torch.Tensor` of shape `(B,)`):
            Both losses of every row.
        turns (`torch.Tensor` of shape `(B,)`):
            0 for direct answering, 1 for refining.
        direct_weight, refinement_weight (`float`):
            From [`row_weights`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return torch.where(turns == 0, direct_weight * direct_losses, refinement_weight * refinement_losses)
