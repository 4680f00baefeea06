"""
Log-probabilities and the KL at each position, from the hidden states of two models and their LM heads.

In: hidden states of N completion positions under the policy and the reference, both heads, the labels. Out: a few
numbers per position. Neither model's `[N, V]` logits exist in full: the vocabulary is walked in tiles, by TRL's chunked
kernels. The trainers take the fused kernel beside it wherever one differentiable output is enough; here both are.
"""

from typing import NamedTuple

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx


# Width of a vocabulary tile in the log-probability pass, in columns
VOCAB_CHUNK_SIZE = 8192


class PositionKL(NamedTuple):
    """
    Per-position results, each a `torch.Tensor` of shape `(N,)`. Gradients flow from `log_probs` and `position_kl`, to
    the policy only.
    """

    log_probs: torch.Tensor  # log π(label), nats
    ref_log_probs: torch.Tensor  # log π_ref(label), nats
    position_kl: torch.Tensor  # KL(π_ref ‖ π) over the whole vocabulary, nats
    entropy: torch.Tensor  # entropy of π, nats
    mean_logits: torch.Tensor  # mean of the policy's logits over the vocabulary
    is_top1: torch.Tensor  # whether the label is the policy's most likely token


def check_vocabularies(weight: torch.Tensor, ref_weight: torch.Tensor) -> None:
    """
    Raises:
        `ValueError`: two heads, `(V, H)` each, have different vocabularies, so no KL is defined between them.
    """
    if weight.size(0) != ref_weight.size(0):
        raise ValueError(
            f"The policy's LM head has {weight.size(0)} tokens and the reference's {ref_weight.size(0)}. A KL over the "
            "vocabulary needs both to be the same: pass a `ref_model` with the policy's vocabulary."
        )


def position_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> PositionKL:
    """
    Compute `log π(y_t|s_t)`, `log π_ref(y_t|s_t)` and `KL(π_ref(·|s_t) ‖ π(·|s_t))` at N positions.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            The policy's last hidden states.
        weight (`torch.Tensor` of shape `(V, H)`), bias (`torch.Tensor` of shape `(V,)`, *optional*):
            The policy's LM head.
        ref_hidden (`torch.Tensor` of shape `(N, H_ref)`), ref_weight (`torch.Tensor` of shape `(V, H_ref)`), ref_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            The same of the reference. No gradient reaches them.
        labels (`torch.Tensor` of shape `(N,)`):
            The next token at each position.
        logit_scale, ref_logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap, ref_softcap (`float`, *optional*):
            Final logit soft-capping, `softcap · tanh(logits / softcap)`, applied after the scale.

    Returns:
        [`PositionKL`], in fp32.

    Raises:
        `ValueError`: the two heads have different vocabularies, so no KL is defined between them.
    """
    with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(ref_weight, ref_bias):
        check_vocabularies(weight, ref_weight)
        chunk_size = min(VOCAB_CHUNK_SIZE, weight.size(0))
        log_probs, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
            hidden, weight, bias, labels, 1.0, chunk_size, softcap, logit_scale, ("entropy", "mean_logits", "is_top1")
        )
        with torch.no_grad():
            ref_log_probs, *_ = ChunkedLogProbFunction.apply(
                ref_hidden, ref_weight, ref_bias, labels, 1.0, chunk_size, ref_softcap, ref_logit_scale, ()
            )
        # fmt: off
        kl, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, bias,
            ref_hidden, ref_weight, ref_bias,
            0.0,  # forward KL(teacher ‖ student), with the reference as the teacher
            1.0,  # temperature
            logit_scale, softcap, ref_logit_scale, ref_softcap,
        )
        # fmt: on
    return PositionKL(log_probs, ref_log_probs, kl, entropy.detach(), mean_logits, is_top1)
