"""
`tdpo_shifts` and `self_refine_shifts` against hand-worked numbers and, put into DPO's and IPO's losses, against the float64 transcriptions
of both papers: value and gradient, down to the policy's logits.
"""

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import self_refine as sr_oracle
from tests.oracles import tdpo as oracle

from trl_ext.losses.shifts import self_refine_shifts, tdpo_shifts


VARIANTS = ["tdpo1", "tdpo2"]
UPSTREAM = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(count: int, pairs: int = 3, tokens: int = 7, vocabulary: int = 11) -> tuple:
    """`count` logits, `(2B, T, V)`, and their labels and ragged mask, `(2B, T)`."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(count, 2 * pairs, tokens, vocabulary, generator=generator).double()
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    lengths = torch.tensor([7, 1, 4, 2, 6, 3])
    return *logits, labels, (torch.arange(tokens) < lengths.unsqueeze(1)).long()


def test_oracle_by_hand():
    """
    The oracle itself, on a vocabulary of two tokens. Policy (1/2, 1/2), reference (3/4, 1/4) at both positions; the
    chosen response is token 1 twice, the rejected one is token 0 and a masked position.

        logratio of token 0: ln(1/2) - ln(3/4) = -0.4054651      of token 1: ln(1/2) - ln(1/4) = 0.6931472
        KL per position: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.3040988 - 0.1732868 = 0.1308120
        u = 0.1 (2 * 0.6931472 + 0.4054651) = 0.1791759
        SeqKL(y_w) = 0.2616240, SeqKL(y_l) = 0.1308120
        TDPO1 argument: 0.1791759 - 0.1 (0.1308120 - 0.2616240) = 0.1922571    loss: ln(1 + e^-0.1922571) = 0.6016319
        TDPO2 argument, alpha 0.5: 0.1791759 + 0.0065406 = 0.1857165           loss: ln(1 + e^-0.1857165) = 0.6045941
        rewards: 0.1 (1.3862944 + 0.2616240) = 0.1647918, 0.1 (-0.4054651 + 0.1308120) = -0.0274653

    At the masked position the policy's logits are NaN, which must not reach the sums.
    """
    policy = torch.zeros(2, 2, 2, dtype=torch.float64)
    policy[1, 1] = float("nan")
    ref = double(0.75, 0.25).log().expand(2, 2, 2)
    labels, mask = torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(oracle.sequence_kl(policy, ref, mask), double(0.2616240, 0.1308120), atol=1e-7, rtol=0)
    for variant, expected in [("tdpo1", 0.6016319), ("tdpo2", 0.6045941)]:
        losses = oracle.tdpo_loss_from_logits(policy, ref, labels, mask, beta=0.1, alpha=0.5, variant=variant)
        torch.testing.assert_close(losses, double(expected), atol=1e-7, rtol=0)
    rewards = oracle.tdpo_rewards_from_logits(policy, ref, labels, mask, beta=0.1)
    torch.testing.assert_close(torch.cat(rewards), double(0.1647918, -0.0274653), atol=1e-7, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (0.7, 0.1), (0.3, 1.3)])
def test_tdpo_matches_the_paper(variant, beta, alpha):
    """`−log σ(β (chosen − rejected))` of the shifted log-ratios is TDPO."""
    policy, ref, labels, mask = random_logits(2)
    expected_logits = policy.clone().requires_grad_()
    expected = oracle.tdpo_loss_from_logits(
        expected_logits, ref, labels, mask, beta=beta, alpha=alpha, variant=variant
    )
    expected.backward(UPSTREAM)

    logits = policy.clone().requires_grad_()
    chosen, rejected = oracle.logratio(logits, ref, labels, mask).chunk(2)
    shifts = tdpo_shifts(*oracle.sequence_kl(logits, ref, mask).chunk(2), alpha=alpha, variant=variant)
    losses = -F.logsigmoid(beta * (chosen + shifts[0] - rejected - shifts[1]))
    losses.backward(UPSTREAM)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)


def test_tdpo_by_hand():
    """KLs 2 and 4: TDPO1 adds them; TDPO2 at α = 0.5 adds 1 and 2, and only the rejected one has a gradient, of 0.5. At α = 0, nothing."""
    chosen, rejected = double(2).requires_grad_(), double(4).requires_grad_()
    assert tdpo_shifts(chosen, rejected, variant="tdpo1") == (chosen, rejected)
    shifts = tdpo_shifts(chosen, rejected)
    assert [shift.item() for shift in shifts] == [1, 2]
    sum(shifts).sum().backward()
    assert (chosen.grad, rejected.grad.item()) == (None, 0.5)
    assert [shift.item() for shift in tdpo_shifts(chosen, rejected, alpha=0.0)] == [0, 0]
    with pytest.raises(ValueError, match="tdpo3"):
        tdpo_shifts(chosen, rejected, variant="tdpo3")


@pytest.mark.parametrize("means", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize(("beta", "refinement_weight"), [(0.1, 0.3), (0.7, 1.0)])
def test_self_refinement_matches_the_paper(loss_type, beta, refinement_weight, means):
    """Sr-DPO and Sr-IPO, on sums and on means: the shift survives the division by the lengths. No gradient reaches the augmented logits."""
    policy, ref, augmented, augmented_ref, labels, mask = random_logits(4)
    upstream, lengths = UPSTREAM, mask.sum(dim=1).view(2, -1)
    options = {"beta": beta, "refinement_weight": refinement_weight, "loss_type": loss_type}

    expected_logits = policy.clone().requires_grad_()
    delta = sr_oracle.refinement_margin_from_logits(
        augmented, augmented_ref, labels, mask, beta=beta, length_normalized=means
    )
    expected = sr_oracle.self_refine_loss_from_logits(
        expected_logits, ref, labels, mask, delta, length_normalized=means, **options
    )
    expected.backward(upstream)

    logits, augmented_logits = policy.clone().requires_grad_(), augmented.clone().requires_grad_()
    shifts = self_refine_shifts(
        *oracle.logratio(augmented_logits, augmented_ref, labels, mask).chunk(2),
        lengths=lengths if means else None,
        **options,
    )
    logratios = oracle.logratio(logits, ref, labels, mask).view(2, -1)
    chosen, rejected = (
        (logratio + shift) / (length if means else 1)
        for logratio, shift, length in zip(logratios, shifts, lengths, strict=True)
    )
    margins = chosen - rejected
    losses = -F.logsigmoid(beta * margins) if loss_type == "sigmoid" else (margins - 1 / (2 * beta)) ** 2
    losses.backward(upstream)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)
    assert augmented_logits.grad is None


def test_self_refinement_by_hand():
    """
    β 0.1, λ 0.5, augmented log-ratios 6 and −2 of responses of 2 and 4 tokens. Sums: Δ = 0.8, so λ Δ / β = 4, and λ Δ = 0.4 for IPO. Means:
    Δ = 0.1 (3 + 0.5) = 0.35, so λ Δ |y_w| / β = 3.5, and 0.35 for IPO.
    """
    pair = (double(6), double(-2))
    lengths = torch.tensor([[2.0], [4.0]], dtype=torch.float64)
    for loss_type, given, expected in [
        *(("sigmoid", None, -4), ("hinge", None, -4), ("ipo", None, -0.4)),
        *(("sigmoid_norm", lengths, -3.5), ("ipo", lengths, -0.35)),
    ]:
        chosen, rejected = self_refine_shifts(*pair, refinement_weight=0.5, loss_type=loss_type, lengths=given)
        torch.testing.assert_close(chosen, double(expected))
        assert rejected == 0


def test_empty_refinement_prompt_is_dpo_with_a_smaller_beta():
    """Limit (eq. 10): with p empty, Δ is DPO's own margin, so the shifted margin is (1 − λ) of it."""
    chosen, rejected = double(3, -1, 5), double(1, 2, -4)
    shift, _ = self_refine_shifts(chosen, rejected, beta=0.5, refinement_weight=0.3)
    torch.testing.assert_close(chosen + shift - rejected, 0.7 * (chosen - rejected))
