"""
`self_refine_dpo_loss` against hand-worked numbers, DPO's and IPO's limits and the float64 transcription in
`tests/oracles/self_refine.py`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import self_refine as oracle
from tests.oracles.tdpo import logratio

from trl_ext.losses.self_refine import self_refine_dpo_loss


LOSS_TYPES = ["sigmoid", "ipo"]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_sums(pairs: int = 5) -> list[torch.Tensor]:
    """Chosen and rejected log-ratios and the refinement margin, `(B,)` each, that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return [x.clone().requires_grad_() for x in 3 * torch.randn(3, pairs, generator=generator).double()]


def stock_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, loss_type: str) -> torch.Tensor:
    """DPO, and IPO on un-normalised log-ratios."""
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * (chosen - rejected))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


# By hand


@pytest.mark.parametrize(
    ("loss_type", "losses", "chosen_grad"),
    [
        ("sigmoid", (0.5803300, 0.8259394), (-0.0440286, -0.0562177)),
        ("ipo", (4.2436, 78.3225), (-4.12, -17.7)),
    ],
)
def test_by_hand(loss_type, losses, chosen_grad):
    """
    Two pairs, beta 0.1, lambda 0.3, so 1 / (2 beta) = 5.

    Pair 1: logratios 2 and -1, Delta 0.2: u = 0.3, lambda Delta = 0.06.
        Sr-DPO: 0.3 - 0.06 = 0.24,      ln(1 + e^-0.24) = ln 1.7866279 = 0.5803300
                d / d logratio(y_w) = -0.1 sigmoid(-0.24) = -0.0440286
        Sr-IPO: 3 - 0.06 - 5 = -2.06,   (-2.06)^2 = 4.2436, d / d logratio(y_w) = 2 (-2.06) = -4.12
    Pair 2: logratios -1 and 3, Delta -0.5: u = -0.4, lambda Delta = -0.15.
        Sr-DPO: -0.4 + 0.15 = -0.25,    ln(1 + e^0.25) = ln 2.2840254 = 0.8259394
                d / d logratio(y_w) = -0.1 sigmoid(0.25) = -0.0562177
        Sr-IPO: -4 + 0.15 - 5 = -8.85,  (-8.85)^2 = 78.3225, d / d logratio(y_w) = 2 (-8.85) = -17.7
    Rewards: 0.1 logratio.
    """
    chosen, rejected = double(2, -1).requires_grad_(), double(-1, 3).requires_grad_()
    actual, chosen_rewards, rejected_rewards = self_refine_dpo_loss(
        chosen, rejected, double(0.2, -0.5), beta=0.1, refinement_weight=0.3, loss_type=loss_type
    )
    torch.testing.assert_close(actual, double(*losses), atol=1e-7, rtol=0)
    torch.testing.assert_close(chosen_rewards, double(0.2, -0.1))
    torch.testing.assert_close(rejected_rewards, double(-0.1, 0.3))

    actual.sum().backward()
    torch.testing.assert_close(chosen.grad, double(*chosen_grad), atol=1e-7, rtol=0)
    torch.testing.assert_close(rejected.grad, -double(*chosen_grad), atol=1e-7, rtol=0)


def test_defaults():
    """beta 0.1, lambda 0.3, Sr-DPO: pair 1 of `test_by_hand`."""
    losses, _, _ = self_refine_dpo_loss(double(2), double(-1), double(0.2))
    torch.testing.assert_close(losses, double(0.5803300), atol=1e-7, rtol=0)


