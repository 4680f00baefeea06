"""
What is read off given logits, against float64: the numerics that the products of random hidden states do not reach.

`TILES` are also what the Triton path has to read like this one.
"""

import math

import pytest
import torch

from trl_ext.kernels import logits_tile
from trl_ext.kernels.logits_tile import SMALL_DRIFT, STATISTICS, Head, fold_tile, matmul_fp32


INF = math.inf

pytestmark = pytest.mark.usefixtures("single_thread")


class Tile:
    """
    Random products `h Wᵀ` of a policy and a reference near it, labels that include both ends of the vocabulary, and weights
    κ that include 0 and 1. `policy` and `reference` are scale and soft cap; `None` means no reference.
    """

    def __init__(
        self,
        rows,
        vocabulary,
        *,
        bias=None,
        policy=(1.0, None),
        ref_bias=None,
        reference=(1.0, None),
        spread=2.0,
        drift=0.3,
        device="cpu",
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        def head(bias, transform):
            return Head(None, None if bias is None else normal(vocabulary).to(device, bias), *transform)

        z = spread * normal(rows, vocabulary)
        self.z, self.head = z.to(device), head(bias, policy)
        self.ref_z, self.ref_head = (z + drift * normal(rows, vocabulary)).to(device), None
        if reference is None:
            self.ref_z = None
        else:
            self.ref_head = head(ref_bias, reference)
        self.labels = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        self.labels[1::3] = self.z.argmax(dim=-1)[1::3]
        self.labels[0], self.labels[-1] = 0, vocabulary - 1
        self.kl_weight = 1.5 * torch.rand(rows, generator=generator).to(device)
        self.kl_weight[0], self.kl_weight[-1] = 0, 1

    def fold(self, function=fold_tile, gradient_dtype=torch.float32) -> dict[str, torch.Tensor]:
        """
        [`STATISTICS`] by name, and `gradient` if its dtype is not None, which overwrites the logits if it is fp32. What
        is written to is what `position_kl` passes, some rows of something larger; the rest of it must stay as it is.
        """
        rows, vocabulary = self.z.shape
        z, ref_z = self.z.clone(), None if self.ref_z is None else self.ref_z.clone()
        stats = torch.full((len(STATISTICS), rows + 2), 7.0, device=z.device)
        larger = torch.full((rows + 2, vocabulary), 7.0, device=z.device, dtype=gradient_dtype or torch.float32)
        gradient = z if gradient_dtype == torch.float32 else None if gradient_dtype is None else larger[1:-1]
        function(z, self.head, ref_z, self.ref_head, self.labels, self.kl_weight, stats[:, 1:-1], gradient)
        assert (stats[:, [0, -1]] == 7).all()
        assert (larger[[0, -1]] == 7).all()
        result = dict(zip(STATISTICS, stats[:, 1:-1], strict=True))
        return result if gradient is None else result | {"gradient": gradient}


def masked(tile: Tile, *columns: slice, models=("z", "ref_z")) -> Tile:
    """-inf in these columns; the labels stay where they are."""
    for model in models:
        for some in columns:
            getattr(tile, model)[:, some] = -INF
    return tile


def extreme(device) -> Tile:
    """Logits of ±1e4, and rows that are all at one end."""
    tile = Tile(6, 401, spread=1.0, drift=1.0, device=device)
    for logits in (tile.z, tile.ref_z):
        logits[:4, ::3] += 1e4
        logits[:4, 1::3] -= 1e4
        logits[4] += 1e4
        logits[5] -= 1e4
    return tile


def ties(device) -> Tile:
    """Seven words share the largest logit, of which one is the label."""
    tile = Tile(7, 401, device=device)
    columns = [3, 127, 128, 129, 300, 399, 400]
    tile.z[:, columns] = 20.0
    tile.labels.copy_(torch.tensor(columns))
    return tile


# Name -> device -> tile. 128 columns are a block in the tests of the Triton path with small blocks.
TILES = {
    "plain": lambda device: Tile(7, 401, device=device),
    "one row": lambda device: Tile(1, 1271, device=device),
    "less than a block": lambda device: Tile(3, 41, device=device),
    "ends on a block": lambda device: Tile(3, 256, bias=torch.float32, ref_bias=torch.float32, device=device),
    "a column over": lambda device: Tile(3, 257, device=device),
    "all different": lambda device: Tile(
        4,
        401,
        bias=torch.bfloat16,
        policy=(0.5, 2.0),
        ref_bias=torch.float32,
        reference=(1.5, 5.0),
        device=device,
    ),
    "policy only": lambda device: Tile(4, 401, bias=torch.float32, policy=(0.5, 2.0), device=device),
    "reference only": lambda device: Tile(4, 401, ref_bias=torch.float32, reference=(1.5, 5.0), device=device),
    "no reference": lambda device: Tile(4, 401, reference=None, device=device),
    "no reference, transformed": lambda device: Tile(
        4, 401, bias=torch.float32, policy=(0.5, 2.0), reference=None, device=device
    ),
    "masked reference": lambda device: masked(
        Tile(4, 401, device=device), slice(0, 130), slice(200, 300), slice(330, None), models=["ref_z"]
    ),
    "masked policy": lambda device: masked(Tile(4, 401, device=device), slice(0, 130), slice(330, None), models=["z"]),
    "masked both": lambda device: masked(Tile(4, 401, device=device), slice(0, 130), slice(330, None)),
    "masked, soft-capped": lambda device: masked(
        Tile(4, 401, policy=(0.5, 2.0), reference=(1.5, 5.0), device=device), slice(0, 130), slice(330, None)
    ),
    "masked, no reference": lambda device: masked(
        Tile(4, 401, reference=None, device=device), slice(0, 130), slice(330, None), models=["z"]
    ),
    "extreme": extreme,
    "extreme, soft-capped": lambda device: Tile(
        4, 401, policy=(1.0, 30.0), reference=(1.0, 30.0), spread=1e4, drift=1e3, device=device
    ),
    "ties": ties,
}


def in_float64(tile: Tile) -> dict[str, torch.Tensor]:
    """
    The oracle: with `p` and `q` the two softmaxes, `Σ q (log q − log p)`, `−Σ p log p` and autograd's gradient of
    `log p(y) + κ KL` with respect to the products. A word of probability 0 adds nothing to a sum.
    """

    def log_softmax(z, head):
        z = (z if head.bias is None else z + head.bias) * head.scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return z, z.log_softmax(dim=-1)

    product = tile.z.double().requires_grad_()
    rows = torch.arange(len(product), device=product.device)
    z, log_p = log_softmax(product, tile.head)
    p = log_p.exp()
    ref_log_probs = kl = torch.zeros_like(log_p[:, 0])
    if tile.ref_z is not None:
        _, log_q = log_softmax(tile.ref_z.double(), tile.ref_head)
        ref_log_probs, q = log_q[rows, tile.labels], log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=-1)
    log_probs = log_p[rows, tile.labels]
    # κ KL without 0 · inf
    weighted = log_probs + torch.where(tile.kl_weight == 0, 0.0, tile.kl_weight * kl)
    (gradient,) = torch.autograd.grad(weighted.sum(), product)
    return {
        "log_probs": log_probs,
        "ref_log_probs": ref_log_probs,
        "position_kl": kl,
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1),
        "mean_logits": z.mean(dim=-1),
        "is_top1": (z.argmax(dim=-1) == tile.labels).double(),
        "gradient": gradient,
    }


