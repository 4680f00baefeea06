"""
The fused position KL: what token-level DPO needs from two LM heads, in fewer head GEMMs than DPO itself.

Per token, with policy logits z, distributions p (policy) and q (reference) and label y, `d log p(y)/dz = onehot(y) − p` and
`d KL(q‖p)/dz = p − q`. The weight κ of the KL against the log-probability is known before the loss is (TDPO1: 1; TDPO2: 0
on the chosen side, α on the rejected one), so one differentiable output `u = log p(y) + κ KL` is enough, and its gradient
tile `G = onehot(y) − (1−κ)p − κq` can be formed in the forward, while both tiles of logits are at hand:

- frozen head (LoRA, QLoRA): keep the Jacobian `∂u/∂h = G W`, `[N, H]`; the backward is elementwise. 3 GEMMs of
  `2·N·V·H` FLOP in all (policy, reference, Jacobian), where TRL's DPO has 4.
- trained head: `∂/∂W = (g·G)ᵀ h` needs the upstream gradient g, so G is kept too: 4 GEMMs, TRL's DPO has 5. Where G would
  exceed `kept_gradient_bytes` the backward recomputes it: 6.

Tiles are whole rows of logits, `TILE_ELEMENTS` at a time, in fp32; `[N, V]` never exists but as the kept G.
"""

from typing import NamedTuple

import torch
from trl.kernels.chunked_logprob import _addmm_fp32
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .position_kl import check_vocabularies


# Elements of a tile of logits, by device: 64 MiB in fp32 on a CPU; 512 MiB on a GPU, where fewer rows would starve the GEMM
TILE_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
# Columns of a bf16 head that are converted at a time where a GEMM cannot take bf16 and return fp32 (on a CPU)
VOCAB_CHUNK_SIZE = 8192


class FusedPositionKL(NamedTuple):
    """
    Per-position results in fp32, each a `torch.Tensor` of shape `(N,)`. Gradient flows from `weighted` only, and to the
    policy only.
    """

    weighted: torch.Tensor  # log π(label) + κ KL(π_ref ‖ π), nats
    log_probs: torch.Tensor  # log π(label), nats
    ref_log_probs: torch.Tensor  # log π_ref(label), nats
    position_kl: torch.Tensor  # KL(π_ref ‖ π) over the whole vocabulary, nats
    entropy: torch.Tensor  # entropy of π, nats
    mean_logits: torch.Tensor  # mean of the policy's logits over the vocabulary
    is_top1: torch.Tensor  # whether the label is the policy's most likely token