# Against the transcription


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("beta", "refinement_weight"), [(0.1, 0.3), (0.7, 1.0), (0.3, 0.1)])
def test_value_and_gradient_match_the_paper(loss_type, beta, refinement_weight):
    """
    Oracle: `tests/oracles/self_refine.py`, from the policy's logits under the plain and under the augmented prompt, both
    with a graph. The gradient reaches the plain logits and none the augmented ones.
    """
    pairs, tokens, vocabulary = 3, 7, 11
    generator = torch.Generator().manual_seed(1)
    policy, ref, augmented, augmented_ref = (
        2 * torch.randn(4, 2 * pairs, tokens, vocabulary, generator=generator).double()
    )
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    lengths = torch.tensor([7, 1, 4, 2, 6, 3])
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    upstream = torch.randn(pairs, generator=generator).double()

    expected_logits = policy.clone().requires_grad_()
    delta = oracle.refinement_margin_from_logits(augmented, augmented_ref, labels, mask, beta=beta)
    expected = oracle.self_refine_loss_from_logits(
        expected_logits,
        ref,
        labels,
        mask,
        delta,
        beta=beta,
        refinement_weight=refinement_weight,
        loss_type=loss_type,
    )
    expected.backward(upstream)

    logits, augmented_logits = policy.clone().requires_grad_(), augmented.clone().requires_grad_()
    delta = oracle.refinement_margin_from_logits(augmented_logits, augmented_ref, labels, mask, beta=beta)
    losses, _, _ = self_refine_dpo_loss(
        *logratio(logits, ref, labels, mask).chunk(2),
        delta,
        beta=beta,
        refinement_weight=refinement_weight,
        loss_type=loss_type,
    )
    losses.backward(upstream)

    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)
    assert augmented_logits.grad is None


# Limits


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_refinement_weight_zero_is_dpo_or_ipo(loss_type):
    """Limit: lambda 0 is DPO or (un-normalised) IPO, in value and gradient."""
    chosen, rejected, delta = random_sums()
    losses, _, _ = self_refine_dpo_loss(chosen, rejected, delta, beta=0.3, refinement_weight=0.0, loss_type=loss_type)
    losses.sum().backward()

    stock_chosen, stock_rejected = (x.detach().clone().requires_grad_() for x in (chosen, rejected))
    stock = stock_loss(stock_chosen, stock_rejected, beta=0.3, loss_type=loss_type)
    stock.sum().backward()
    torch.testing.assert_close(losses, stock, atol=0, rtol=0)
    torch.testing.assert_close(chosen.grad, stock_chosen.grad)
    torch.testing.assert_close(rejected.grad, stock_rejected.grad)


def test_empty_refinement_prompt_is_dpo_with_a_smaller_beta():
    """
    Limit (eq. 10): with p empty, Delta is DPO's own margin u, so Sr-DPO's value is DPO's at beta (1 - lambda). Without
    the stop-gradient its gradient would be that DPO's too; with it, the gradient is larger by 1 / (1 - lambda).
    """
    beta, refinement_weight = 0.5, 0.3
    chosen, rejected, _ = random_sums()
    losses, _, _ = self_refine_dpo_loss(
        chosen, rejected, beta * (chosen - rejected), beta=beta, refinement_weight=refinement_weight
    )
    losses.sum().backward()

    stock_chosen = chosen.detach().clone().requires_grad_()
    dpo = stock_loss(stock_chosen, rejected.detach(), beta=beta * (1 - refinement_weight), loss_type="sigmoid")
    dpo.sum().backward()
    torch.testing.assert_close(losses, dpo)
    torch.testing.assert_close(chosen.grad, stock_chosen.grad / (1 - refinement_weight))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_gradient_through_the_refinement_margin(loss_type):
    """PAPERS.md §2: Delta is always under stop-gradient, whether or not the caller detached it."""
    chosen, rejected, delta = random_sums()
    losses, _, _ = self_refine_dpo_loss(chosen, rejected, delta, loss_type=loss_type)
    losses.sum().backward()
    assert chosen.grad.abs().min() > 0
    assert delta.grad is None


def test_policy_equal_to_reference():
    """Limit: all log-ratios 0, so Sr-DPO is ln 2 and Sr-IPO is (1 / (2 beta))^2 = 25 at beta 0.1."""
    zeros = torch.zeros(4)
    assert torch.equal(self_refine_dpo_loss(zeros, zeros, zeros)[0], torch.full((4,), math.log(2)))
    torch.testing.assert_close(self_refine_dpo_loss(zeros, zeros, zeros, loss_type="ipo")[0], torch.full((4,), 25.0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rewards_are_dpos_and_detached(loss_type):
    """The rewards are beta logratio, without Delta and without a graph."""
    chosen, rejected, delta = random_sums()
    _, chosen_rewards, rejected_rewards = self_refine_dpo_loss(chosen, rejected, delta, beta=0.3, loss_type=loss_type)
    torch.testing.assert_close(chosen_rewards, 0.3 * chosen.detach())
    torch.testing.assert_close(rejected_rewards, 0.3 * rejected.detach())
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="hinge"):
        self_refine_dpo_loss(*[torch.zeros(1)] * 3, loss_type="hinge")
