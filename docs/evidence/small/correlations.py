"""
Pearson's, Spearman's and Kendall's correlation, for lists with ties. In: two sequences of equal length. Out: a number in [-1, 1], NaN where
one of them is constant.
"""

from collections.abc import Sequence

import numpy as np


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    x, y = (np.asarray(v, dtype=float) for v in (x, y))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the least; ties share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    return pearson(ranks(x), ranks(y))


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """τ-b: pairs of the same order less pairs of opposite order, over the geometric mean of those not tied in x and in y."""
    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)))
    scale = np.sqrt((x != 0).sum() * float((y != 0).sum()))
    return float((x * y).sum() / scale) if scale > 0 else float("nan")
