"""
`position_kl` and `log_probs` against float64 full logits, and their promises: how many head GEMMs, and no `[N, V]` tensor
but the gradient tile that is kept.

The inputs of the oracle are the kernel's inputs, already rounded to their dtype, so a tolerance is the kernel's own error.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_ext.kernels import logits_tile
from trl_ext.kernels import position_kl as module
from trl_ext.kernels.position_kl import log_probs, position_kl


# Largest error of a value in nats, and of a gradient relative to the largest entry of that gradient. With bf16 inputs
# logits and values are fp32 all the same; the gradient tile and the Jacobian are rounded to 8 bits each.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-5, 1e-2)}
ALL_DIFFERENT = {"logit_scale": 0.5, "softcap": 2.0, "ref_logit_scale": 1.5, "ref_softcap": 5.0}

pytestmark = pytest.mark.usefixtures("single_thread")


class Heads:
    """
    Random hidden states and LM heads of a policy and a reference near it, labels that include both ends of the
    vocabulary, and weights κ that include 0 and 1. `leaves` are the tensors that may receive gradients.
    """

    def __init__(
        self, tokens, vocabulary, width, *, dtype=torch.float32, bias=False, spread=2.0, seed=0, device="cpu"
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        hidden, weight = normal(tokens, width), spread * normal(vocabulary, width) / width**0.5
        self.ref_hidden = (hidden + 0.3 * normal(tokens, width)).to(device, dtype)
        self.ref_weight = (weight + 0.1 * normal(vocabulary, width)).to(device, dtype)
        self.ref_bias = normal(vocabulary).to(device, dtype) if bias else None
        self.hidden, self.weight = (values.to(device, dtype).requires_grad_() for values in (hidden, weight))
        self.bias = normal(vocabulary).to(device, dtype).requires_grad_() if bias else None
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.labels[1::3] = (self.hidden @ self.weight.T).argmax(dim=-1)[1::3]  # some that are the most likely token
        self.kl_weight = 1.5 * torch.rand(tokens, generator=generator).to(device)
        self.upstream = normal(tokens).to(device)
        if tokens > 1:
            self.labels[0], self.labels[-1] = 0, vocabulary - 1
            self.kl_weight[0], self.kl_weight[1] = 0, 1

    @property
    def leaves(self):
        return {"hidden": self.hidden, "weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def freeze(self, *names):
        for name in names:
            setattr(self, name, getattr(self, name).detach())
        return self

    def __call__(self, function, **options) -> dict[str, torch.Tensor]:
        """What `function`, [`position_kl`], [`log_probs`] or the oracle, gives for these, with the output to train first."""
        policy, reference = (self.hidden, self.weight, self.bias), (self.ref_hidden, self.ref_weight, self.ref_bias)
        if function is log_probs:
            return log_probs(*policy, self.labels, **options)._asdict()
        result = function(*policy, *reference, self.labels, self.kl_weight, **options)
        return result if isinstance(result, dict) else result._asdict()

    def gradients(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients of all leaves that want one, for a random upstream gradient per token."""
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        return dict(zip(leaves, torch.autograd.grad(output, leaves.values(), self.upstream), strict=True))