class Head(NamedTuple):
    """An LM head and how its logits are transformed: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    scale: float
    softcap: float | None


def fused_position_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    kl_weight: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    kept_gradient_bytes: int = 2**30,
) -> FusedPositionKL:
    """
    [`~kernels.position_kl.position_kl`] with one differentiable output, `log π(y_t|s_t) + κ_t KL(π_ref(·|s_t) ‖ π(·|s_t))`.

    Args:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, logit_scale, softcap, ref_logit_scale, ref_softcap:
            As for [`~kernels.position_kl.position_kl`].
        kl_weight (`torch.Tensor` of shape `(N,)`):
            κ at each position.
        kept_gradient_bytes (`int`, *optional*, defaults to 1 GiB):
            With a trained head, the largest `[N, V]` gradient tile kept from the forward to the backward.

    Returns:
        [`FusedPositionKL`].

    Raises:
        `ValueError`: the two heads have different vocabularies, so no KL is defined between them.
    """
    with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(ref_weight, ref_bias):
        check_vocabularies(weight, ref_weight)
        # fmt: off
        outputs = _FusedPositionKLFunction.apply(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, kl_weight,
            logit_scale, softcap, ref_logit_scale, ref_softcap, kept_gradient_bytes, torch.is_grad_enabled(),
        )
        # fmt: on
    return FusedPositionKL(*outputs)


class _FusedPositionKLFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,  # (N, H)
        weight,
        bias,
        ref_hidden,  # (N, H_ref)
        ref_weight,
        ref_bias,
        labels,  # (N,)
        kl_weight,  # (N,)
        logit_scale,
        softcap,
        ref_logit_scale,
        ref_softcap,
        kept_gradient_bytes,
        grad_enabled,
    ):
        count, vocab, device = hidden.size(0), weight.size(0), hidden.device
        ctx.set_materialize_grads(False)
        ctx.compute_dtype = _compute_dtype(hidden)
        ctx.transforms = (logit_scale, softcap, ref_logit_scale, ref_softcap)
        head = Head(weight, bias, logit_scale, softcap)
        ref_head = Head(ref_weight, ref_bias, ref_logit_scale, ref_softcap)
        trains_hidden, trains_head = (
            grad_enabled and ctx.needs_input_grad[0],
            grad_enabled and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]),
        )
        keeps_gradient = trains_head and count * vocab * ctx.compute_dtype.itemsize <= kept_gradient_bytes

        stats = torch.empty((6, count), device=device, dtype=torch.float32)
        jacobian = torch.empty(hidden.shape, device=device, dtype=ctx.compute_dtype) if trains_hidden else None
        gradient = torch.empty((count, vocab), device=device, dtype=ctx.compute_dtype) if keeps_gradient else None
        for rows in _tiles(count, vocab, device):
            policy = _logits_tile(hidden[rows], head, ctx.compute_dtype)
            reference = _logits_tile(ref_hidden[rows], ref_head, ctx.compute_dtype)
            with_gradient = trains_hidden or keeps_gradient
            stats[:, rows], tile = _fold_tile(policy, reference, labels[rows], kl_weight[rows], head, with_gradient)
            if with_gradient:
                tile = tile.to(ctx.compute_dtype)
            if trains_hidden:
                jacobian[rows] = _matmul_fp32(tile, weight).to(ctx.compute_dtype)
            if keeps_gradient:
                gradient[rows] = tile

        log_probs, ref_log_probs, kl, entropy, mean_logits, is_top1 = stats
        weighted = log_probs + kl_weight * kl
        is_top1 = is_top1.bool()
        ctx.mark_non_differentiable(log_probs, ref_log_probs, kl, entropy, mean_logits, is_top1)
        # What the recomputing path needs is saved for it alone
        recomputes = trains_head and not keeps_gradient
        again = (ref_hidden, ref_weight, ref_bias, labels, kl_weight) if recomputes else (None,) * 5
        ctx.save_for_backward(jacobian, gradient, *((hidden, weight, bias) if trains_head else (None,) * 3), *again)
        return weighted, log_probs, ref_log_probs, kl, entropy, mean_logits, is_top1

    @staticmethod
    def backward(ctx, grad_weighted, *_):
        jacobian, gradient, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, kl_weight = (
            ctx.saved_tensors
        )
        if grad_weighted is None:
            return (None,) * 14
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad_weighted.unsqueeze(1).to(jacobian.dtype) * jacobian  # (N, H)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            logit_scale, softcap, ref_logit_scale, ref_softcap = ctx.transforms
            with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(ref_weight, ref_bias):
                vocab, device = weight.size(0), hidden.device
                head = Head(weight, bias, logit_scale, softcap)
                ref_head = Head(ref_weight, ref_bias, ref_logit_scale, ref_softcap)
                # Accumulated over tiles in fp32, even when the inputs are not
                total_weight = torch.zeros(weight.shape, device=device, dtype=torch.float32)
                total_bias = None if bias is None else torch.zeros(bias.shape, device=device, dtype=torch.float32)
                for rows in _tiles(hidden.size(0), vocab, device):
                    if gradient is not None:
                        tile = gradient[rows]
                    else:
                        policy = _logits_tile(hidden[rows], head, ctx.compute_dtype)
                        reference = _logits_tile(ref_hidden[rows], ref_head, ctx.compute_dtype)
                        _, tile = _fold_tile(policy, reference, labels[rows], kl_weight[rows], head, True)
                        tile = tile.to(ctx.compute_dtype)
                    # (g·G)ᵀ h = Gᵀ (g·h): scaling H columns instead of V
                    scaled = (grad_weighted[rows].unsqueeze(1) * hidden[rows].float()).to(ctx.compute_dtype)
                    _addmm_fp32(total_weight, tile.t(), scaled)
                    if total_bias is not None:
                        total_bias += grad_weighted[rows] @ tile.float()
            grad_weight = total_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = total_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, *(None,) * 11


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _tiles(count: int, vocab: int, device: torch.device):
    rows = max(1, TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"]) // vocab)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _logits_tile(hidden: torch.Tensor, head: Head, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformed logits of n positions, `(n, V)` in fp32 (bf16 ones would bias the KL), and their `log Z`, `(n, 1)`."""
    z = _matmul_fp32(hidden.to(dtype), head.weight, transposed=True)
    if head.bias is not None:
        z += head.bias.float()
    if head.scale != 1.0:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z, torch.logsumexp(z, dim=-1, keepdim=True)


