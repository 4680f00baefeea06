import textwrap

import torch
from peft import PeftModel, PromptLearningConfig
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from ..losses.tdpo import tdpo_loss
from .pairwise_trainer import PairBatch, PairLogps, PairwiseTrainer
from .position_kl_head import PositionKLOutput
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
        `f_divergence_type`, `label_smoothing`, other loss types than "sigmoid" and "sft", prompt-learning PEFT), or a model
        that cannot do with `share_prompt`, before any model is loaded.

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
        self._set_token_level(config.variant, config.alpha, args)
        self._set_packing(args, config.share_prompt, peft_config, model, ref_model)

        super().__init__(model, ref_model, args, *pos, peft_config=peft_config, **kwargs)

    def _pair_losses(self, loss_type, batch: PairBatch, policy: PositionKLOutput, logps: PairLogps) -> torch.Tensor:
        losses, _, _ = tdpo_loss(
            logps.chosen_logratios,
            logps.rejected_logratios,
            *self._position_kls(batch, policy),
            beta=self.beta,
            alpha=self.alpha,
            variant=self.variant,
        )
        return losses
