"""
What a TDPO step costs beside a DPO step: `make bench`. Writes `docs/benchmarks/tdpo.csv` and `.md`.

Side by side: `trl.DPOTrainer`; the same with its head on the completions only, as on a GPU; `TDPOTrainer`; and TDPO as its
paper's code computes it, with full logits.
"""

from collections.abc import Iterator

import torch
from trl import DPOTrainer

from trl_ext import TDPOConfig, TDPOTrainer
from trl_ext.trainers.position_kl_head import PositionKLOutput
from trl_ext.trainers.shifted_dpo_trainer import Pairs

from .steps import Contestant, Shape, benchmark, measure


class FullLogitsTDPOTrainer(TDPOTrainer):
    """TDPO as the paper's code computes it: both models' logits, their log-softmax and softmax, all `(2B, T, V)` in fp32."""

    def _reference_forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = self.ref_model or self.model
        return self._with_reference(
            inputs, lambda labels, **kwargs: model(**kwargs).logits[:, :-1].float().log_softmax(-1)
        )

    def _policy_forward(self, model, inputs, reference: torch.Tensor, kwargs) -> Pairs:
        logits = model(input_ids=kwargs["input_ids"], attention_mask=kwargs["attention_mask"]).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1)
        mask = inputs["completion_mask"][:, 1:]
        labels = kwargs["labels"][:, 1:].clamp(min=0).unsqueeze(-1)
        position_kl = (reference.exp() * (reference - log_probs)).sum(-1) * mask
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        outputs = PositionKLOutput(
            log_probs=log_probs.gather(-1, labels).squeeze(-1) * mask,
            ref_log_probs=reference.gather(-1, labels).squeeze(-1) * mask,
            position_kl=position_kl,
            entropy=entropy,
            mean_logits=logits.detach().mean(-1),
            is_top1=logits.argmax(-1) == labels.squeeze(-1),
        )
        pairs = Pairs(inputs, outputs, None)
        pairs.ref_logps = pairs.sums(outputs.ref_log_probs)
        return pairs


DPO = "DPOTrainer"
CONTESTANTS = {
    DPO: Contestant(DPOTrainer),
    "DPOTrainer, completions only": Contestant(DPOTrainer, completions_only=True),
    "TDPOTrainer": Contestant(TDPOTrainer, TDPOConfig),
    "full logits": Contestant(FullLogitsTDPOTrainer, TDPOConfig),
}
SHAPES = (Shape(4096, 256, 4, 4), Shape(32000, 256, 4, 4), Shape(128256, 256, 4, 4))


TEXT = (
    "A step is loss and gradients. `ratio` is the median over the repeats of its time to `trl.DPOTrainer`'s; `peak` is what a step "
    "allocates. Head GEMMs are counted in units of 2·N·V·H FLOP (V vocabulary, H hidden, N completion tokens). On a CPU "
    'TRL\'s head projects every position, including prompt and padding; "completions only" is its path on a GPU. '
    '"Full logits" is TDPO as its paper\'s code computes it.'
)


def measured(repeats: int) -> Iterator[list[dict]]:
    for shape in SHAPES:
        for lora in (True, False):
            yield measure(CONTESTANTS, shape, lora=lora, repeats=repeats)


def main() -> None:
    benchmark(__doc__, "tdpo", "A TDPO step beside a DPO step", TEXT, 7, measured)


if __name__ == "__main__":
    main()