def _fold_tile(
    policy: tuple[torch.Tensor, torch.Tensor],
    reference: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    kl_weight: torch.Tensor,
    head: Head,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Everything that is read off one tile of both models' logits, which it overwrites.

    Returns:
        `tuple`: statistics, `(6, n)`, in the order of [`FusedPositionKL`] from `log_probs` on, and the gradient tile
        `∂u/∂(h Wᵀ)`, `(n, V)`.
    """
    (z, log_z), (ref_z, ref_log_z) = policy, reference
    mean_logits = z.mean(dim=-1)
    # The derivative of softcap · tanh(y / softcap) in y is 1 − (z / softcap)²
    slope = None if head.softcap is None else 1 - (z / head.softcap).square_()
    log_p, log_q = z.sub_(log_z), ref_z.sub_(ref_log_z)  # (n, V)
    log_probs, ref_log_probs = (x.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    is_top1 = log_p.argmax(dim=-1) == labels

    # KL(q‖p) = Σ q φ(log p − log q) with φ(x) = eˣ − 1 − x ≥ 0: never negative, and exact for small drifts, where the
    # terms of Σ q (log q − log p) cancel. Where q is 0 (a masked vocabulary), q φ is p
    x = log_p - log_q
    terms = torch.expm1(x).sub_(x)
    p, q = torch.exp(log_p, out=x), log_q.exp_()
    kl = torch.where(q > 0, terms.mul_(q), p).sum(dim=-1)
    entropy = -torch.mul(p, log_p, out=terms).nansum(dim=-1)  # 0 · log 0 is 0
    stats = torch.stack([log_probs, ref_log_probs, kl, entropy, mean_logits, is_top1.float()])
    if not with_gradient:
        return stats, None

    kl_weight = kl_weight.unsqueeze(-1)
    gradient = p.mul_(kl_weight - 1).sub_(q.mul_(kl_weight))  # −(1−κ)p − κq
    gradient.scatter_add_(-1, labels.unsqueeze(-1), torch.ones_like(labels, dtype=torch.float32).unsqueeze(-1))
    if slope is not None:
        gradient *= slope
    if head.scale != 1.0:
        gradient *= head.scale
    return stats, gradient


def _matmul_fp32(a: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """`a @ weight`, or `a @ weight.T`, in `a`'s dtype with an fp32 result, a `(V, H)` weight converted as it goes."""
    if a.dtype == torch.float32 and weight.dtype == torch.float32:
        return torch.mm(a, weight.t() if transposed else weight)
    if a.device.type == "cuda":
        w = weight.to(a.dtype)
        return torch.mm(a, w.t() if transposed else w, out_dtype=torch.float32)
    # A CPU's GEMM returns what it is given, so the head goes through fp32, some columns at a time
    vocab, width = weight.shape
    a = a.float()
    result = a.new_empty(a.size(0), vocab) if transposed else a.new_zeros(a.size(0), width)
    for start in range(0, vocab, VOCAB_CHUNK_SIZE):
        columns = slice(start, min(start + VOCAB_CHUNK_SIZE, vocab))
        w = weight[columns].float()
        if transposed:
            torch.mm(a, w.t(), out=result[:, columns])
        else:
            result.addmm_(a[:, columns], w)
    return result
