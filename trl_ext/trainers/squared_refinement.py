"""
The preference trainers with the squared refinement loss of ARIES (https://huggingface.co/papers/2502.05605), for datasets whose
rows have a `turn`: 0 for direct answering, 1 for refining.

A row for direct answering takes the trainer's own loss, one for refining the square, and their weights make a batch's mean an
unbiased estimate of `(1 − α) L_direct + α L_refine`. They are for `trl_ext.aries`, which makes such rows. Where both kinds of rows
take the same loss, the trainers themselves will do.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from trl import DPOConfig

from ..losses.aries import aries_loss, row_weights, squared_refinement_loss
from .pairwise_trainer import PairBatch, PairLogps, PairwiseTrainer
from .self_refine_dpo_trainer import SelfRefineDPOTrainer
from .tdpo_trainer import TDPOTrainer


@dataclass
class DataCollatorWithTurns:
    """
    Adds `turn` (`torch.Tensor` of shape `(B,)`) to the batches of another collator.

    Args:
        collator (`Callable`):
            The trainer's own.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collator(examples), "turn": torch.tensor([example["turn"] for example in examples])}


class SquaredRefinement:
    """
    Mixin for a [`PairwiseTrainer`]. The only change is the loss of the rows whose `turn` is 1.

    Logged besides: `objective/direct` and `objective/refinement`, the mean loss of a batch's rows of either kind, without weights.

    Args:
        objective_alpha (`float`):
            The paper's α.
        *pos, **kwargs:
            The trainer's own.

    Raises:
        `ValueError`: several preference losses in `loss_type`; a dataset without rows of both kinds.
    """

    def __init__(self, *pos, objective_alpha: float, **kwargs):
        super().__init__(*pos, **kwargs)
        self.data_collator = DataCollatorWithTurns(self.data_collator)
        # TRL has dropped the rows whose prompt alone fills `max_length`
        counts = Counter(self.train_dataset["turn"])
        self._direct_weight, self._refinement_weight = row_weights(counts[0], counts[1], alpha=objective_alpha)

    @classmethod
    def _refuse_options(cls, args: DPOConfig, honoured: Collection[str] = ()) -> None:
        super()._refuse_options(args, honoured)
        if len(set(args.loss_type) - {"sft"}) > 1:
            raise ValueError(
                f"`loss_type={args.loss_type!r}` has several preference losses, and the squared objective has one L_direct. "
                'Name one, and "sft" beside it if you like.'
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "turn" not in self._signature_columns:
            self._signature_columns.append("turn")

    def _set_token_level(self, variant: str | None, alpha: float, args: DPOConfig) -> None:
        super()._set_token_level(variant, alpha, args)
        self._direct_kl_weight = self._kl_weight

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        self._turns = inputs.pop("turn")
        if self.variant is not None:
            # TDPO's gradient of the KL is taken beside the log-probability's, in the head; the square has no KL
            kl_weight = torch.tensor(self._direct_kl_weight, device=self._turns.device)
            self._kl_weight = torch.outer(kl_weight, (self._turns == 0).float())  # (2, B)
        return super()._compute_loss(model, inputs, return_outputs)

    def _pair_losses(self, loss_type: str, batch: PairBatch, policy, logps: PairLogps) -> torch.Tensor:
        direct_losses = super()._pair_losses(loss_type, batch, policy, logps)
        squares, _, _ = squared_refinement_loss(logps.chosen_logratios, logps.rejected_logratios, beta=self.beta)
        self._record_part("objective/direct", direct_losses, self._turns == 0)
        self._record_part("objective/refinement", squares, self._turns == 1)
        return aries_loss(
            direct_losses,
            squares,
            self._turns,
            direct_weight=self._direct_weight,
            refinement_weight=self._refinement_weight,
        )

    def _record_part(self, name: str, losses: torch.Tensor, rows: torch.Tensor) -> None:
        """Record the mean over the rows of one kind, nothing for a batch without any."""
        sums = torch.stack([losses.detach()[rows].sum(), rows.sum()]).unsqueeze(0)
        total, count = self.accelerator.gather(sums).sum(dim=0).tolist()
        if count > 0:
            self._record(name, total / count)


class SigmoidDPOTrainer(PairwiseTrainer):
    """DPO itself in the steps of [`PairwiseTrainer`], for the mixin to change one of them."""

    _pair_loss_types = ("sigmoid",)

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, *pos, **kwargs):
        self._refuse_options(args)
        super().__init__(model, ref_model, args, *pos, **kwargs)

    def _pair_losses(self, loss_type: str, batch: PairBatch, policy, logps: PairLogps) -> torch.Tensor:
        return -F.logsigmoid(self.beta * (logps.chosen_logratios - logps.rejected_logratios))


class SquaredRefinementDPOTrainer(SquaredRefinement, SigmoidDPOTrainer):
    """DPO's loss for direct answering, the squares for refining."""


class SquaredRefinementTDPOTrainer(SquaredRefinement, TDPOTrainer):
    """TDPO's loss for direct answering, the squares for refining."""


class SquaredRefinementSelfRefineDPOTrainer(SquaredRefinement, SelfRefineDPOTrainer):
    """Sr-DPO's loss for direct answering, the squares for refining."""
