"""
Computes log-probabilities and the KL at each position from hidden states and LM heads, in fewer head GEMMs than DPO.

In: hidden states of N completion positions under the policy and the reference, both heads, the labels. Out: a few numbers
per position. Neither model's `[N, V]` logits exist in full: they are walked in tiles of whole rows, in fp32.

Per token, with policy logits z, distributions p (policy) and q (reference) and label y, `d log p(y)/dz = onehot(y) − p` and
`d KL(q‖p)/dz = p − q`. The weight κ of the KL relative to the log-probability is known before the loss (TDPO1: 1; TDPO2: 0
for chosen, α for rejected), so one differentiable output `u = log p(y) + κ KL` is enough, and its gradient
tile `G = onehot(y) − (1−κ)p − κq` can be formed in the forward, when both tiles of logits exist:

- frozen head (LoRA, QLoRA): keep the Jacobian `∂u/∂h = G W`, `[N, H]`; the backward is elementwise. 3 GEMMs of
  `2·N·V·H` FLOP in all (policy, reference, Jacobian); TRL's DPO has 4.
- trained head: `∂/∂W = (g·G)ᵀ h` needs the upstream gradient g, so G is kept too: 4 GEMMs; TRL's DPO has 5. Rows of G
  beyond `kept_gradient_bytes` are recomputed in the backward, which takes 6 GEMMs for them.

Without a reference, [`log_probs`] does the same for plain DPO: 2 and 3 GEMMs for the policy; TRL has 3 and 4.
"""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from trl.kernels.chunked_logprob import _addmm_fp32
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .logits_tile import STATISTICS, Head, fold_tile, matmul_fp32


# Elements of a tile of logits, by device: 32 MiB in fp32 on a CPU; 256 MiB on a GPU (523 rows at a vocabulary of 128k), which
# smaller GEMMs would leave idle
TILE_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
KEPT_GRADIENT_BYTES = 2**30


class PositionKL(NamedTuple):
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


class LogProbs(NamedTuple):
    """Per-position results in fp32, each a `torch.Tensor` of shape `(N,)`. Gradient flows from `log_probs` only."""

    log_probs: torch.Tensor  # log π(label), nats
    entropy: torch.Tensor  # entropy of π, nats
    mean_logits: torch.Tensor  # mean of the logits over the vocabulary
    is_top1: torch.Tensor  # whether the label is the most likely token


def position_kl(
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
    kept_gradient_bytes: int = KEPT_GRADIENT_BYTES,
) -> PositionKL:
    """
    Compute `log π(y_t|s_t)`, `log π_ref(y_t|s_t)` and `KL(π_ref(·|s_t) ‖ π(·|s_t))` at N positions, with one differentiable
    output, `log π(y_t|s_t) + κ_t KL(π_ref(·|s_t) ‖ π(·|s_t))`.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            The policy's last hidden states.
        weight (`torch.Tensor` of shape `(V, H)`), bias (`torch.Tensor` of shape `(V,)`, *optional*):
            The policy's LM head.
        ref_hidden (`torch.Tensor` of shape `(N, H_ref)`), ref_weight (`torch.Tensor` of shape `(V, H_ref)`), ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            The reference's hidden states and head. They get no gradient.
        labels (`torch.Tensor` of shape `(N,)`):
            The next token at each position.
        kl_weight (`torch.Tensor` of shape `(N,)`):
            κ at each position.
        logit_scale, ref_logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap, ref_softcap (`float`, *optional*):
            Final logit soft-capping, `softcap · tanh(logits / softcap)`, applied after the scale.
        kept_gradient_bytes (`int`, *optional*, defaults to 1 GiB):
            With a trained head, how much of the `[N, V]` gradient tile is kept from the forward to the backward, in bytes.

    Returns:
        [`PositionKL`], in fp32.

    Raises:
        `ValueError`: the two heads have different vocabularies.
    """
    head, ref_head = Head(weight, bias, logit_scale, softcap), Head(ref_weight, ref_bias, ref_logit_scale, ref_softcap)
    weighted, stats = _apply(hidden, head, ref_hidden, ref_head, labels, kl_weight, kept_gradient_bytes)
    return PositionKL(weighted, *stats[:-1], stats[-1].bool())


