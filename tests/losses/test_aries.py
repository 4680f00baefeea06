"""The objective of ARIES against hand-worked numbers, IPO, the float64 transcription in `tests/oracles/aries.py`, and its expectation."""

from itertools import combinations

import pytest
import torch
from tests.oracles import aries as oracle
from tests.oracles.tdpo import logratio

from trl_ext.losses.aries import aries_loss, row_weights, squared_refinement_loss
from trl_ext.losses.self_refine import self_refine_dpo_loss


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The square


def test_by_hand():
    """
    β = 0.1. r(y_w|y_l) = 3, r(y_l|y_l) = 1: (0.5 − 0.2)² = 0.09. r(y_w|y_w) = −2, r(y_l|y_w) = 6: (0.5 + 0.8)² = 1.69. Their
    sum, the oracle's L_refine, is 1.78. At a margin of 1/(2β) = 5 the square is 0.
    """
    losses, chosen_rewards, rejected_rewards = squared_refinement_loss(double(3, -2, 5), double(1, 6, 0), beta=0.1)
    torch.testing.assert_close(losses, double(0.09, 1.69, 0))
    torch.testing.assert_close(chosen_rewards, double(0.3, -0.2, 0.5))
    torch.testing.assert_close(rejected_rewards, double(0.1, 0.6, 0))
    pair = oracle.refinement_loss(double(3), double(1), double(-2), double(6), beta=0.1)
    torch.testing.assert_close(pair, double(1.78))


def test_is_beta_squared_times_unnormalised_ipo():
    chosen, rejected = 5 * random(2, 7)
    ipo, _, _ = self_refine_dpo_loss(
        chosen, rejected, torch.zeros_like(chosen), beta=0.3, refinement_weight=0.0, loss_type="ipo"
    )
    torch.testing.assert_close(squared_refinement_loss(chosen, rejected, beta=0.3)[0], 0.3**2 * ipo)


def test_against_full_logits():
    """Value and gradient of a pair's two rows are those of its `L_refine`, with masked positions and NaN behind them."""
    sides = {}
    for seed, name in enumerate(("from_rejected", "from_chosen")):
        policy_logits, ref_logits = random(2, 6, 5, 11, seed=seed)  # three pairs, five positions, 11 tokens
        mask = (torch.arange(5) < torch.tensor([5, 3, 1, 2, 5, 4])[:, None]).long()
        policy_logits[mask == 0] = float("nan")
        sides[name] = {
            "policy_logits": policy_logits.requires_grad_(),
            "ref_logits": ref_logits,
            "labels": torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(seed)),
            "mask": mask,
        }
    expected = oracle.refinement_loss_from_logits(**sides, beta=0.3)
    logits = [side["policy_logits"] for side in sides.values()]
    expected_gradients = torch.autograd.grad(expected.sum(), logits)

    rows = [squared_refinement_loss(*logratio(**side).chunk(2), beta=0.3)[0] for side in sides.values()]
    torch.testing.assert_close(rows[0] + rows[1], expected)
    gradients = torch.autograd.grad((rows[0] + rows[1]).sum(), logits)
    for gradient, wanted, side in zip(gradients, expected_gradients, sides.values(), strict=True):
        inside = side["mask"].bool()
        assert wanted[inside].abs().max() > 0
        torch.testing.assert_close(gradient[inside], wanted[inside])


# The two parts together


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
    """Both losses of each row of two pairs, with the rows as often as their weights say, and the objective of the pairs."""
    direct, squares = random(2, seed=1), random(2, 2, seed=2)  # a direct loss and two squares per pair
    unused = double(float("nan"))  # the loss that the row is not for
    kinds = [(d, unused[0], 0) for d in direct] * direct_repeats
    kinds += [(unused[0], s, 1) for s in squares.flatten()] * refinement_repeats
    objective = oracle.total(direct, squares.sum(dim=1), alpha=0.7)
    direct_losses, refinement_losses, turns = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*kinds, strict=True)
    )
    return direct_losses, refinement_losses, turns, objective


@pytest.mark.parametrize("repeats", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_mean_over_all_batches_is_the_objective(repeats, batch_size):
    """Every batch that can be drawn, those with rows of one kind alone included: their mean is `L`, without bias."""
    *columns, objective = dataset(*repeats)
    _, _, turns = columns
    direct_weight, refinement_weight = row_weights(int((turns == 0).sum()), int((turns == 1).sum()), alpha=0.7)
    losses = aries_loss(*columns, direct_weight=direct_weight, refinement_weight=refinement_weight)
    assert losses.isfinite().all()
    batches = [losses[list(batch)].mean() for batch in combinations(range(len(losses)), batch_size)]
    torch.testing.assert_close(torch.stack(batches).mean(), objective)
