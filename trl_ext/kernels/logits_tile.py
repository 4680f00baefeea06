"""
Reads everything off a tile of logits at once: a few whole rows of `h Wᵀ` in fp32.

In: the products of one or two models' hidden states and LM heads. Out: a few numbers per row, and the gradient of
`log p(y) + κ KL(q‖p)` with respect to the product. On CUDA it is one Triton program per row
(`logits_tile_triton.py`), elsewhere torch in blocks that stay in the cache. The torch path is the readable one, and
the oracle of the other.
"""

from typing import NamedTuple

import torch
from transformers.utils import is_triton_available


# Elements that torch works on at a time, by device: 1 MiB in fp32 on a CPU, 64 MiB on a GPU without Triton
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
# Columns of a bf16 head that are converted at a time on a CPU, whose GEMM cannot take bf16 and return fp32
VOCAB_CHUNK_SIZE = 8192
# Below this |log p − log q|, φ is summed as a series: eˣ − 1 − x loses all digits there
SMALL_DRIFT = 0.25
# Statistics of a row, in this order
STATISTICS = ("log_probs", "ref_log_probs", "position_kl", "entropy", "mean_logits", "is_top1")


class Head(NamedTuple):
    """An LM head and how its logits are transformed: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    scale: float
    softcap: float | None


def matmul_fp32(
    a: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """`a @ weight`, or `a @ weight.T`, in `a`'s dtype with an fp32 result, a `(V, H)` weight converted as it goes."""
    if out is None:
        out = torch.empty((a.size(0), weight.size(0 if transposed else 1)), device=a.device, dtype=torch.float32)
    if a.dtype == torch.float32 and weight.dtype == torch.float32:
        return torch.mm(a, weight.t() if transposed else weight, out=out)
    if a.device.type == "cuda":
        w = weight.to(a.dtype)
        return torch.mm(a, w.t() if transposed else w, out_dtype=torch.float32, out=out)
    # A CPU's GEMM returns its inputs' dtype, so the head is converted to fp32, some columns at a time
    a = a.float()
    for start in range(0, weight.size(0), VOCAB_CHUNK_SIZE):
        columns = slice(start, min(start + VOCAB_CHUNK_SIZE, weight.size(0)))
        w = weight[columns].float()
        if transposed:
            torch.mm(a, w.t(), out=out[:, columns])
        else:
            out.addmm_(a[:, columns], w, beta=int(start > 0))
    return out


def fold_tile(
    z: torch.Tensor,
    head: Head,
    ref_z: torch.Tensor | None,
    ref_head: Head | None,
    labels: torch.Tensor,
    kl_weight: torch.Tensor,
    stats: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """
    Read the statistics and the gradient tile off n rows of logits.

    Args:
        z, ref_z (`torch.Tensor` of shape `(n, V)`):
            The products `h Wᵀ` of the policy and of the reference, in fp32. Overwritten. Without a reference, the
            statistics that need one are 0.
        head, ref_head ([`Head`]):
            The heads' biases and transforms.
        labels (`torch.Tensor` of shape `(n,)`), kl_weight (`torch.Tensor` of shape `(n,)`):
            The label y and the weight κ of each row.
        stats (`torch.Tensor` of shape `(6, n)`):
            Filled with [`STATISTICS`], in fp32.
        gradient (`torch.Tensor` of shape `(n, V)`, *optional*):
            Filled with `∂(log p(y) + κ KL(q‖p))/∂z`, in its own dtype. It may be `z` itself.
    """
    if z.device.type == "cuda" and is_triton_available():
        from .logits_tile_triton import fold_tile as fold_tile_triton

        return fold_tile_triton(z, head, ref_z, ref_head, labels, kl_weight, stats, gradient)

    height = max(1, BLOCK_ELEMENTS.get(z.device.type, BLOCK_ELEMENTS["cuda"]) // z.size(1))
    for start in range(0, z.size(0), height):
        rows = slice(start, start + height)
        _fold_block(
            z[rows],
            head,
            None if ref_z is None else ref_z[rows],
            ref_head,
            labels[rows].unsqueeze(-1),
            kl_weight[rows].unsqueeze(-1),
            stats[:, rows],
            None if gradient is None else gradient[rows],
        )


def _fold_block(z, head, ref_z, ref_head, labels, kl_weight, stats, gradient) -> None:
    z = _transform_(z, head)
    log_probs, ref_log_probs, position_kl, entropy, mean_logits, is_top1 = stats
    mean_logits.copy_(z.mean(dim=-1))
    is_top1.copy_(z.argmax(dim=-1, keepdim=True).eq(labels).squeeze(-1))
    # The derivative of softcap · tanh(y / softcap) in y is 1 − (z / softcap)²
    slope = 1.0 if head.softcap is None else 1 - (z / head.softcap).square_()
    log_p, p = _log_softmax_(z)
    log_probs.copy_(log_p.gather(-1, labels).squeeze(-1))
    entropy.copy_(torch.mul(p, log_p).nansum(dim=-1).neg_())  # 0 · log 0 is 0
    if ref_z is None:
        ref_log_probs.zero_()
        position_kl.zero_()
    else:
        log_q, q = _log_softmax_(_transform_(ref_z, ref_head))
        ref_log_probs.copy_(log_q.gather(-1, labels).squeeze(-1))
        position_kl.copy_(_kl_terms(log_p, p, log_q, q).sum(dim=-1))
    if gradient is None:
        return
    # ∂/∂z of log p(y) + κ KL(q‖p) is onehot(y) − (1 − κ) p − κ q
    tile = -p if ref_z is None else p.mul_(kl_weight - 1).sub_(q.mul_(kl_weight))
    tile.scatter_add_(-1, labels, torch.ones_like(labels, dtype=torch.float32))
    gradient.copy_(tile.mul_(slope).mul_(head.scale))


def _transform_(z: torch.Tensor, head: Head) -> torch.Tensor:
    if head.bias is not None:
        z += head.bias.float()
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z


def _log_softmax_(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the logits by `log p`, and return it and `p`."""
    z -= z.amax(dim=-1, keepdim=True)
    p = z.exp()
    total = p.sum(dim=-1, keepdim=True)
    return z.sub_(total.log()), p.div_(total)


def _kl_terms(log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """
    The terms of `KL(q‖p) = Σ q φ(x)` with `x = log p − log q` and `φ(x) = eˣ − 1 − x ≥ 0`: never negative, and accurate
    for small drifts, for which the terms of `Σ q (log q − log p)` cancel. If q is 0 (a masked vocabulary), `q φ` is p.
    """
    x = log_p - log_q
    series = x / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series.add_(coefficient).mul_(x)
    series.mul_(x).mul_(q)
    terms = torch.where(q > 0, p - q - q * x, p)
    return torch.where(x.abs_() < SMALL_DRIFT, series, terms)
