"""
The fused kernel against float64 full logits, and its promises: how many head GEMMs, and no `[N, V]` tensor but the kept one.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ext.kernels import fused_position_kl as module
from trl_ext.kernels.fused_position_kl import fused_position_kl


def logits(hidden, weight, bias, scale, softcap):
    z = hidden @ weight.t()
    z = z if bias is None else z + bias
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def oracle(inputs, labels, kl_weight, scale, softcap, ref_scale, ref_softcap):
    """Full logits in float64: `log p(y) + κ Σ q (log q − log p)`, and the numbers beside it."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = inputs
    z = logits(hidden, weight, bias, scale, softcap)
    log_p = z.log_softmax(-1)
    log_q = logits(ref_hidden, ref_weight, ref_bias, ref_scale, ref_softcap).log_softmax(-1)
    q = log_q.exp()
    kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    log_probs, ref_log_probs = (x.gather(-1, labels[:, None])[:, 0] for x in (log_p, log_q))
    entropy = -torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0.0).sum(-1)
    return log_probs + kl_weight * kl, log_probs, ref_log_probs, kl, entropy, z.mean(-1), z.argmax(-1) == labels


def make(count, vocab, width, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [randn(count, width), randn(vocab, width) / 2, randn(vocab) if bias else None]
    inputs += [randn(count, width), randn(vocab, width) / 2, randn(vocab) if bias else None]
    labels = torch.randint(vocab, (count,), generator=generator)
    return inputs, labels, torch.rand(count, generator=generator, dtype=torch.float64), randn(count)


def run(function, inputs, dtype, trained):
    """Fresh leaves of `dtype`, of which the first `trained` require gradients; returns results and leaves."""
    leaves = [
        None if t is None else t.detach().clone().to(dtype).requires_grad_(i < trained) for i, t in enumerate(inputs)
    ]
    return function(leaves), leaves


# dtype -> tolerances of results and gradients, relative and absolute. bf16 rounds hidden states and heads to 8 bits; what is
# left after that is computed in fp32, so results are compared on the rounded inputs.
TOLERANCES = {torch.float32: ((1e-5, 2e-5), (1e-4, 5e-5)), torch.bfloat16: ((1e-4, 1e-3), (3e-2, 6e-2))}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kept_gradient_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("count", "vocab", "width", "bias", "scale", "softcap"),
    [
        (1, 41, 16, False, 1.0, None),
        (7, 401, 33, True, 0.5, None),
        (41, 1271, 16, True, 1.0, 5.0),
        (5, 41, 16, False, 2.0, 3.0),
    ],
)
def test_values_and_gradients(dtype, kept_gradient_bytes, count, vocab, width, bias, scale, softcap):
    inputs, labels, kl_weight, upstream = make(count, vocab, width, bias)
    inputs = [None if t is None else t.to(dtype).double() for t in inputs]
    transforms = (scale, softcap, 1.0, softcap)
    expected, exact = run(lambda leaves: oracle(leaves, labels, kl_weight, *transforms), inputs, torch.float64, 3)
    (expected[0] * upstream).sum().backward()
    names = ("logit_scale", "softcap", "ref_logit_scale", "ref_softcap")
    options = dict(zip(names, transforms, strict=True), kept_gradient_bytes=kept_gradient_bytes)
    found, leaves = run(lambda x: fused_position_kl(*x, labels, kl_weight.float(), **options), inputs, dtype, 3)
    (found.weighted * upstream.float()).sum().backward()

    (rtol, atol), (grad_rtol, grad_atol) = TOLERANCES[dtype]
    for value, name in zip(expected, found._fields, strict=True):
        torch.testing.assert_close(getattr(found, name).to(value.dtype), value, rtol=rtol, atol=atol, msg=name)
    for leaf, other in zip(leaves[:3], exact[:3], strict=True):
        if leaf is not None:
            torch.testing.assert_close(
                leaf.grad.double(), other.grad, rtol=grad_rtol, atol=grad_atol * other.grad.abs().max().item()
            )
    assert all(leaf is None or leaf.grad is None for leaf in leaves[3:])


