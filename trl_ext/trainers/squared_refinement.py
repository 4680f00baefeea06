"""
The preference trainers with the squared refinement loss of ARIES (https://huggingface.co/papers/2502.05605), for datasets whose
rows have a `turn`: 0 for direct answering, 1 for refining.

A row for direct answering has the trainer's own loss, one for refining has the square, and their weights make a batch's mean an
unbiased estimate of `(1 − α) L_direct + α L_refine`. They are for `trl_ext.aries`, which makes such rows. If both kinds of rows
have the same loss, use the trainers themselves.
"""

from collections import Counter

import torch

from ..losses.aries import row_weights
from .self_refine_dpo_trainer import SelfRefineDPOTrainer
from .shifted_dpo_trainer import Term
from .tdpo_trainer import TDPOTrainer, TokenLevelTrainer


class SquaredRefinement:
    """
    Mixin for a [`TokenLevelTrainer`]. The only change is the loss of the rows whose `turn` is 1: with the log-ratios' sums and without a
    shift, `(½ − β [r(y_w) − r(y_l)])²`, which is β² times IPO's loss as its paper writes it.

    Also logged: `objective/direct` and `objective/refinement`, the unweighted mean losses of a batch's rows of either kind.

    Args:
        objective_alpha (`float`):
            The paper's α.
        *pos, **kwargs:
            The trainer's own arguments.

    Raises:
        `ValueError`: several preference losses in `loss_type`, or one without a loss for each row; `use_weighting`; or a dataset without
        rows of both kinds.
    """

    columns = ("turn",)

    def __init__(self, *pos, objective_alpha: float, **kwargs):
        super().__init__(*pos, **kwargs)
        # Rows whose prompt alone fills `max_length` are gone by now
        counts = Counter(self.train_dataset["turn"])
        self._row_weights = row_weights(counts[0], counts[1], alpha=objective_alpha)
        [self._weight] = [term.weight for term in super()._terms() if term.loss_type != "sft"]
        self._square = Term("ipo", self._weight * self.beta**2, of_sums=True)
        self._direct_kl_weight = self._kl_weight

    @classmethod
    def refuse_options(cls, args):
        super().refuse_options(args)
        if args.use_weighting:
            raise ValueError(
                f"`use_weighting=True` is not supported by {cls.__name__}: the rows have weights already. Leave it `False`."
            )
        if len(set(args.loss_type) - {"sft"}) > 1:
            raise ValueError(
                f"`loss_type={args.loss_type!r}` has several preference losses, but the squared objective has one L_direct. "
                'Name one, and "sft" beside it if you like.'
            )

    def _terms(self):
        return [*super()._terms(), self._square]

    def logratio_shifts(self, pairs, term):
        return (0.0, 0.0) if term is self._square else super().logratio_shifts(pairs, term)

    def pair_weights(self, pairs, term):
        turn = int(term is self._square)
        return self._row_weights[turn] * (pairs.inputs["turn"] == turn).float()

    def _policy_forward(self, model, inputs, reference, kwargs):
        if self.variant is not None:
            # The head adds TDPO's gradient of the KL to the log-probability's; the square has no KL
            direct = (inputs["turn"] == 0).float()
            self._kl_weight = torch.outer(torch.tensor(self._direct_kl_weight, device=direct.device), direct)  # (2, B)
        return super()._policy_forward(model, inputs, reference, kwargs)

    def _term_loss(self, pairs, term, loss):
        if term.loss_type == "sft":
            return loss
        turn = int(term is self._square)
        rows, weight = (pairs.inputs["turn"] == turn).float(), self._weight * self._row_weights[turn]
        if weight > 0:
            parts = torch.stack([loss.detach() * rows.numel() / weight, rows.sum()]).unsqueeze(0)
            total, count = self.accelerator.gather(parts).sum(dim=0).tolist()
            if count > 0:  # nothing to log for a batch without such rows
                self._record(("objective/direct", "objective/refinement")[turn], total / count)
        return loss


class SquaredRefinementDPOTrainer(SquaredRefinement, TokenLevelTrainer):
    """DPO's loss for direct answering, squares for refining."""


class SquaredRefinementTDPOTrainer(SquaredRefinement, TDPOTrainer):
    """TDPO's loss for direct answering, squares for refining."""


class SquaredRefinementSelfRefineDPOTrainer(SquaredRefinement, SelfRefineDPOTrainer):
    """Sr-DPO's loss for direct answering, squares for refining."""
