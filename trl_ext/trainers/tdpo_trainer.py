import textwrap

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel, PromptLearningConfig
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from ..losses.tdpo import tdpo_loss
from .pairwise_trainer import PairBatch, PairLogps, PairwiseTrainer
from .position_kl_head import CompletionStates, PositionKLOutput, add_position_kl_head
from .tdpo_config import TDPOConfig


class TDPOTrainer(PairwiseTrainer):
    """
    Trainer for Token-level Direct Preference Optimization (TDPO, https://huggingface.co/papers/2404.11999).

    The only change w.r.t. [`~trl.DPOTrainer`] is the loss: TDPO adds the difference of the two responses' sequential KLs
    to DPO's margin. Arguments, datasets, PEFT and the reference model are [`~trl.DPOTrainer`]'s; `args` may be a plain
    [`~trl.DPOConfig`], which trains TDPO2 with the paper's α.

    Logged besides DPOTrainer's metrics: `position_kl/chosen`, `position_kl/rejected` (sequence sums in nats),
    `position_kl/margin` (chosen − rejected), and the paper's rewards `β (logratio + SeqKL)` as `rewards_tdpo/chosen`
    and `rewards_tdpo/rejected`.

    Raises:
        `ValueError`: an option that has no meaning for TDPO (`precompute_ref_log_probs`, `ld_alpha`, `use_weighting`,
        `f_divergence_type`, `label_smoothing`, other loss types than "sigmoid" and "sft", prompt-learning PEFT), before
        any model is loaded.

    Example:

    ```python
    >>> from trl_ext import TDPOTrainer
    >>> from datasets import load_dataset

    >>> trainer = TDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-ext", "tdpo"]
    _name = "TDPO"
    _paper = {
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zeng2024tokenlevel,
                title        = {{Token-level Direct Preference Optimization}},
                author       = {Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang},
                year         = 2024,
                booktitle    = {Proceedings of the 41st International Conference on Machine Learning},
                eprint       = {arXiv:2404.11999},
            }"""),
    }

    _pair_loss_types = ("sigmoid",)
    _refused_options = PairwiseTrainer._refused_options | {
        "precompute_ref_log_probs": (
            False,
            "TDPO needs the reference's whole next-token distribution at each step, not only the log-probability of the "
            "answer. Set it to `False`; with LoRA the reference costs no memory, since it is the model without adapter.",
        ),
    }

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, *pos, peft_config=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TDPOConfig(f"{model_name.split('/')[-1]}-TDPO")
        self._refuse_options(args)
        adapters = model.peft_config.values() if isinstance(model, PeftModel) else [peft_config]
        if any(isinstance(adapter, PromptLearningConfig) for adapter in adapters):
            raise ValueError(
                "Prompt-learning PEFT (prompt, prefix or p-tuning) is not supported by TDPOTrainer: its virtual tokens "
                "shift the positions at which the two distributions are compared. Use LoRA."
            )
        config = args if isinstance(args, TDPOConfig) else TDPOConfig  # a plain DPOConfig takes the defaults
        self.variant, self.alpha = config.variant, config.alpha
        # Weight of the KL against the log-probability in the gradient of each side: with it the fused kernel needs one
        # Jacobian only. SFT on the chosen answers needs the log-probability's alone, which TDPO1 does not leave there.
        self._kl_weight = {"tdpo1": (1.0, 1.0), "tdpo2": (0.0, self.alpha)}[self.variant]
        if self.variant == "tdpo1" and "sft" in args.loss_type:
            self._kl_weight = None

        super().__init__(model, ref_model, args, *pos, peft_config=peft_config, **kwargs)

        add_position_kl_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.ref_model is not None:
            add_position_kl_head(self.accelerator.unwrap_model(self.ref_model))

    def _reference_forward(self, batch: PairBatch) -> CompletionStates:
        with self._reference_model() as ref_model:
            return ref_model(**batch.model_kwargs, labels=batch.labels, completion_states=True)

    def _policy_forward(self, model, batch: PairBatch, reference: CompletionStates) -> PositionKLOutput:
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(
            **batch.model_kwargs, **router, labels=batch.labels, reference=reference, kl_weight=self._kl_weight
        )

    def _pair_logps(self, batch: PairBatch, policy: PositionKLOutput, reference: CompletionStates) -> PairLogps:
        return PairLogps(
            *self._sum_over_completion(policy.log_probs, batch),
            *self._sum_over_completion(policy.ref_log_probs, batch),
        )

    def _pair_losses(self, loss_type, batch: PairBatch, policy: PositionKLOutput, logps: PairLogps) -> torch.Tensor:
        chosen_kl, rejected_kl = self._sum_over_completion(policy.position_kl, batch)  # (B,), the paper's SeqKL
        losses, chosen_rewards, rejected_rewards = tdpo_loss(
            logps.chosen_logratios,
            logps.rejected_logratios,
            chosen_kl,
            rejected_kl,
            beta=self.beta,
            alpha=self.alpha,
            variant=self.variant,
        )
        self._record_mean("position_kl/chosen", chosen_kl)
        self._record_mean("position_kl/rejected", rejected_kl)
        self._record_mean("position_kl/margin", chosen_kl - rejected_kl)
        self._record_mean("rewards_tdpo/chosen", chosen_rewards)
        self._record_mean("rewards_tdpo/rejected", rejected_rewards)
        return losses
