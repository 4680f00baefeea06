"""
`logits_tile.fold_tile` on CUDA: one Triton program per row, which reads the row twice, first for both models' `log Z`, then for the KL,
the entropy and the gradient. `logits_tile.py` explains the equations.
"""

import torch
import triton
import triton.language as tl

from .logits_tile import SMALL_DRIFT, Head


BLOCK_SIZE = 2048
NUM_WARPS = 8

_SMALL_DRIFT = tl.constexpr(SMALL_DRIFT)


@triton.jit
def _logits(z_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(z_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # tanh
    return z


@triton.jit
def _fold_exp(largest, total, z, mask):
    """One block of the online log-sum-exp, in which whole blocks may be −inf."""
    z = tl.where(mask, z, -float("inf"))
    new = tl.maximum(largest, tl.max(z, axis=0))
    shift = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)


@triton.jit
def _fold_kernel(
    z_ptr,
    ref_z_ptr,
    bias_ptr,
    ref_bias_ptr,
    labels_ptr,
    kl_weight_ptr,
    stats_ptr,
    gradient_ptr,
    z_stride,
    ref_z_stride,
    stats_stride,
    gradient_stride,
    vocab,
    scale,
    softcap,
    ref_scale,
    ref_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows times columns may exceed 2³¹
    z_ptr += row * z_stride
    ref_z_ptr += row * ref_z_stride
    gradient_ptr += row * gradient_stride
    stats_ptr += row
    label = tl.load(labels_ptr + row)
    block = tl.arange(0, BLOCK_SIZE)

    largest, total = -float("inf"), 0.0
    ref_largest, ref_total = -float("inf"), 0.0
    largest_before_label = -float("inf")
    z_sum = 0.0
    for start in range(0, vocab, BLOCK_SIZE):
        columns = start + block
        mask = columns < vocab
        z = _logits(z_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        largest, total = _fold_exp(largest, total, z, mask)
        z_sum += tl.sum(z, axis=0)  # 0 beyond the mask
        largest_before_label = tl.maximum(
            largest_before_label, tl.max(tl.where(columns < label, z, -float("inf")), axis=0)
        )
        if HAS_REFERENCE:
            ref_z = _logits(
                ref_z_ptr, ref_bias_ptr, columns, mask, ref_scale, ref_softcap, HAS_REF_BIAS, HAS_REF_SOFTCAP
            )
            ref_largest, ref_total = _fold_exp(ref_largest, ref_total, ref_z, mask)
    log_total = tl.log(total)  # of the exponentials of z − largest

    # Read before the gradient overwrites the logits
    z_label = _logits(z_ptr, bias_ptr, label, True, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    ref_log_total, ref_log_prob = 0.0, 0.0
    if HAS_REFERENCE:
        ref_log_total = tl.log(ref_total)
        ref_z_label = _logits(
            ref_z_ptr, ref_bias_ptr, label, True, ref_scale, ref_softcap, HAS_REF_BIAS, HAS_REF_SOFTCAP
        )
        ref_log_prob = (ref_z_label - ref_largest) - ref_log_total
    kl_weight = tl.load(kl_weight_ptr + row)
    kl = 0.0
    entropy = 0.0
    for start in range(0, vocab, BLOCK_SIZE):
        columns = start + block
        mask = columns < vocab
        z = _logits(z_ptr, bias_ptr, columns, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        log_p = (z - largest) - log_total
        p = tl.exp(log_p)
        entropy -= tl.sum(tl.where(mask & (p > 0), p * log_p, 0.0), axis=0)
        gradient = -p
        if HAS_REFERENCE:
            ref_z = _logits(
                ref_z_ptr, ref_bias_ptr, columns, mask, ref_scale, ref_softcap, HAS_REF_BIAS, HAS_REF_SOFTCAP
            )
            log_q = (ref_z - ref_largest) - ref_log_total
            q = tl.exp(log_q)
            x = log_p - log_q
            series = q * x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
            terms = tl.where(tl.abs(x) < _SMALL_DRIFT, series, tl.where(q > 0, p - q - q * x, p))
            kl += tl.sum(tl.where(mask, terms, 0.0), axis=0)
            gradient = (kl_weight - 1) * p - kl_weight * q
        if HAS_GRADIENT:
            gradient += tl.where(columns == label, 1.0, 0.0)
            if HAS_SOFTCAP:
                gradient *= 1 - (z / softcap) * (z / softcap)
            gradient *= scale
            tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)

    is_top1 = (z_label >= largest) & (z_label > largest_before_label)  # `argmax` is the first of equals
    tl.store(stats_ptr, (z_label - largest) - log_total)
    tl.store(stats_ptr + stats_stride, ref_log_prob)
    tl.store(stats_ptr + 2 * stats_stride, kl)
    tl.store(stats_ptr + 3 * stats_stride, entropy)
    tl.store(stats_ptr + 4 * stats_stride, z_sum / vocab)
    tl.store(stats_ptr + 5 * stats_stride, is_top1.to(tl.float32))


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
    """The Triton path of [`~kernels.logits_tile.fold_tile`], with the same arguments. Rows must be contiguous."""
    has_reference, has_gradient = ref_z is not None, gradient is not None
    # An unused pointer must be valid all the same
    ref_z, ref_head = (ref_z, ref_head) if has_reference else (z, head)
    gradient = gradient if has_gradient else z
    with torch.cuda.device_of(z):  # Triton launches on the current one
        _fold_kernel[(z.size(0),)](
            z,
            ref_z,
            z if head.bias is None else head.bias,
            z if ref_head.bias is None else ref_head.bias,
            labels,
            kl_weight,
            stats,
            gradient,
            z.stride(0),
            ref_z.stride(0),
            stats.stride(0),
            gradient.stride(0),
            z.size(1),
            float(head.scale),
            head.softcap or 1.0,
            float(ref_head.scale),
            ref_head.softcap or 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            HAS_REFERENCE=has_reference,
            HAS_REF_BIAS=has_reference and ref_head.bias is not None,
            HAS_REF_SOFTCAP=has_reference and ref_head.softcap is not None,
            HAS_GRADIENT=has_gradient,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
