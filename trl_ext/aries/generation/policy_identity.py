"""
Finds out whether log-probabilities are a policy's own, or those of another that was mistaken for it.
"""

import math
from typing import Any

import torch


# Another policy counts if its log-probabilities differ from the policy's by this many standard errors of the rounding
DISTINGUISHABLE = 8.0


def root_mean_square(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def compare(
    found: torch.Tensor, policy: torch.Tensor, others: dict[str, torch.Tensor], tolerance: float
) -> dict[str, Any]:
    """
    Decide whose log-probabilities these are.

    Args:
        found (`torch.Tensor` of shape `(N,)`):
            Log-probabilities of N tokens, in nats, of unknown origin.
        policy (`torch.Tensor` of shape `(N,)`):
            Those of the policy that they should be from.
        others (`dict[str, torch.Tensor]` of shape `(N,)`):
            Those of the policies that they might be from by mistake, by name.
        tolerance (`float`):
            Largest root mean square of `found − policy`.

    Returns:
        `dict`: `difference`, the root mean square of `found − policy`; `tolerance`; `others`, for each its `difference` from `found`,
        and `distinguishable`, whether it differs from the policy by more than rounding hides; and `fault`: `None`, the name of
        the nearer other policy, or `"tolerance"`.

    Example:

    ```python
    >>> policy, base = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    >>> compare(base + 1e-6, policy, {"base": base}, tolerance=0.01)["fault"]
    'base'
    ```
    """
    difference = root_mean_square(found, policy)
    measured: dict[str, Any] = {"difference": difference, "tolerance": tolerance, "others": {}, "fault": None}
    nearest = difference
    for name, other in others.items():
        from_other, apart = root_mean_square(found, other), root_mean_square(policy, other)
        # Of N independent errors of this size, the mean that decides between the two has a standard error 1/√N as large
        distinguishable = apart * math.sqrt(len(found)) > DISTINGUISHABLE * min(difference, from_other)
        measured["others"][name] = {"difference": from_other, "distinguishable": distinguishable}
        if distinguishable and from_other < nearest:
            measured["fault"], nearest = name, from_other
    if measured["fault"] is None and not difference <= tolerance:  # NaN is no parity either
        measured["fault"] = "tolerance"
    return measured


# What the other policies are called in a sentence
POLICY_NAMES = {
    "base": "the model without an adapter",
    "initial": "the policy before round 1",
    "previous": "the policy of the round before",
}
