"""`tdpo_loss` against hand-worked numbers, DPO's limits and the float64 transcription in `tests/oracles/tdpo.py`."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import tdpo as oracle

from trl_ext.losses.tdpo import tdpo_loss


VARIANTS = ["tdpo1", "tdpo2"]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_sums(pairs: int = 5) -> list[torch.Tensor]:
    """Chosen and rejected log-ratios and (non-negative) KLs, `(B,)` each, that require gradients."""
    generator = torch.Generator().manual_seed(0)
    logratios = 5 * torch.randn(2, pairs, generator=generator, dtype=torch.float64)
    kls = 5 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)
    return [x.clone().requires_grad_() for x in (*logratios, *kls)]


# By hand


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
    policy_logits = torch.zeros(2, 2, 2, dtype=torch.float64)
    policy_logits[1, 1] = float("nan")
    ref_logits = double(math.log(3), 0.0).expand(2, 2, 2)
    labels = torch.tensor([[1, 1], [0, 0]])
    mask = torch.tensor([[1, 1], [1, 0]])

    torch.testing.assert_close(
        oracle.sequence_kl(policy_logits, ref_logits, mask), double(0.2616240, 0.1308120), atol=1e-7, rtol=0
    )
    for variant, expected in [("tdpo1", 0.6016319), ("tdpo2", 0.6045941)]:
        loss = oracle.tdpo_loss_from_logits(
            policy_logits, ref_logits, labels, mask, beta=0.1, alpha=0.5, variant=variant
        )
        torch.testing.assert_close(loss, double(expected), atol=1e-7, rtol=0)
    rewards = oracle.tdpo_rewards_from_logits(policy_logits, ref_logits, labels, mask, beta=0.1)
    torch.testing.assert_close(torch.cat(rewards), double(0.1647918, -0.0274653), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("variant", "losses", "chosen_kl_grad", "rejected_kl_grad"),
    [
        ("tdpo1", (0.5981389, 0.7981389), (-0.0450166, -0.0549834), (0.0450166, 0.0549834)),
        ("tdpo2", (0.5759394, 0.8543552), (0.0, 0.0), (0.0218912, 0.0287221)),
    ],
)
def test_by_hand(variant, losses, chosen_kl_grad, rejected_kl_grad):
    """
    Two pairs, beta 0.1, alpha 0.5.

    Pair 1: logratios 2 and -1, SeqKL 0.5 and 1.5. u = 0.1 * 3 = 0.3.
        TDPO1: 0.3 - (0.15 - 0.05) = 0.2,       ln(1 + e^-0.2)  = ln 1.8187308 = 0.5981389
        TDPO2: 0.3 - 0.5 (0.15 - 0.05) = 0.25,  ln(1 + e^-0.25) = ln 1.7788008 = 0.5759394
        rewards: 0.1 (2 + 0.5) = 0.25, 0.1 (-1 + 1.5) = 0.05
    Pair 2: logratios -1 and 3, SeqKL 2 and 0. u = -0.4.
        TDPO1: -0.4 - (0 - 0.2) = -0.2,         ln(1 + e^0.2) = ln 2.2214028 = 0.7981389
        TDPO2: -0.4 - 0.5 (0 - 0.2) = -0.3,     ln(1 + e^0.3) = ln 2.3498588 = 0.8543552
        rewards: 0.1 (-1 + 2) = 0.1, 0.1 (3 + 0) = 0.3

    Gradients: with the argument m, d loss / dm = -sigmoid(-m), so for the rejected KL it is beta sigmoid(-m) (times alpha
    under TDPO2), for the chosen KL the negative of it (zero under TDPO2).
        sigmoid(-0.2) = 0.4501660, sigmoid(0.2) = 0.5498340, sigmoid(-0.25) = 0.4378235, sigmoid(0.3) = 0.5744425
    """
    sums = double(2, -1), double(-1, 3), double(0.5, 2).requires_grad_(), double(1.5, 0).requires_grad_()
    actual, chosen_rewards, rejected_rewards = tdpo_loss(*sums, beta=0.1, alpha=0.5, variant=variant)
    torch.testing.assert_close(actual, double(*losses), atol=1e-7, rtol=0)
    torch.testing.assert_close(chosen_rewards, double(0.25, 0.1))
    torch.testing.assert_close(rejected_rewards, double(0.05, 0.3))

    actual.sum().backward()
    chosen_grad = torch.zeros(2, dtype=torch.float64) if sums[2].grad is None else sums[2].grad
    torch.testing.assert_close(chosen_grad, double(*chosen_kl_grad), atol=1e-7, rtol=0)
    torch.testing.assert_close(sums[3].grad, double(*rejected_kl_grad), atol=1e-7, rtol=0)


def test_defaults_are_the_papers():
    """beta 0.1, alpha 0.5, TDPO2: pair 1 of `test_by_hand`."""
    losses, _, _ = tdpo_loss(double(2), double(-1), double(0.5), double(1.5))
    torch.testing.assert_close(losses, double(0.5759394), atol=1e-7, rtol=0)


# Against the transcription


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (0.7, 0.1), (0.3, 1.3)])
def test_value_and_gradient_match_the_paper(variant, beta, alpha):
    """Oracle: `tests/oracles/tdpo.py`, losses, rewards and the gradient down to the policy's logits, ragged responses."""
    pairs, tokens, vocabulary = 3, 7, 11
    generator = torch.Generator().manual_seed(1)
    policy_logits, ref_logits = 2 * torch.randn(2, 2 * pairs, tokens, vocabulary, generator=generator).double()
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    lengths = torch.tensor([7, 1, 4, 2, 6, 3])
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    upstream = torch.randn(pairs, generator=generator).double()

    expected_logits = policy_logits.clone().requires_grad_()
    expected = oracle.tdpo_loss_from_logits(
        expected_logits, ref_logits, labels, mask, beta=beta, alpha=alpha, variant=variant
    )
    expected.backward(upstream)

    logits = policy_logits.clone().requires_grad_()
    logratios = oracle.logratio(logits, ref_logits, labels, mask).chunk(2)
    kls = oracle.sequence_kl(logits, ref_logits, mask).chunk(2)
    losses, chosen_rewards, rejected_rewards = tdpo_loss(*logratios, *kls, beta=beta, alpha=alpha, variant=variant)
    losses.backward(upstream)

    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, expected_logits.grad)
    expected_rewards = oracle.tdpo_rewards_from_logits(policy_logits, ref_logits, labels, mask, beta=beta)
    torch.testing.assert_close((chosen_rewards, rejected_rewards), expected_rewards)