def full_logits(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    labels,
    kl_weight,
    *,
    logit_scale=1.0,
    softcap=None,
    ref_logit_scale=1.0,
    ref_softcap=None,
) -> dict[str, torch.Tensor]:
    """
    The oracle, in float64. With `z = softcap tanh(scale (W h + b) / softcap)`, `p = softmax(z)`, `q` the reference's:

        log_probs = log p(label)    position_kl = sum_v q(v) (log q(v) - log p(v))    entropy = -sum_v p(v) log p(v)
        weighted = log_probs + kl_weight position_kl    mean_logits = mean_v z(v)
        top1_gap = z(label) - max of the other z, so is_top1 is top1_gap >= 0

    A word of probability 0 adds nothing to a sum.
    """

    def logits(hidden, weight, bias, scale, softcap):
        z = hidden.double() @ weight.double().T
        z = (z if bias is None else z + bias.double()) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z = logits(hidden, weight, bias, logit_scale, softcap)  # (N, V)
    ref_z = logits(ref_hidden, ref_weight, ref_bias, ref_logit_scale, ref_softcap).detach()  # (N, V)
    log_p, log_q = torch.log_softmax(z, dim=-1), torch.log_softmax(ref_z, dim=-1)
    p, q, rows = log_p.exp(), log_q.exp(), torch.arange(len(labels), device=labels.device)
    kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=-1)
    return {
        "weighted": log_p[rows, labels] + kl_weight * kl,
        "log_probs": log_p[rows, labels],
        "ref_log_probs": log_q[rows, labels],
        "position_kl": kl,
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1),
        "mean_logits": z.mean(dim=-1),
        "top1_gap": z[rows, labels] - z.scatter(-1, labels.unsqueeze(-1), -torch.inf).amax(dim=-1),
    }


def check(heads: Heads, function=position_kl, *, tolerances=TOLERANCES[torch.float32], oracle=None, **options):
    """Compares every output and every gradient with the oracle's, which sees `oracle`, or the same heads."""
    value_tolerance, gradient_tolerance = tolerances
    transform = {name: value for name, value in options.items() if name != "kept_gradient_bytes"}
    oracle = heads if oracle is None else oracle
    actual, expected = heads(function, **options), oracle(full_logits, **transform)

    top1_gap, is_top1 = expected["top1_gap"], actual.pop("is_top1")
    assert is_top1.dtype == torch.bool
    # Rounding may order logits this close either way
    decided = top1_gap.abs() > 5 * value_tolerance
    assert torch.equal(is_top1[decided], (top1_gap >= 0)[decided])
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(
            value.double(),
            expected[name],
            atol=value_tolerance,
            rtol=value_tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )

    trained = "log_probs" if function is log_probs else "weighted"
    assert {name for name, value in actual.items() if value.requires_grad} == {trained}
    expected_gradients = oracle.gradients(expected[trained])
    for name, gradient in heads.gradients(actual[trained]).items():
        assert gradient.dtype == heads.leaves[name].dtype, name
        largest = expected_gradients[name].abs().max()
        error = (gradient.double() - expected_gradients[name].double()).abs().max()
        assert error <= gradient_tolerance * largest, f"{name}: off by {error:.1e}, largest {largest:.1e}"


# Values and gradients


