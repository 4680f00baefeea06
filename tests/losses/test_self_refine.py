"""
`self_refine_dpo_loss` against hand-worked numbers, the limits in which it is TRL's loss and the float64 transcription in
`tests/oracles/self_refine.py`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import self_refine as oracle
from tests.oracles.tdpo import logratio, sequence_kl

from trl_ext.losses.self_refine import LOSS_TYPES, self_refine_dpo_loss
from trl_ext.losses.tdpo import sequential_kl_difference, tdpo_loss


# Each loss type with the options it reads
LOSSES = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.5},
    "sigmoid_norm": {},
}
each_loss = pytest.mark.parametrize("loss_type", LOSSES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_sums(pairs: int = 5) -> list[torch.Tensor]:
    """Chosen and rejected log-ratios and the refinement margin, `(B,)` each, that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return [x.clone().requires_grad_() for x in 3 * torch.randn(3, pairs, generator=generator).double()]


def random_logits(count: int, pairs: int = 3, tokens: int = 7, vocabulary: int = 11) -> tuple:
    """`count` logits, `(2B, T, V)`, and their labels and ragged mask, `(2B, T)`."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(count, 2 * pairs, tokens, vocabulary, generator=generator).double()
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    lengths = torch.tensor([7, 1, 4, 2, 6, 3])
    return *logits, labels, (torch.arange(tokens) < lengths.unsqueeze(1)).long()


def test_every_loss_type_is_in_the_table():
    assert set(LOSSES) == set(LOSS_TYPES)


# By hand


@pytest.mark.parametrize(
    ("loss_type", "losses", "chosen_grad"),
    [
        ("sigmoid", (0.5803300, 0.8259394), (-0.0440286, -0.0562177)),
        ("sigmoid_norm", (0.5803300, 0.8259394), (-0.0440286, -0.0562177)),
        ("ipo", (4.2436, 78.3225), (-4.12, -17.7)),
        ("hinge", (0.76, 1.25), (-0.1, -0.1)),
        ("exo_pair", (0.3867698, 0.6551932), (-0.0482327, -0.0602345)),
        ("robust", (0.5503300, 0.8571894), (-0.0565286, -0.0687177)),
        ("discopop", (0.7077701, 0.9988855), (-0.0556810, -0.0619400)),
    ],
)
def test_by_hand(loss_type, losses, chosen_grad):
    """
    Two pairs, beta 0.1, lambda 0.3, so 1 / (2 beta) = 5; label smoothing 0.1 and DiscoPOP's tau 0.5. The gradient is that of
    logratio(y_w): 0.1 d / d u, but for IPO.

    Pair 1: logratios 2 and -1, Delta 0.2: u = 0.3 - lambda Delta = 0.3 - 0.06 = 0.24.
        sigmoid     ln(1 + e^-0.24) = ln 1.7866279 = 0.5803300; d / d u = -sigmoid(-0.24) = -0.4402864
        ipo         (3 - 0.06 - 5)^2 = (-2.06)^2 = 4.2436; d / d logratio(y_w) = 2 (-2.06) = -4.12
        hinge       1 - 0.24 = 0.76; d / d u = -1
        exo_pair    q = sigmoid(0.24) = 0.5597136: q ln(q / 0.9) + (1 - q) ln((1 - q) / 0.1) = -0.2658532 + 0.6526230
                    = 0.3867698; d / d u = q (1 - q) (0.24 - ln 9) = 0.2464343 (-1.9572246) = -0.4823272
        robust      [0.9 (0.5803300) - 0.1 (0.8203300)] / 0.8 = 0.5503300;
                    d / d u = -[0.9 (0.4402864) + 0.1 (0.5597136)] / 0.8 = -0.5652864
        discopop    m = sigmoid(0.48) = 0.6177479: (1 - m) 0.5803300 + m e^-0.24 = 0.2218324 + 0.4859377 = 0.7077701;
                    d / d u = m (1 - m) / 0.5 (e^-0.24 - 0.5803300) - (1 - m) 0.4402864 - m e^-0.24
                    = 0.0974274 - 0.1682999 - 0.4859377 = -0.5568096 (to rounding)
    Pair 2: logratios -1 and 3, Delta -0.5: u = -0.4 + 0.15 = -0.25.
        sigmoid     ln(1 + e^0.25) = ln 2.2840254 = 0.8259394; d / d u = -sigmoid(0.25) = -0.5621765
        ipo         (-4 + 0.15 - 5)^2 = (-8.85)^2 = 78.3225; d / d logratio(y_w) = 2 (-8.85) = -17.7
        hinge       1 + 0.25 = 1.25; d / d u = -1
        exo_pair    q = 0.4378235: -0.3154818 + 0.9706751 = 0.6551932; d / d u = 0.2461341 (-2.4472246) = -0.6023454
        robust      [0.9 (0.8259394) - 0.1 (0.5759394)] / 0.8 = 0.8571894;
                    d / d u = -[0.9 (0.5621765) + 0.1 (0.4378235)] / 0.8 = -0.6871765
        discopop    m = sigmoid(-0.5) = 0.3775407: 0.5141137 + 0.4847718 = 0.9988855; d / d u = -0.6194000
    Rewards: 0.1 logratio.
    """
    chosen, rejected = double(2, -1).requires_grad_(), double(-1, 3).requires_grad_()
    actual, chosen_rewards, rejected_rewards = self_refine_dpo_loss(
        chosen,
        rejected,
        double(0.2, -0.5),
        beta=0.1,
        refinement_weight=0.3,
        loss_type=loss_type,
        **LOSSES[loss_type],
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


def test_discopops_default_tau_is_the_papers():
    """
    tau 0.05. At u = 0.05 the modulation is sigmoid(1) = 0.7310586: 0.2689414 (0.6684596) + 0.7310586 e^-0.05
    = 0.1797765 + 0.6954044 = 0.8751809.
    """
    losses, _, _ = self_refine_dpo_loss(double(0.5), double(0), double(0), loss_type="discopop")
    torch.testing.assert_close(losses, double(0.8751809), atol=1e-7, rtol=0)


# Against the transcription


@each_loss
@pytest.mark.parametrize(("beta", "refinement_weight"), [(0.1, 0.3), (0.7, 1.0), (0.3, 0.1)])
def test_value_and_gradient_match_the_paper(loss_type, beta, refinement_weight):
    """
    Oracle: `tests/oracles/self_refine.py`, from the policy's logits under the plain and under the augmented prompt, both
    with a graph. The gradient reaches the plain logits and none the augmented ones.
    """
    policy, ref, augmented, augmented_ref, labels, mask = random_logits(4)
    upstream = double(0.3, -1.2, 0.7)
    options = {"beta": beta, "refinement_weight": refinement_weight, "loss_type": loss_type, **LOSSES[loss_type]}

    expected_logits = policy.clone().requires_grad_()
    delta = oracle.refinement_margin_from_logits(augmented, augmented_ref, labels, mask, beta=beta)
    expected = oracle.self_refine_loss_from_logits(expected_logits, ref, labels, mask, delta, **options)
    expected.backward(upstream)

    logits, augmented_logits = policy.clone().requires_grad_(), augmented.clone().requires_grad_()
    delta = oracle.refinement_margin_from_logits(augmented_logits, augmented_ref, labels, mask, beta=beta)
    losses, _, _ = self_refine_dpo_loss(*logratio(logits, ref, labels, mask).chunk(2), delta, **options)
    losses.backward(upstream)

    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)
    assert augmented_logits.grad is None


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_tdpo_with_the_refinement_margin(variant):
    """Oracle: the transcription of TDPO and of Delta together, value and gradient; at lambda 0, `tdpo_loss`."""
    policy, ref, augmented, augmented_ref, labels, mask = random_logits(4)
    upstream = double(0.3, -1.2, 0.7)
    delta = oracle.refinement_margin_from_logits(augmented, augmented_ref, labels, mask, beta=0.3)

    def losses_and_gradient(refinement_weight):
        logits = policy.clone().requires_grad_()
        position_kls = sequence_kl(logits, ref, mask).chunk(2)
        losses, _, _ = self_refine_dpo_loss(
            *logratio(logits, ref, labels, mask).chunk(2),
            delta,
            beta=0.3,
            refinement_weight=refinement_weight,
            kl_difference=sequential_kl_difference(*position_kls, alpha=0.7, variant=variant),
        )
        losses.backward(upstream)
        return losses, logits.grad

    expected_logits = policy.clone().requires_grad_()
    expected = oracle.self_refine_tdpo_loss_from_logits(
        expected_logits, ref, labels, mask, delta, beta=0.3, refinement_weight=0.5, alpha=0.7, variant=variant
    )
    expected.backward(upstream)
    losses, gradient = losses_and_gradient(0.5)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_logits.grad)

    tdpo_logits = policy.clone().requires_grad_()
    tdpo, _, _ = tdpo_loss(
        *logratio(tdpo_logits, ref, labels, mask).chunk(2),
        *sequence_kl(tdpo_logits, ref, mask).chunk(2),
        beta=0.3,
        alpha=0.7,
        variant=variant,
    )
    tdpo.backward(upstream)
    losses, gradient = losses_and_gradient(0.0)
    torch.testing.assert_close(losses, tdpo)
    torch.testing.assert_close(gradient, tdpo_logits.grad)


# Limits


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo", "hinge"])
def test_refinement_weight_zero_is_trls_loss(loss_type):
    """
    Limit: lambda 0 is DPO, (un-normalised) IPO and the hinge, every bit of value and gradient. For the other losses, and
    TRL's own code, see `test_refinement_weight_zero_is_dpo_bit_for_bit` of the trainer.
    """
    beta = 0.3
    chosen, rejected, delta = random_sums()
    losses, _, _ = self_refine_dpo_loss(chosen, rejected, delta, beta=beta, refinement_weight=0.0, loss_type=loss_type)
    losses.sum().backward()

    stock_chosen, stock_rejected = (x.detach().clone().requires_grad_() for x in (chosen, rejected))
    margins = stock_chosen - stock_rejected
    stock = {
        "sigmoid": -F.logsigmoid(beta * margins),
        "sigmoid_norm": -F.logsigmoid(beta * margins),
        "ipo": (margins - 1 / (2 * beta)) ** 2,
        "hinge": torch.relu(1 - beta * margins),
    }[loss_type]
    stock.sum().backward()
    torch.testing.assert_close(losses, stock, atol=0, rtol=0)
    torch.testing.assert_close(chosen.grad, stock_chosen.grad, atol=0, rtol=0)
    torch.testing.assert_close(rejected.grad, stock_rejected.grad, atol=0, rtol=0)


def test_hinge_is_flat_beyond_its_margin():
    """u = 1.5 and Delta 2: 1.5 - 0.3 (2) = 0.9 costs 0.1; without Delta the pair would cost nothing and not learn."""
    for refinement_weight, loss, gradient in [(0.3, 0.1, -0.1), (0.0, 0.0, 0.0)]:
        chosen = double(15).requires_grad_()
        losses, _, _ = self_refine_dpo_loss(
            chosen, double(0), double(2), loss_type="hinge", refinement_weight=refinement_weight
        )
        losses.sum().backward()
        torch.testing.assert_close(losses, double(loss))
        torch.testing.assert_close(chosen.grad, double(gradient))


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
    dpo = -F.logsigmoid(beta * (1 - refinement_weight) * (stock_chosen - rejected.detach()))
    dpo.sum().backward()
    torch.testing.assert_close(losses, dpo)
    torch.testing.assert_close(chosen.grad, stock_chosen.grad / (1 - refinement_weight))


@each_loss
def test_no_gradient_through_the_refinement_margin(loss_type):
    """PAPERS.md §2: Delta is always under stop-gradient, whether or not the caller detached it."""
    chosen, rejected, delta = random_sums()
    losses, _, _ = self_refine_dpo_loss(chosen, rejected, delta, loss_type=loss_type, **LOSSES[loss_type])
    losses.sum().backward()
    assert chosen.grad.abs().max() > 0
    assert delta.grad is None


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("ipo", 25.0),  # (1 / (2 beta))^2
        ("hinge", 1.0),
        ("exo_pair", 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
        ("robust", math.log(2)),
        ("discopop", 0.5 * math.log(2) + 0.5),
    ],
)
def test_policy_equal_to_reference(loss_type, loss):
    """Limit: all log-ratios 0, at beta 0.1."""
    zeros = torch.zeros(4)
    losses, _, _ = self_refine_dpo_loss(zeros, zeros, zeros, loss_type=loss_type, **LOSSES[loss_type])
    torch.testing.assert_close(losses, torch.full((4,), loss))


@each_loss
def test_rewards_are_dpos_and_detached(loss_type):
    """The rewards are beta logratio, without Delta and without a graph."""
    chosen, rejected, delta = random_sums()
    _, chosen_rewards, rejected_rewards = self_refine_dpo_loss(
        chosen, rejected, delta, beta=0.3, loss_type=loss_type, **LOSSES[loss_type]
    )
    torch.testing.assert_close(chosen_rewards, 0.3 * chosen.detach())
    torch.testing.assert_close(rejected_rewards, 0.3 * rejected.detach())
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="sppo_hard"):
        self_refine_dpo_loss(*[torch.zeros(1)] * 3, loss_type="sppo_hard")
