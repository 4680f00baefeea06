"""
The trainers as the tests of this folder run them, and what their papers say of a batch: losses and metrics in float64, from full logits
(`tests/oracles/`), whichever of TRL's loss types is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tests.conftest import labels_and_mask
from tests.oracles import losses as oracle
from tests.oracles.tdpo import sequence_kl, sequence_sum, sft_loss_from_logits, token_logps
from torch.nn.utils.rnn import pad_sequence

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer


LN_2 = torch.tensor(2.0).log().item()  # in fp32, as the loss


@dataclass
class Method:
    """A trainer, its config and the options that make it the method; `variant`, `alpha` and `refinement_weight` are the papers'."""

    trainer: type
    config: type
    options: dict = field(default_factory=dict)

    @property
    def variant(self) -> str | None:
        return self.options.get("variant", "tdpo2" if self.trainer is TDPOTrainer else None)

    @property
    def refines(self) -> bool:
        return self.trainer is SelfRefineDPOTrainer


TDPO1 = Method(TDPOTrainer, TDPOConfig, {"variant": "tdpo1"})
TDPO2 = Method(TDPOTrainer, TDPOConfig, {"alpha": 0.7})
SR = Method(SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.5})
METHODS = {
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "sr": SR,
    "sr-tdpo1": Method(SelfRefineDPOTrainer, SelfRefineDPOConfig, {"variant": "tdpo1", "refinement_weight": 0.5}),
    "sr-tdpo2": Method(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, {"variant": "tdpo2", "alpha": 0.7, "refinement_weight": 0.5}
    ),
}
TRAINERS = {"tdpo": TDPO2, "sr": SR}
# The same with options that make them `DPOTrainer`
LIMITS = {
    "tdpo": Method(TDPOTrainer, TDPOConfig, {"alpha": 0.0}),
    "sr": Method(SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.0}),
}


def step_losses(trainer) -> list[float]:
    """Trains, and returns the loss of every optimizer step."""
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def augmented_sequences(batch: dict) -> dict:
    """The collated batch's responses after their augmented prompts, as a batch of whole sequences, padded on the right."""
    pairs = len(batch["augmented_prompt_ids"])
    ids, completion_masks = [], []
    for row, (completion, mask) in enumerate(
        zip(batch["completion_ids"], batch["completion_attention_mask"], strict=True)
    ):
        prompt, prompt_mask = (batch[f"augmented_prompt_{name}"][row % pairs] for name in ("ids", "mask"))
        prompt = torch.cat([batch["augmented_prefix_ids"][0], prompt[prompt_mask.bool()]])
        completion = completion[mask.bool()]
        ids.append(torch.cat([prompt, completion]))
        completion_masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(completion)]))
    rows = {
        "input_ids": ids,
        "attention_mask": [torch.ones_like(row) for row in ids],
        "completion_mask": completion_masks,
    }
    return {name: pad_sequence(values, batch_first=True) for name, values in rows.items()}


def response_logps(model: Callable, batch: dict) -> torch.Tensor:
    """Log-probabilities of the responses of a batch, `(2, B)`. `model` returns its logits."""
    labels, mask = labels_and_mask(batch)
    return sequence_sum(token_logps(model(batch), labels), mask).view(2, -1)


@dataclass
class Paper:
    """A batch as the papers see it. `policy` and `ref` return its logits, the policy's with a graph."""

    method: Method
    policy: Callable
    ref: Callable
    batch: dict
    beta: float = 0.1

    def __post_init__(self):
        labels, mask = labels_and_mask(self.batch)
        self.lengths = mask.sum(dim=1).view(2, -1)
        self.logps, self.ref_logps = (
            response_logps(self.policy, self.batch),
            response_logps(self.ref, self.batch).detach(),
        )
        self.logratios = self.logps - self.ref_logps
        self.kls = sequence_kl(self.policy(self.batch), self.ref(self.batch), mask).view(2, -1)
        if self.method.refines:
            sequences = augmented_sequences(self.batch)
            self.augmented = (response_logps(self.policy, sequences) - response_logps(self.ref, sequences)).detach()

    def delta(self, means: bool = False) -> torch.Tensor:
        """Δ (Eq. 12 of Sr-DPO), `(B,)`."""
        w, l = self.augmented / self.lengths if means else self.augmented  # noqa: E741
        return self.beta * (w - l)

    def shifted(self, loss_type: str, of_sums: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-ratios with TDPO's KLs and without Sr-DPO's `λ Δ`, each `(B,)`."""
        w, l = self.logratios  # noqa: E741
        alpha = self.method.options.get("alpha", 0.5)
        if self.method.variant == "tdpo1":
            w, l = w + self.kls[0], l + self.kls[1]  # noqa: E741
        elif self.method.variant == "tdpo2":
            w, l = w + alpha * self.kls[0].detach(), l + alpha * self.kls[1]  # noqa: E741
        if self.method.refines:
            means = loss_type in ("ipo", "sigmoid_norm") and not of_sums
            # The losses on means divide by the length, and all but IPO multiply by β
            margin = self.method.options.get("refinement_weight", 0.3) * self.delta(means)
            w = w - margin / (1 if loss_type == "ipo" else self.beta) * (self.lengths[0] if means else 1)
        return w, l

    def loss(self, loss_type="sigmoid", loss_weights=None, label_smoothing=0.0, discopop_tau=0.05, **options):
        """The weighted sum of the losses of one or several types, a scalar with a graph."""
        loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
        total = 0.0
        for one, weight in zip(loss_types, loss_weights or [1.0] * len(loss_types), strict=True):
            of_sums = one == "ipo" and not options.get("ipo_length_normalization", True)
            if one == "sft":
                term = sft_loss_from_logits(self.policy(self.batch), *labels_and_mask(self.batch))
            else:
                term = oracle.losses(
                    one,
                    *self.shifted(one, of_sums),
                    lengths=self.lengths,
                    ref_margins=self.ref_logps[0] - self.ref_logps[1],
                    beta=self.beta,
                    epsilon=label_smoothing,
                    tau=discopop_tau,
                    of_sums=of_sums,
                ).mean()
            total = total + weight * term
        return total

    def metrics(self) -> dict[str, float]:
        """DPO's rewards and log-probabilities, which no shift changes, and the method's own."""
        w, l = self.logratios.detach()  # noqa: E741
        rewards, found = self.beta * torch.stack([w, l]), {}
        found |= {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
        }
        found |= {
            "rewards/accuracies": (w > l).double(),
            "logps/chosen": self.logps[0],
            "logps/rejected": self.logps[1],
        }
        if self.method.variant is not None:
            kls = self.kls.detach()
            found |= {
                "position_kl/chosen": kls[0],
                "position_kl/rejected": kls[1],
                "position_kl/margin": kls[0] - kls[1],
            }
            tdpo = rewards + self.beta * kls
            found |= {"rewards_tdpo/chosen": tdpo[0], "rewards_tdpo/rejected": tdpo[1]}
        if self.method.refines:
            delta, weight = self.delta(), self.method.options.get("refinement_weight", 0.3)
            found |= {
                "refinement/margin": delta,
                "refinement/accuracies": (delta > 0).double(),
                "refinement/marginal": w - l,
            }
            share = weight * delta.abs().mean() / (rewards[0] - rewards[1]).abs().mean()
            found |= {"refinement/margin_std": delta.std(correction=0), "refinement/share": share}
        return {name: values.mean().item() for name, values in found.items()}