@pytest.mark.parametrize("kept_rows", [41, 3, 0], ids=["kept", "partly-kept", "recomputed"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("function", "shape", "bias", "transform"),
    [
        (position_kl, (41, 41, 33), False, {}),
        (position_kl, (7, 401, 33), True, {}),
        (position_kl, (41, 1271, 16), False, {"logit_scale": 0.25, "ref_logit_scale": 0.25}),
        (position_kl, (7, 1271, 33), False, {"softcap": 3.0, "ref_softcap": 3.0}),
        (position_kl, (41, 401, 33), True, ALL_DIFFERENT),
        (position_kl, (7, 41, 16), True, {"softcap": 2.0}),
        (position_kl, (7, 1271, 16), True, {"ref_logit_scale": 2.0, "ref_softcap": 2.0}),
        (log_probs, (7, 1271, 16), False, {}),
        (log_probs, (41, 401, 33), True, {"logit_scale": 0.5, "softcap": 2.0}),
    ],
)
def test_values_and_gradients(function, shape, bias, transform, dtype, kept_rows):
    """Oracle: float64 full logits; each model has its own bias, scale and soft cap (after the scale)."""
    check(
        Heads(*shape, dtype=dtype, bias=bias),
        function,
        tolerances=TOLERANCES[dtype],
        **transform,
        kept_gradient_bytes=kept_rows * shape[1] * dtype.itemsize,
    )


@pytest.mark.parametrize("kept_rows", [1, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("function", [position_kl, log_probs])
def test_one_position(function, kept_rows):
    """Oracle: float64 full logits."""
    check(Heads(1, 1271, 33, bias=True), function, kept_gradient_bytes=kept_rows * 1271 * 4)


@pytest.mark.parametrize(("tile_rows", "block_rows"), [(1, 1), (3, 2), (41, 4), (41, 41), (100, 5)])
@pytest.mark.parametrize("kept_rows", [0, 7, 41])
def test_tiles_and_blocks(monkeypatch, tile_rows, block_rows, kept_rows):
    """Oracle: float64 full logits, whatever the number of tiles, of blocks in a tile, and of rows that are kept."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", tile_rows * 401 + 400)
    monkeypatch.setitem(logits_tile.BLOCK_ELEMENTS, "cpu", block_rows * 401)
    check(Heads(41, 401, 16, bias=True), **ALL_DIFFERENT, kept_gradient_bytes=kept_rows * 401 * 4)


def test_a_row_longer_than_a_tile(monkeypatch):
    """Oracle: float64 full logits; a tile has a row at least."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 100)
    monkeypatch.setitem(logits_tile.BLOCK_ELEMENTS, "cpu", 100)
    check(Heads(3, 401, 16))


@pytest.mark.parametrize(
    ("hidden", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("vocab_chunk_size", [8192, 100], ids="{} columns".format)
def test_head_of_another_dtype(monkeypatch, hidden, head, vocab_chunk_size):
    """Oracle: float64 full logits; the head is converted to the hidden states' dtype, some of its rows at a time."""
    monkeypatch.setattr(logits_tile, "VOCAB_CHUNK_SIZE", vocab_chunk_size)
    heads = Heads(7, 401, 33, dtype=torch.bfloat16, bias=True)
    for name in ("hidden", "ref_hidden"):
        setattr(heads, name, getattr(heads, name).detach().to(hidden).requires_grad_())
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        setattr(heads, name, getattr(heads, name).detach().to(head).requires_grad_())
    check(heads, tolerances=TOLERANCES[torch.bfloat16], kept_gradient_bytes=3 * 401 * hidden.itemsize)


@pytest.mark.parametrize("kept_rows", [7, 3], ids=["kept", "partly-kept"])
def test_autocast(kept_rows):
    """
    Oracle: float64 full logits of hidden states rounded to bf16. Values and gradients are fp32 to the outside, and the
    backward, which is outside, computes what the forward did.
    """

    def under_autocast(*args, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return position_kl(*args, **options)

    heads, rounded = (Heads(7, 401, 33, bias=True) for _ in range(2))
    rounded.hidden = heads.hidden.detach().bfloat16().float().requires_grad_()
    rounded.ref_hidden = heads.ref_hidden.bfloat16().float()
    options = {"kept_gradient_bytes": kept_rows * 401 * 2}
    check(heads, under_autocast, tolerances=TOLERANCES[torch.bfloat16], oracle=rounded, **options)


@pytest.mark.parametrize("kept_rows", [41, 3], ids=["kept", "partly-kept"])
@pytest.mark.parametrize("spread", [2.0, 12.0], ids=["broad", "confident"])
def test_fp16_under_a_loss_scale(spread, kept_rows):
    """
    The gradient tile is rounded to fp16 before the upstream gradient, which has the loss scale, is multiplied in; TRL multiplies first. At
    a scale of 2¹⁶ and a per-token gradient of 1e-4, as in training, what comes out, unscaled, is as close to the oracle as TRL's
    `ChunkedLogProbFunction` is, and to fp16's 11 bits.
    """
    scale, per_token = 2.0**16, 1e-4
    errors = {}
    for name in ("ours", "trl"):
        heads = Heads(41, 8000, 33, dtype=torch.float16, spread=spread)
        heads.kl_weight.zero_()
        expected = heads.gradients(heads(full_logits)["weighted"])
        if name == "ours":
            output = heads(position_kl, kept_gradient_bytes=kept_rows * 8000 * 2)["weighted"]
        else:
            arguments = (heads.hidden, heads.weight, None, heads.labels, 1.0, 1024, None, 1.0, ("log_probs",))
            output = ChunkedLogProbFunction.apply(*arguments)[0]
        heads.upstream = heads.upstream * per_token * scale
        errors[name] = {
            leaf: (
                (gradient.double() / scale / per_token - expected[leaf].double()).norm()
                / expected[leaf].double().norm()
            ).item()
            for leaf, gradient in heads.gradients(output).items()
        }
    assert all(error < 1e-3 for error in errors["ours"].values()), errors
    assert all(errors["ours"][leaf] < 3 * errors["trl"][leaf] for leaf in errors["ours"]), errors


@pytest.mark.parametrize("transform", [{}, ALL_DIFFERENT], ids=["plain", "scaled and capped"])
def test_kl_is_trls_own(transform):
    """Another oracle: TRL's `ChunkedDivergenceFunction` at β = 0, the forward KL; value, entropy and gradient, of an independent kernel."""
    heads = Heads(41, 401, 33, bias=True)
    reference = (heads.ref_hidden, heads.ref_weight, heads.ref_bias)
    scales = [transform.get(name, default) for name, default in [("logit_scale", 1.0), ("softcap", None)]]
    scales += [transform.get(name, default) for name, default in [("ref_logit_scale", 1.0), ("ref_softcap", None)]]
    policy = (heads.hidden, heads.weight, heads.bias)
    divergence, entropy = ChunkedDivergenceFunction.apply(*policy, *reference, 0.0, 1.0, *scales)
    expected = heads.gradients(divergence)

    heads.kl_weight.fill_(1.0)
    ours = heads(position_kl, **transform)
    torch.testing.assert_close(ours["position_kl"], divergence, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours["entropy"], entropy, atol=2e-5, rtol=2e-5)
    with_kl = heads.gradients(ours["weighted"])
    heads.kl_weight.zero_()
    without = heads.gradients(heads(position_kl, **transform)["weighted"])
    for name, gradient in expected.items():
        error = (with_kl[name] - without[name] - gradient).abs().max()
        assert error <= 5e-5 * gradient.abs().max() and gradient.any(), name


def test_reference_of_another_width():
    """Oracle: float64 full logits; a larger reference has its own hidden size, and only the vocabulary must match."""
    heads, larger = Heads(7, 401, 16), Heads(7, 401, 33, seed=1)
    heads.ref_hidden, heads.ref_weight = larger.ref_hidden, larger.ref_weight
    check(heads, kept_gradient_bytes=0)


@pytest.mark.parametrize("kept_rows", [7, 3], ids=["kept", "partly-kept"])
@pytest.mark.parametrize(
    "frozen",
    [("weight", "bias"), ("weight",), ("bias",), ("hidden",), ("hidden", "weight"), ("hidden", "bias")],
    ids="+".join,
)
@pytest.mark.parametrize("function", [position_kl, log_probs])
def test_partly_frozen(function, frozen, kept_rows):
    """Oracle: float64 full logits; whatever is trained has the gradient that it has when all is."""
    heads = Heads(7, 401, 33, bias=True).freeze(*frozen)
    check(heads, function, softcap=3.0, kept_gradient_bytes=kept_rows * 401 * 4)


def test_no_gradient_reaches_the_reference():
    heads = Heads(7, 41, 16, bias=True)
    reference = [x.requires_grad_() for x in (heads.ref_hidden, heads.ref_weight, heads.ref_bias)]
    heads(position_kl)["weighted"].sum().backward()
    assert all(leaf.grad is not None for leaf in heads.leaves.values())
    assert all(x.grad is None for x in reference)


@pytest.mark.parametrize("function", [position_kl, log_probs])
def test_no_completion_positions(function):
    """A batch whose completions were all cut away has N = 0: empty outputs that still lead, with gradient 0, to the policy."""
    heads = Heads(0, 41, 16, bias=True)
    result = heads(function)
    assert all(value.shape == (0,) for value in result.values())
    next(iter(result.values())).sum().backward()
    for name, leaf in heads.leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


def test_different_vocabularies_are_refused():
    heads = Heads(7, 41, 16)
    heads.ref_weight = Heads(7, 43, 16).ref_weight
    with pytest.raises(ValueError, match="41 tokens and the reference's 43"):
        heads(position_kl)


# Numerics


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "shared-head"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_policy_equal_to_reference_has_kl_zero(dtype, tied):
    """Limit: KL exactly 0, not nearly; and a KL at its minimum, so κ does not move the gradient."""
    heads = Heads(41, 1271, 33, dtype=dtype, spread=6.0)
    heads.ref_hidden = heads.hidden.detach().clone()
    heads.ref_weight = heads.weight if tied else heads.weight.detach().clone()
    result = heads(position_kl)
    assert torch.equal(result["position_kl"], torch.zeros(41))
    assert torch.equal(result["log_probs"], result["ref_log_probs"])
    assert torch.equal(result["log_probs"], result["weighted"])

    gradients = heads.gradients(result["weighted"])
    heads.kl_weight.zero_()
    for name, without in heads.gradients(heads(position_kl)["weighted"]).items():
        torch.testing.assert_close(gradients[name], without, rtol=0, atol=TOLERANCES[dtype][1] * without.abs().max())


@pytest.mark.parametrize("drift", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("spread", [2.0, 6.0, 20.0])
def test_kl_is_never_negative(spread, drift):
    """A KL is never negative. At the start of training it is small, and a difference of two log-normalizers is noise."""
    heads = Heads(401, 1271, 33, spread=spread)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        heads.ref_hidden.copy_(heads.hidden + drift * torch.randn(401, 33, generator=generator))
        heads.ref_weight.copy_(heads.weight)
        assert heads(position_kl)["position_kl"].min() >= 0


def test_confident_distributions_stay_finite():
    """
    By hand: logits (200, 0) under the policy, (0, 200) under the reference. KL(ref || policy) = 200 nats, log p of token 1
    is -200. A `softmax().log()` gives inf - inf here. d log p(1) / d logits = (0, 1) - (1, 0), d KL / d logits = p - q =
    (1, 0) - (0, 1), so with κ = 3 the gradient is (-1, 1) + 3 (1, -1).
    """
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 200.0]]), torch.eye(2), None
    result = position_kl(hidden, torch.eye(2), None, *reference, torch.tensor([1]), torch.tensor([3.0]))
    torch.testing.assert_close(result.position_kl, torch.tensor([200.0]))
    torch.testing.assert_close(result.log_probs, torch.tensor([-200.0]))
    torch.testing.assert_close(result.ref_log_probs, torch.tensor([0.0]))
    torch.testing.assert_close(result.entropy, torch.tensor([0.0]))
    torch.testing.assert_close(result.weighted, torch.tensor([400.0]))
    torch.testing.assert_close(torch.autograd.grad(result.weighted, hidden)[0], torch.tensor([[2.0, -2.0]]))


@pytest.mark.parametrize("kept_rows", [7, 0], ids=["kept", "recomputed"])
def test_vocabulary_masked_in_the_reference(kept_rows):
    """Oracle: float64 full logits; if the reference has real -inf logits, the KL and all gradients are finite."""
    heads = Heads(7, 41, 16, bias=True)
    heads.labels.clamp_(max=30)
    heads.ref_bias.data[31:] = -math.inf
    check(heads, kept_gradient_bytes=kept_rows * 41 * 4)


def test_vocabulary_masked_in_the_policy():
    """
    By hand: the KL is infinite, since the reference may say what the policy cannot, but positions with a weight of 0
    (TDPO2's chosen side) ignore it: their output and gradient are those of the log-probability.
    """
    hidden = torch.tensor([[0.0, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -math.inf])
    ref = torch.zeros(1, 2), torch.ones(3, 2), None
    found = position_kl(hidden, torch.eye(3, 2), bias, *ref, torch.tensor([0]), torch.tensor([0.0]))
    assert found.position_kl.item() == math.inf
    assert found.weighted.item() == pytest.approx(-math.log(2))
    found.weighted.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.5, -0.5]]))


def test_vocabulary_masked_in_both():
    """Limit: real -inf logits in both models are a smaller vocabulary, in values and in gradients."""
    masked, smaller = Heads(7, 41, 16, bias=True), Heads(7, 41, 16, bias=True)
    for heads in (masked, smaller):
        heads.labels.clamp_(max=30)
    masked.bias.data[31:] = masked.ref_bias.data[31:] = -math.inf
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        setattr(smaller, name, getattr(smaller, name).detach()[:31].requires_grad_())
    actual, expected = masked(position_kl), smaller(position_kl)
    for name in actual.keys() - {"mean_logits"}:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")
    gradients, expected_gradients = masked.gradients(actual["weighted"]), smaller.gradients(expected["weighted"])
    torch.testing.assert_close(gradients["hidden"], expected_gradients["hidden"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(gradients[name][:31], expected_gradients[name])
        assert torch.equal(gradients[name][31:], torch.zeros_like(gradients[name][31:]))


# Work and memory


class HeadWork(TorchDispatchMode):
    """Counts matrix products that involve a whole vocabulary, and remembers the largest tensor with that many columns."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.flops, self.largest = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if self.vocabulary in (*a.shape, *b.shape):
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        is_view = function.overloadpacket is torch.ops.aten.t  # of the head
        if isinstance(result, torch.Tensor) and result.shape[1:] == (self.vocabulary,) and not is_view:
            self.largest = max(self.largest, result.size(0))
        return result


@pytest.mark.parametrize(
    ("function", "frozen", "dtype", "kept_bytes", "gemms", "largest"),
    [
        # What each ten of the positions cost
        (position_kl, ("weight",), torch.float32, 0, [3, 3, 3, 3], 10),
        (position_kl, (), torch.float32, 40 * 401 * 4, [4, 4, 4, 4], 40),
        (position_kl, (), torch.float32, 40 * 401 * 4 - 1, [4, 4, 4, 4 * 0.9 + 6 * 0.1], 39),  # one row does not fit
        (position_kl, (), torch.float32, 20 * 401 * 4, [4, 4, 6, 6], 20),
        (position_kl, (), torch.bfloat16, 20 * 401 * 2, [4, 4, 6, 6], 20),
        (position_kl, (), torch.float32, 0, [6, 6, 6, 6], 10),
        (position_kl, ("hidden",), torch.float32, 20 * 401 * 4, [3, 3, 5, 5], 20),
        (position_kl, ("hidden", "weight"), torch.float32, 0, [2, 2, 2, 2], 10),
        (log_probs, ("weight",), torch.float32, 0, [2, 2, 2, 2], 10),
        (log_probs, (), torch.float32, 20 * 401 * 4, [3, 3, 4, 4], 20),
        (log_probs, ("hidden", "weight"), torch.float32, 0, [1, 1, 1, 1], 10),
    ],
)
def test_head_gemms(monkeypatch, function, frozen, dtype, kept_bytes, gemms, largest):
    """By hand, in units of 2·N·V·H. TRL's DPO has 4 with a frozen head and 5 with a trained one, a reference included."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 10 * 401)
    heads = Heads(40, 401, 16, dtype=dtype).freeze(*frozen)
    with HeadWork(401) as work:
        output = next(iter(heads(function, kept_gradient_bytes=kept_bytes).values()))
        if output.requires_grad:
            heads.gradients(output)
    assert work.flops == pytest.approx(sum(gemms) * 2 * 10 * 401 * 16)
    assert work.largest == largest


@pytest.mark.parametrize(("function", "gemms"), [(position_kl, 2), (log_probs, 1)])
def test_no_grad_keeps_nothing(monkeypatch, function, gemms):
    """The numbers of a training step for the work of an evaluation, though head and hidden states want gradients."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 10 * 401)
    heads = Heads(40, 401, 16)
    expected = heads(function)
    with HeadWork(401) as work, torch.no_grad():
        result = heads(function)
    assert work.flops == gemms * 2 * 40 * 401 * 16
    assert work.largest == 10
    for name, value in result.items():
        assert not value.requires_grad
        assert torch.equal(value, expected[name]), name
