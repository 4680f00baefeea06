"""
Batches by tokens instead of pairs: a device's batch goes through the model in parts of at most `max_batch_tokens` computed tokens, with
the gradient of the whole batch.

In: the trainer's own batches, so that the order of the rows, the optimizer's steps, their schedule and resuming stay the same. Out: the
same gradient, from as few forwards as the tokens need. Deliberately not here: a sampler, which would make the number of pairs of an
optimizer step depend on their lengths.
"""

import contextlib

import torch
from torch import nn
from trl import DPOConfig


# Losses that are not means over pairs: `sft` is a mean over tokens, the others sort the pairs of a batch
NOT_OF_PAIRS = ("sft", "aot", "aot_unpaired")


def fill(tokens: torch.Tensor, max_tokens: int) -> list[int]:
    """
    Divide a sorted batch into parts, in the same way on all devices, so that they stay in step.

    Args:
        tokens (`torch.Tensor` of shape `(devices, B)`):
            Tokens of each pair of each device's batch, the longest first.
        max_tokens (`int`):
            Largest number of tokens of a part on any device; a single pair may have more.

    Returns:
        `list[int]`: the number of pairs of each part, in order. They add up to B.
    """
    sizes, filled = [], torch.full_like(tokens[:, 0], max_tokens)
    for pair in tokens.unbind(dim=1):
        if (filled + pair).max() > max_tokens:
            sizes.append(0)
            filled = torch.zeros_like(filled)
        sizes[-1] += 1
        filled = filled + pair
    return sizes


def pair_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor, share_prompt: bool) -> torch.Tensor:
    """The tokens of each pair of a batch `(2B, W)` that a packed sequence computes, `(B,)`. Those that all pairs share count for each."""
    mask = attention_mask.bool()
    tokens = mask.sum(dim=1).view(2, -1).sum(dim=0)
    if share_prompt:
        rows = torch.where(mask, input_ids, -1)
        same = (rows.chunk(2)[0] == rows.chunk(2)[1]).cumprod(dim=1).bool()
        tokens = tokens - (same & mask.chunk(2)[0]).sum(dim=1)
    return tokens


class TokenBatches:
    """
    Mixin for a [`~trl.DPOTrainer`] whose batches are packed. Also logged: `batch/pairs` and `batch/tokens`, the mean numbers of a forward
    on a device.
    """

    max_batch_tokens: int | None = None
    share_prompt = False
    _share = 1.0  # share of the batch's pairs in the current part

    @staticmethod
    def _check_token_batches(max_batch_tokens: int, packs: bool, args: DPOConfig) -> None:
        """
        Check the options that are known before a model is loaded.

        Raises:
            `ValueError`: fewer than one token, batches with padding, or a loss that is not a mean over pairs.
        """
        name = f"`max_batch_tokens={max_batch_tokens}`"
        if max_batch_tokens < 1:
            raise ValueError(f"`max_batch_tokens` must be at least 1, got {max_batch_tokens}. Try 8192.")
        if not packs:
            raise ValueError(f"{name} needs batches without padding. Set `padding_free=True` too.")
        if found := set(args.loss_type) & set(NOT_OF_PAIRS):
            raise ValueError(
                f"{name} is not supported with `loss_type={sorted(found)}`: it is not a mean over pairs, so that the parts of a batch do not "
                "add up to it. Leave one of the two out."
            )

    def _check_parts(self) -> None:
        """
        Check what is known once the model is loaded.

        Raises:
            `ValueError`: `max_batch_tokens` with DeepSpeed or with an auxiliary loss of experts.
        """
        if self.max_batch_tokens is not None and (self.is_deepspeed_enabled or self.aux_loss_enabled):
            why = (
                "under DeepSpeed, which steps after each backward. Leave it out."
                if self.is_deepspeed_enabled
                else "with an auxiliary loss, which is not a mean over pairs. Set `router_aux_loss_coef=0`, or leave it out."
            )
            raise ValueError(f"`max_batch_tokens={self.max_batch_tokens}` is not supported {why}")

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch=None
    ) -> torch.Tensor:
        if self.max_batch_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        tokens = pair_tokens(inputs["input_ids"], inputs["attention_mask"], self.share_prompt)
        tokens, order = tokens.sort(descending=True, stable=True)
        everywhere = self.accelerator.gather(tokens.unsqueeze(0)).cpu()  # (devices, B)
        sizes = fill(everywhere, self.max_batch_tokens)
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        losses = []
        for i, pairs in enumerate(order.split(sizes)):
            is_last = i == len(sizes) - 1
            self._share = len(pairs) / len(order)
            try:
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, self._pairs_of(inputs, pairs), num_items_in_batch))
            finally:  # also after an error, since `auto_find_batch_size` tries again
                self._share = 1.0
        for name, values in metrics.items():  # of the parts become those of the batch
            of_parts = values[before.get(name, 0) :]
            if len(of_parts) == len(sizes):
                mean = sum(value * size for value, size in zip(of_parts, sizes, strict=True)) / len(order)
                values[before.get(name, 0) :] = [mean]
        metrics["batch/pairs"].append(len(order) / len(sizes))
        metrics["batch/tokens"].append(everywhere.sum().item() / everywhere.size(0) / len(sizes))
        return torch.stack(losses).sum()

    def compute_loss(self, *pos, **kwargs):
        loss = super().compute_loss(*pos, **kwargs)
        return loss if self._share == 1.0 else loss * self._share

    def _pairs_of(self, inputs: dict[str, torch.Tensor], pairs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Select some of a batch's B pairs. Its tensors have a row for each pair, for each sequence, or one for all."""
        size = inputs["input_ids"].size(0) // 2
        rows = {1: slice(None), size: pairs, 2 * size: torch.cat([pairs, pairs + size])}
        return {name: x[rows[x.size(0)]] for name, x in inputs.items()}