def assert_close(actual: dict, expected: dict, **tolerances):
    for name, value in actual.items():
        torch.testing.assert_close(
            value.double(), expected[name].double(), **tolerances, msg=lambda m, n=name: f"{n}: {m}"
        )


# Logits of 1e4 have steps of 1e-3 in fp32
TOLERANCES = {"extreme": {"rtol": 1e-5, "atol": 1e-3}}


@pytest.mark.parametrize("name", TILES)
def test_values_and_gradients(name):
    """Oracle: float64."""
    tile = TILES[name]("cpu")
    assert_close(tile.fold(), in_float64(tile), **TOLERANCES.get(name, {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("name", ["all different", "no reference"])
def test_other_gradients(name):
    """Limits: in a bf16 buffer, the same gradient rounded; without a gradient, the same statistics."""
    tile = TILES[name]("cpu")
    expected = tile.fold()
    expected["gradient"] = expected["gradient"].bfloat16()
    assert_close(tile.fold(gradient_dtype=torch.bfloat16), expected, rtol=0, atol=0)
    assert_close(tile.fold(gradient_dtype=None), expected, rtol=0, atol=0)


def exact_kl(tile: Tile) -> torch.Tensor:
    """`KL(q‖p) = Σ q (eˣ − 1 − x)` with `x = log p − log q`, in float64: no terms of different signs cancel."""
    log_p, log_q = tile.z.double().log_softmax(dim=-1), tile.ref_z.double().log_softmax(dim=-1)
    x = log_p - log_q
    return (log_q.exp() * (torch.expm1(x) - x)).sum(dim=-1)


def check_small_kl(spread: float, drift: float, function=fold_tile, device="cpu"):
    tile = Tile(41, 1271, spread=spread, drift=drift, device=device)
    kl, exact = tile.fold(function)["position_kl"].double(), exact_kl(tile)
    assert kl.min() >= 0
    # Besides its own error, what the rounding of log Z to fp32 alone does to it: half the square of two such steps
    step = 2**-23 * tile.z.double().logsumexp(dim=-1).abs().max().item()
    torch.testing.assert_close(kl, exact, rtol=1e-3, atol=2 * step**2)


@pytest.mark.parametrize("drift", [1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("spread", [2.0, 6.0, 20.0])
def test_small_kls_are_accurate(spread, drift):
    """Oracle: float64, for KLs down to 1e-9, of which `Σ q (log q − log p)` in fp32 has no digit."""
    check_small_kl(spread, drift)


def check_series(function=fold_tile, device="cpu"):
    """Oracle: float64, for drifts up to where the series ends and mostly of one sign: its last term is 8e-6 of the KL."""
    tile = Tile(3, 401, spread=0.5, drift=0.0, device=device)
    tile.ref_z[:, ::5] -= 0.29
    x = tile.z.double().log_softmax(dim=-1) - tile.ref_z.double().log_softmax(dim=-1)
    assert 0.95 * SMALL_DRIFT < x.abs().max() < SMALL_DRIFT
    torch.testing.assert_close(tile.fold(function)["position_kl"].double(), exact_kl(tile), rtol=1e-5, atol=0)


def test_series():
    check_series()


def test_kl_terms():
    """Oracle: `q (eˣ − 1 − x)` in float64, on both sides of where the series begins and at both ends."""
    x = torch.tensor([-80.0, -1.0, -SMALL_DRIFT, -0.2499, -1e-2, -1e-5, 0.0, 1e-5, 0.2499, SMALL_DRIFT, 1.0, 3.0])
    q = torch.tensor(2.0**-8)
    log_q, log_p = q.log(), q.log() + x.double()
    terms = logits_tile._kl_terms(log_p.float(), log_p.exp().float(), log_q, q)
    drift = (log_p.float() - log_q).double()  # what is left of x in fp32
    torch.testing.assert_close(terms.double(), q * (torch.expm1(drift) - drift), rtol=2e-5, atol=0)


@pytest.mark.parametrize("log_p", [-2.0, -INF])
def test_kl_terms_of_a_word_the_reference_cannot_say(log_p):
    """By hand: `lim q→0 of p − q − q x` is p, also if p is 0, and if q is too small for fp32."""
    log_p, log_q = torch.tensor([log_p, log_p]), torch.tensor([-INF, -120.0])
    assert torch.equal(logits_tile._kl_terms(log_p, log_p.exp(), log_q, log_q.exp()), log_p.exp())


@pytest.mark.parametrize(
    ("a_dtype", "dtype", "chunk"),
    [
        (torch.float32, torch.float32, 8192),
        (torch.float32, torch.bfloat16, 133),
        (torch.bfloat16, torch.float32, 133),
        (torch.bfloat16, torch.bfloat16, 401),
        (torch.bfloat16, torch.bfloat16, 8192),
    ],
    ids=str,
)
def test_matmul_fp32(monkeypatch, a_dtype, dtype, chunk):
    """Oracle: float64; bf16 factors are exact in fp32, and the product is not rounded to bf16."""
    monkeypatch.setattr(logits_tile, "VOCAB_CHUNK_SIZE", chunk)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(401, 33, generator=generator).to(dtype)
    for columns, transposed in ((401, False), (33, True)):
        a = torch.randn(7, columns, generator=generator).to(a_dtype)
        expected = a.double() @ (weight.t() if transposed else weight).double()
        out = torch.full(expected.shape, INF)  # whatever was there before
        result = matmul_fp32(a, weight, out, transposed)
        assert result is out
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(matmul_fp32(a, weight, transposed=transposed), result)