def test_many_tiles_are_one(monkeypatch):
    """Row tiles of 3 positions give what one tile gives."""
    inputs, labels, kl_weight, upstream = make(41, 401, 16, True)
    results = []
    for elements in (2**24, 3 * 401):
        monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", elements)
        found, leaves = run(lambda x: fused_position_kl(*x, labels, kl_weight.float()), inputs, torch.float32, 3)
        (found.weighted * upstream.float()).sum().backward()
        results.append((found.position_kl, found.weighted, *(leaf.grad for leaf in leaves[:3])))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_the_policy_as_its_own_reference_has_a_kl_of_exactly_0():
    inputs, labels, kl_weight, _ = make(41, 1271, 33, True)
    inputs = [None if t is None else t.float() for t in inputs[:3]] * 2
    found = fused_position_kl(*inputs, labels, kl_weight.float())
    assert torch.equal(found.position_kl, torch.zeros(41))
    assert torch.equal(found.log_probs, found.ref_log_probs)


def test_small_drifts_are_exact_and_no_kl_is_negative():
    """A drift of 1e-3 has KLs of about 1e-7, where a sum of q (log q − log p) in fp32 has no digit left."""
    inputs, labels, kl_weight, _ = make(64, 1271, 16, False)
    inputs[3] = inputs[0] + 1e-4 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[4] = inputs[1]
    inputs = [None if t is None else t.float().double() for t in inputs]
    exact = oracle(inputs, labels, kl_weight, 1.0, None, 1.0, None)[3]
    found = fused_position_kl(
        *[None if t is None else t.float() for t in inputs], labels, kl_weight.float()
    ).position_kl
    assert exact.max() < 1e-6
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), exact, rtol=5e-2, atol=1e-10)


@pytest.mark.parametrize("masked", ["reference", "both"])
def test_masked_vocabularies(masked):
    """Real −inf logits: KL(q‖p) is finite where the reference cannot say a word, and so is every gradient."""
    inputs, labels, kl_weight, upstream = make(7, 41, 16, True)
    labels = labels.clamp(max=30)
    for index in (5,) if masked == "reference" else (2, 5):
        inputs[index][31:] = -math.inf
    expected, exact = run(lambda x: oracle(x, labels, kl_weight, 1.0, None, 1.0, None), inputs, torch.float64, 1)
    (expected[0] * upstream).sum().backward()
    found, leaves = run(lambda x: fused_position_kl(*x, labels, kl_weight.float()), inputs, torch.float32, 1)
    (found.weighted * upstream.float()).sum().backward()
    torch.testing.assert_close(found.position_kl.double(), expected[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), expected[4], rtol=1e-5, atol=1e-5)
    if masked == "reference":
        torch.testing.assert_close(leaves[0].grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    assert leaves[0].grad.isfinite().all()


def test_no_positions_are_still_differentiable():
    inputs, labels, kl_weight, _ = make(0, 41, 16, True)
    found, leaves = run(lambda x: fused_position_kl(*x, labels, kl_weight.float()), inputs, torch.float32, 3)
    found.weighted.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves[:3])


class HeadWork(TorchDispatchMode):
    """Counts matrix products that involve a whole vocabulary, and remembers the largest tensor with that many columns."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.flops, self.largest = vocab, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if self.vocab in (*a.shape, *b.shape):
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        is_view = function.overloadpacket is torch.ops.aten.t  # of the head
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.size(1) == self.vocab and not is_view:
            self.largest = max(self.largest, result.size(0))
        return result


@pytest.mark.parametrize(
    ("trained", "kept_gradient_bytes", "gemms"),
    [(1, 2**30, 3), (3, 2**30, 4), (3, 0, 6), (0, 2**30, 2)],
    ids=["frozen head", "trained head", "trained head, recomputed", "evaluation"],
)
def test_head_gemms(monkeypatch, trained, kept_gradient_bytes, gemms):
    """Counted in units of 2·N·V·H. TRL's DPO has 4 with a frozen head and 5 with a trained one."""
    count, vocab, width = 40, 401, 16
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 10 * vocab)
    inputs, labels, kl_weight, upstream = make(count, vocab, width, False)
    with HeadWork(vocab) as work:
        found, _ = run(
            lambda x: fused_position_kl(*x, labels, kl_weight.float(), kept_gradient_bytes=kept_gradient_bytes),
            inputs,
            torch.float32,
            trained,
        )
        if trained:
            (found.weighted * upstream.float()).sum().backward()
    assert work.flops == gemms * 2 * count * vocab * width
    assert work.largest == (count if trained == 3 and kept_gradient_bytes else 10)


def test_heads_of_different_vocabularies_are_refused():
    inputs, labels, kl_weight, _ = make(7, 41, 16, False)
    inputs[4] = inputs[4][:40]
    with pytest.raises(ValueError, match="41 tokens and the reference's 40"):
        fused_position_kl(*inputs, labels, kl_weight)
