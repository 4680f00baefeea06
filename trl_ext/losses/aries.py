"""
Weights of the rows in the refinement objective of ARIES (https://huggingface.co/papers/2502.05605):

    L_refine = (½ − β [r(y_w|y_l) − r(y_l|y_l)])² + (½ − β [r(y_w|y_w) − r(y_l|y_w)])²,  r(a|b) = log π(a|x, b, z) − log π_ref(a|x, b, z)

A pair has two of the squares, each β² times IPO's loss of a row whose prompt has a draft to refine.
"""


def row_weights(direct_rows: int, refinement_rows: int, *, alpha: float = 0.8) -> tuple[float, float]:
    r"""
    Compute the weights of a direct and of a refinement row that make the mean over a batch an unbiased estimate of
    `(1 − α) L_direct + α L_refine`, whichever rows are in it. `L_direct` is the mean over the direct rows, and `L_refine` twice the
    mean over the refinement rows, since a pair has two squares. The weights come from the dataset; those of a batch's own shares would
    make the estimate biased.

    Args:
        direct_rows, refinement_rows (`int`):
            Number of rows in an epoch.
        alpha (`float`, *optional*, defaults to `0.8`):
            The paper's α.

    Returns:
        `tuple[float, float]`: the weight of a direct row and of a refinement row.

    Raises:
        `ValueError`: a part of the objective with a weight above 0 has no rows.

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
