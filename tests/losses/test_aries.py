"""The weights of ARIES's objective against hand-worked numbers and its expectation; `tests/trainers/test_squared_refinement.py` has the losses."""

from itertools import combinations

import pytest
import torch
from tests.oracles import aries as oracle

from trl_ext.losses.aries import row_weights


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_oracle_by_hand():
    """
    β = 0.1. r(y_w|y_l) = 3, r(y_l|y_l) = 1: (0.5 − 0.2)² = 0.09. r(y_w|y_w) = −2, r(y_l|y_w) = 6: (0.5 + 0.8)² = 1.69. Their
    sum, the oracle's L_refine, is 1.78.
    """
    pair = oracle.refinement_loss(double(3), double(1), double(-2), double(6), beta=0.1)
    torch.testing.assert_close(pair, double(1.78))


def test_weights_by_hand():
    """
    Three pairs, direct rows twice: 6 direct and 6 refinement rows of 12. α = 0.8: 0.2 · 12/6 = 0.4 and 2 · 0.8 · 12/6 = 3.2.
    """
    assert row_weights(6, 6, alpha=0.8) == pytest.approx((0.4, 3.2))
    assert row_weights(0, 6, alpha=1.0) == (0.0, 2.0)
    assert row_weights(3, 6, alpha=1.0) == (0.0, 3.0)


@pytest.mark.parametrize("rows", [(0, 6), (6, 0)])
def test_a_part_without_rows_is_refused(rows):
    with pytest.raises(ValueError, match="needs rows of both kinds"):
        row_weights(*rows, alpha=0.8)


def dataset(direct_repeats: int, refinement_repeats: int):
    """The loss and the turn of each row of two pairs, with the rows as often as their weights say, and the objective of the pairs."""
    direct, squares = random(2, seed=1), random(2, 2, seed=2)  # a direct loss and two squares per pair
    kinds = [(d, 0) for d in direct] * direct_repeats + [(s, 1) for s in squares.flatten()] * refinement_repeats
    losses, turns = (torch.tensor(column, dtype=torch.float64) for column in zip(*kinds, strict=True))
    return losses, turns.long(), oracle.total(direct, squares.sum(dim=1), alpha=0.7)


@pytest.mark.parametrize("repeats", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_mean_over_all_batches_is_the_objective(repeats, batch_size):
    """Every batch that can be drawn, those with rows of one kind alone included: their mean is `L`, without bias."""
    losses, turns, objective = dataset(*repeats)
    weights = row_weights(int((turns == 0).sum()), int((turns == 1).sum()), alpha=0.7)
    losses = double(*weights)[turns] * losses
    batches = [losses[list(batch)].mean() for batch in combinations(range(len(losses)), batch_size)]
    torch.testing.assert_close(torch.stack(batches).mean(), objective)