# Limits


def test_alpha_zero_is_dpo():
    """Limit: TDPO2 with alpha 0 is sigmoid DPO, in value and in the gradient of all four inputs."""
    sums = random_sums()
    losses, _, _ = tdpo_loss(*sums, beta=0.3, alpha=0.0, variant="tdpo2")
    losses.sum().backward()

    chosen, rejected = (x.detach().clone().requires_grad_() for x in sums[:2])
    dpo = -F.logsigmoid(0.3 * (chosen - rejected))
    dpo.sum().backward()

    torch.testing.assert_close(losses, dpo, atol=0, rtol=0)
    torch.testing.assert_close(sums[0].grad, chosen.grad)
    torch.testing.assert_close(sums[1].grad, rejected.grad)
    for kl in sums[2:]:
        assert kl.grad is None or not kl.grad.any()


def test_tdpo1_and_tdpo2_with_alpha_one_agree_in_value_only():
    """Limit: the stop-gradient on the chosen KL is the one difference between TDPO1 and TDPO2 at alpha 1."""
    first, second = random_sums(), random_sums()
    losses_1, _, _ = tdpo_loss(*first, beta=0.3, variant="tdpo1")
    losses_2, _, _ = tdpo_loss(*second, beta=0.3, alpha=1.0, variant="tdpo2")
    torch.testing.assert_close(losses_1, losses_2)

    losses_1.sum().backward()
    losses_2.sum().backward()
    for i in (0, 1, 3):  # both log-ratios and the rejected KL
        torch.testing.assert_close(first[i].grad, second[i].grad)
    assert (first[2].grad < 0).all()
    assert second[2].grad is None or not second[2].grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_equal_to_reference_is_ln_2(variant):
    """Limit: with log-ratios and KLs 0 the loss is -log sigmoid(0) = ln 2 and the rewards are 0."""
    losses, chosen_rewards, rejected_rewards = tdpo_loss(*[torch.zeros(4)] * 4, variant=variant)
    assert torch.equal(losses, torch.full((4,), math.log(2)))
    assert torch.equal(chosen_rewards, torch.zeros(4))
    assert torch.equal(rejected_rewards, torch.zeros(4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tdpo1_ignores_alpha_and_tdpo2_does_not(variant):
    """PAPERS.md §1: TDPO1 has no alpha."""
    sums = random_sums()
    low, _, _ = tdpo_loss(*sums, alpha=0.1, variant=variant)
    high, _, _ = tdpo_loss(*sums, alpha=0.9, variant=variant)
    assert torch.equal(low, high) == (variant == "tdpo1")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_are_detached(variant):
    """The rewards are for the logs: beta (logratio + SeqKL), the same for both variants, without a graph."""
    sums = random_sums()
    _, chosen_rewards, rejected_rewards = tdpo_loss(*sums, beta=0.3, variant=variant)
    torch.testing.assert_close(chosen_rewards, 0.3 * (sums[0] + sums[2]).detach())
    torch.testing.assert_close(rejected_rewards, 0.3 * (sums[1] + sums[3]).detach())
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_far_margins_stay_finite(variant):
    """At margins of +-1e5, -log sigmoid(m) is 0 and 1e5, with gradient 0 and beta; `log(sigmoid(m))` would be -inf."""
    chosen = torch.tensor([1e6, -1e6], requires_grad=True)
    zeros = torch.zeros(2)
    losses, _, _ = tdpo_loss(chosen, zeros, zeros, zeros, beta=0.1, variant=variant)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.0, 1e5]))
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -0.1]))


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="tdpo3"):
        tdpo_loss(*[torch.zeros(1)] * 4, variant="tdpo3")