def log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept_gradient_bytes: int = KEPT_GRADIENT_BYTES,
) -> LogProbs:
    """
    Compute `log π(y_t|s_t)` at N positions, and the statistics that DPO logs. The arguments are those of [`position_kl`].

    Returns:
        [`LogProbs`], in fp32.
    """
    head = Head(weight, bias, logit_scale, softcap)
    no_kl = hidden.new_zeros(hidden.size(0), dtype=torch.float32)
    weighted, stats = _apply(hidden, head, None, None, labels, no_kl, kept_gradient_bytes)
    stats = dict(zip(STATISTICS, stats, strict=True))
    return LogProbs(weighted, stats["entropy"], stats["mean_logits"], stats["is_top1"].bool())


def _apply(
    hidden: torch.Tensor,
    head: Head,
    ref_hidden: torch.Tensor | None,
    ref_head: Head | None,
    labels: torch.Tensor,
    kl_weight: torch.Tensor,
    kept_gradient_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `log p(y) + κ KL(q‖p)`, `(N,)`, and [`STATISTICS`], `(6, N)`."""
    with _gathered(head), _gathered(ref_head):
        if ref_head is not None and head.weight.size(0) != ref_head.weight.size(0):
            raise ValueError(
                f"The policy's LM head has {head.weight.size(0)} tokens and the reference's {ref_head.weight.size(0)}. A KL "
                "needs the same vocabulary: pass a `ref_model` with the policy's."
            )
        # fmt: off
        return _PositionKLFunction.apply(
            hidden, *head, ref_hidden, *(ref_head or (None,) * 4),
            labels.contiguous(), kl_weight.float().contiguous(), kept_gradient_bytes, torch.is_grad_enabled(),
        )
        # fmt: on


def _gathered(head: Head | None) -> contextlib.AbstractContextManager:
    """Within this context, ZeRO-3 gathers the head's parts."""
    return contextlib.nullcontext() if head is None else maybe_gather_lm_head_ctx(head.weight, head.bias)


class _PositionKLFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,  # (N, H)
        weight,
        bias,
        scale,
        softcap,
        ref_hidden,  # (N, H_ref)
        ref_weight,
        ref_bias,
        ref_scale,
        ref_softcap,
        labels,  # (N,)
        kl_weight,  # (N,)
        kept_gradient_bytes,
        grad_enabled,
    ):
        count, vocab, dtype = hidden.size(0), weight.size(0), _compute_dtype(hidden)
        trains_hidden, trains_weight, trains_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        trains_head = trains_weight or trains_bias
        kept = min(count, kept_gradient_bytes // (vocab * dtype.itemsize)) if trains_head else 0  # rows of G

        head, ref_head = Head(weight, bias, scale, softcap), Head(ref_weight, ref_bias, ref_scale, ref_softcap)
        tiles = _Tiles(dtype, hidden, head, ref_hidden, ref_head, labels, kl_weight)
        stats = torch.empty((len(STATISTICS), count), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty((kept, vocab), device=hidden.device, dtype=dtype) if kept else None  # G
        jacobian = torch.empty(hidden.shape, device=hidden.device, dtype=dtype) if trains_hidden else None
        for rows in (*tiles.slices(0, kept), *tiles.slices(kept, count)):
            target = gradient[rows] if rows.stop <= kept else tiles.scratch(rows) if trains_hidden else None
            tiles.fold(rows, stats[:, rows], target)
            if trains_hidden:
                jacobian[rows] = matmul_fp32(target, weight)

        log_probs, _, kl, *_ = stats
        weighted = torch.where(kl_weight == 0, log_probs, log_probs + kl_weight * kl)  # 0 · ∞ is 0
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.transforms = dtype, (scale, softcap, ref_scale, ref_softcap)
        # Only the recomputing path needs these
        again = (ref_hidden, ref_weight, ref_bias, labels, kl_weight) if trains_head and kept < count else (None,) * 5
        ctx.save_for_backward(jacobian, gradient, *((hidden, weight, bias) if trains_head else (None,) * 3), *again)
        return weighted, stats

    @staticmethod
    def backward(ctx, grad_weighted, *_):
        jacobian, gradient, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, kl_weight = (
            ctx.saved_tensors
        )
        if grad_weighted is None:
            return (None,) * 14
        grad_weighted = grad_weighted.unsqueeze(1)  # (N, 1)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = grad_weighted.to(jacobian.dtype) * jacobian  # (N, H)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            scale, softcap, ref_scale, ref_softcap = ctx.transforms
            head, ref_head = Head(weight, bias, scale, softcap), Head(ref_weight, ref_bias, ref_scale, ref_softcap)
            with _gathered(head), _gathered(None if ref_weight is None else ref_head):
                # Accumulated in fp32, even when the inputs are not
                total_weight = torch.zeros(weight.shape, device=hidden.device, dtype=torch.float32)
                total_bias = torch.zeros(weight.size(0), device=hidden.device, dtype=torch.float32)
                tiles = _Tiles(ctx.dtype, hidden, head, ref_hidden, ref_head, labels, kl_weight)
                kept, count = 0 if gradient is None else gradient.size(0), hidden.size(0)
                stats = torch.empty((len(STATISTICS), count - kept), device=hidden.device, dtype=torch.float32)
                for rows in (*tiles.slices(0, kept), *tiles.slices(kept, count)):
                    if rows.stop <= kept:
                        tile = gradient[rows]
                    else:
                        tile = tiles.scratch(rows)
                        tiles.fold(rows, stats[:, rows.start - kept : rows.stop - kept], tile)
                    # (g·G)ᵀ h = Gᵀ (g·h): scaling H columns instead of V
                    _addmm_fp32(total_weight, tile.t(), (grad_weighted[rows] * hidden[rows].float()).to(ctx.dtype))
                    if bias is not None:
                        total_bias += grad_weighted[rows, 0] @ tile.float()
            grad_weight = total_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = total_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, *(None,) * 11


class _Tiles:
    """The logits of both models, some rows at a time, in reused buffers."""

    def __init__(
        self,
        dtype: torch.dtype,
        hidden: torch.Tensor,
        head: Head,
        ref_hidden: torch.Tensor | None,
        ref_head: Head | None,
        labels: torch.Tensor,
        kl_weight: torch.Tensor,
    ):
        self.height = max(1, TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cuda"]) // head.weight.size(0))
        self.dtype, self.labels, self.kl_weight = dtype, labels, kl_weight
        self.hidden, self.head, self.ref_hidden, self.ref_head = hidden, head, ref_hidden, ref_head

    def _buffer(self, dtype: torch.dtype) -> torch.Tensor:
        shape = (min(self.height, self.hidden.size(0)), self.head.weight.size(0))
        return torch.empty(shape, device=self.hidden.device, dtype=dtype)

    # Made on first use: the backward of kept rows of G needs none of them

    @cached_property
    def z(self) -> torch.Tensor:
        return self._buffer(torch.float32)

    @cached_property
    def ref_z(self) -> torch.Tensor:
        return self._buffer(torch.float32)

    @cached_property
    def gradient(self) -> torch.Tensor:
        """The gradient tile overwrites the logits if it has their dtype."""
        return self.z if self.dtype == torch.float32 else self._buffer(self.dtype)

    def slices(self, first: int, last: int) -> Iterator[slice]:
        for start in range(first, last, self.height):
            yield slice(start, min(start + self.height, last))

    def scratch(self, rows: slice) -> torch.Tensor:
        """Buffer for the gradient tile of these rows, valid until the next rows are folded."""
        return self.gradient[: rows.stop - rows.start]

    def fold(self, rows: slice, stats: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Project these rows and fill `stats`, `(6, n)`, and `gradient`, `(n, V)`."""
        height = rows.stop - rows.start
        z = matmul_fp32(self.hidden[rows].to(self.dtype), self.head.weight, self.z[:height], transposed=True)
        ref_z = None
        if self.ref_hidden is not None:
            ref_z = self.ref_z[:height]
            matmul_fp32(self.ref_hidden[rows].to(self.dtype), self.ref_head.weight, ref_z, transposed=True)
        fold_tile(z, self.head, ref_z, self.ref_head, self.labels[rows], self.kl_weight[rows], stats, gradient)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
