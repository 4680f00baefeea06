import dataclasses
import os
import textwrap

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from ..losses.shifts import tdpo_shifts
from .packed_pairs import has_virtual_tokens
from .position_kl_head import CompletionStates
from .reference_states import COLUMNS as STATE_COLUMNS
from .reference_states import DataCollatorWithStates, as_rows, check_room, write
from .shifted_dpo_trainer import Pairs, ShiftedDPOTrainer
from .tdpo_config import TDPOConfig
from .token_level_config import TokenLevelConfig


# TRL's losses that are functions of log-ratios; a new one is refused until it has been checked
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
READ_LABEL_SMOOTHING = ("exo_pair", "robust", "aot", "aot_unpaired")


class TokenLevelTrainer(ShiftedDPOTrainer):
    """
    Base class of both trainers of this package. With a `variant` of TDPO, log-ratios are shifted by the sum of the KLs at each position,
    `Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t))`.
    """

    config_class = TokenLevelConfig
    variant: str | None = None
    _kl_weight: tuple[float, float] | torch.Tensor | None = None
    _separate_sft = False
    _ref_head: CompletionStates | None = None
    _own_columns = STATE_COLUMNS
    _own_inputs = ("ref_states",)
    refused_options = {
        "ld_alpha": (
            None,
            "it reweights the tokens of DPO's own log-ratios. Leave it unset, or use `trl.DPOTrainer`.",
        ),
        "f_divergence_type": (
            "reverse_kl",
            "the loss is derived for the reverse KL. Leave it at 'reverse_kl', or use `trl.DPOTrainer`.",
        ),
    }

    @classmethod
    def refuse_options(cls, args):
        super().refuse_options(args)
        for loss_type in args.loss_type:
            if loss_type not in (*LOSS_TYPES, "sft"):
                raise ValueError(
                    f"`loss_type={loss_type!r}` is not supported by {cls.__name__}, which has {[*LOSS_TYPES, 'sft']}. Use "
                    "one of these, or `trl.DPOTrainer` for other losses."
                )
        if set(args.loss_type) == {"sft"}:
            raise ValueError(
                f"`loss_type={args.loss_type!r}` has no preference loss, so {cls.__name__} would be plain SFT on the "
                "chosen answers. Add one, such as 'sigmoid', or use `trl.SFTTrainer`."
            )
        if args.label_smoothing != 0 and not set(args.loss_type) & set(READ_LABEL_SMOOTHING):
            raise ValueError(
                f"`label_smoothing={args.label_smoothing}` is not supported by {cls.__name__} with `loss_type={args.loss_type!r}`: only "
                f"{', '.join(READ_LABEL_SMOOTHING)} read it. Leave it at 0, or use 'robust'."
            )

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, *pos, peft_config=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_name.split('/')[-1]}-{self._name.replace(' ', '-')}")
        self.refuse_options(args)
        self._take_options(args, learns_prompt=has_virtual_tokens(model, peft_config))
        super().__init__(model, ref_model, args, *pos, peft_config=peft_config, **kwargs)

    @classmethod
    def _config(cls, args: DPOConfig) -> TokenLevelConfig | type[TokenLevelConfig]:
        """The holder of this package's options: `args`, or for a plain `DPOConfig` the class with its defaults."""
        return args if isinstance(args, cls.config_class) else cls.config_class

    def _take_options(self, args: DPOConfig, learns_prompt: bool) -> None:
        """Read this package's options from `args`. Called before `super().__init__`."""
        config = self._config(args)
        self.share_prompt, self.max_batch_tokens = config.share_prompt, config.max_batch_tokens
        self.variant, self.alpha = config.variant, config.alpha
        if self.variant is not None and learns_prompt:
            raise ValueError(
                f"`variant={self.variant!r}` is not supported with prompt-learning PEFT (prompt, prefix or p-tuning): its "
                "virtual tokens shift the positions at which the two distributions are compared. Use LoRA."
            )
        # Weights of the KLs of chosen and rejected in the gradient, with which one Jacobian is enough. SFT on the chosen answers needs
        # the gradient of the log-probability alone, which TDPO1 adds to the KL's
        self._kl_weight = {None: None, "tdpo1": (1.0, 1.0), "tdpo2": (0.0, self.alpha)}[self.variant]
        self._separate_sft = self.variant == "tdpo1" and "sft" in args.loss_type

    def logratio_shifts(self, pairs, term):
        if self.variant is None:
            return 0.0, 0.0
        return tdpo_shifts(*pairs.sums(pairs.outputs.position_kl), alpha=self.alpha, variant=self.variant)

    def pair_metrics(self, pairs):
        if self.variant is None:
            return {}
        (chosen, rejected), kls = self.beta * pairs.logratios, pairs.sums(pairs.outputs.position_kl)
        return {
            "position_kl/chosen": kls[0],
            "position_kl/rejected": kls[1],
            "position_kl/margin": kls[0] - kls[1],
            # The paper's rewards, β (logratio + SeqKL)
            "rewards_tdpo/chosen": chosen + self.beta * kls[0],
            "rewards_tdpo/rejected": rejected + self.beta * kls[1],
        }

    def _shifted(self, pairs, term):
        outputs, ref_logps = super()._shifted(pairs, term)
        if term.loss_type == "sft" and self._separate_sft:
            outputs = dataclasses.replace(outputs, log_probs=outputs.sft_log_probs)
        return outputs, ref_logps

    def _reference_states(self, inputs) -> CompletionStates:
        model = self.ref_model or self.model
        return self._with_reference(
            inputs, lambda **kwargs: model(**self._model_kwargs(kwargs), completion_states=True)
        )

    def _reference_forward(self, inputs):
        """With a `variant`, return the reference's states; the policy's forward computes its log-probabilities with the KL."""
        if self.variant is None:
            return super()._reference_forward(inputs)
        if self.precompute_ref_logps:
            hidden = inputs["ref_states"].view(self._ref_head.hidden.dtype).view(-1, self._ref_head.weight.size(1))
            return dataclasses.replace(self._ref_head, hidden=hidden)
        return self._reference_states(inputs)

    def _pairs_of(self, inputs, pairs):
        if "ref_states" not in inputs:
            return super()._pairs_of(inputs, pairs)
        states, lengths = inputs["ref_states"], inputs["completion_mask"][:, 1:].sum(dim=1)
        parts = states.split((lengths * (states.numel() // lengths.sum())).tolist())
        rows = torch.cat([pairs, pairs + len(parts) // 2]).tolist()
        others = {name: x for name, x in inputs.items() if name != "ref_states"}
        return {**super()._pairs_of(others, pairs), "ref_states": torch.cat([parts[row] for row in rows])}

    def _prepare(self):
        if self.variant is not None and self.args.precompute_ref_log_probs and not self._is_prepared:
            self.data_collator = DataCollatorWithStates(self.data_collator)
        super()._prepare()

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """
        With a `variant`, store the reference's states at the responses instead of log-probabilities, and a copy of its head if the head is
        trained. Rounding depends on a batch's padding, so the KL of a policy equal to the reference is 0 only up to rounding.
        """
        if self.variant is None or isinstance(dataset, IterableDataset):  # TRL refuses streams
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"`precompute_ref_log_probs=True` is not supported by {type(self).__name__} under FSDP or DeepSpeed, which shard the reference's "
                "head. Leave it `False`; with LoRA the reference is the model without adapter and needs no memory."
            )
        self._prepare()
        head = self._reference_states(self._prepare_inputs(self.data_collator([dataset[0]])))
        if self._ref_head is None:
            trained = self.ref_model is None and (
                head.weight.requires_grad or head.bias is not None and head.bias.requires_grad
            )
            weight, bias = (x.detach().clone() if trained and x is not None else x for x in (head.weight, head.bias))
            self._ref_head = dataclasses.replace(head, weight=weight, bias=bias)
        batches = (self.args.max_length, self.args.truncation_mode, str(head.hidden.dtype))
        key = [Hasher.hash((dataset._fingerprint, self._precompute_model_hash, batches, "states"))]
        broadcast_object_list(key, from_process=0)
        file = dataset._get_cache_file_path(key[0])
        if not os.path.exists(file):
            check_room(dataset, head.hidden[:1].nbytes, file)
            loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
            rows = (
                self.accelerator.gather_for_metrics(
                    as_rows(self._reference_states(batch).hidden, batch["completion_mask"][:, 1:]),
                    use_gather_object=True,
                )
                for batch in tqdm(
                    self.accelerator.prepare(loader), desc=f"Keeping the reference's states for {name} dataset"
                )
            )
            if self.accelerator.is_main_process:
                write(file, rows)
            else:
                list(rows)
            self.accelerator.wait_for_everyone()
        return concatenate_datasets([dataset, Dataset.from_file(file)], axis=1)

    def _policy_forward(self, model, inputs, reference, kwargs):
        """
        With a `variant`, `log_probs` have the value of the log-probabilities and the gradient of `log π + κ KL`; the value of the shift is
        subtracted from the reference's log-probabilities.
        """
        if self.variant is None:
            return super()._policy_forward(model, inputs, reference, kwargs)
        token_level = {"reference": reference, "kl_weight": self._kl_weight, "separate_sft": self._separate_sft}
        pairs = Pairs(inputs, model(**self._model_kwargs(kwargs), **token_level), None)
        pairs.ref_logps = pairs.sums(pairs.outputs.ref_log_probs)
        return pairs


class TDPOTrainer(TokenLevelTrainer):
    """
    Trainer for Token-level Direct Preference Optimization (TDPO, https://huggingface.co/papers/2404.11999).

    The only change w.r.t. [`~trl.DPOTrainer`] is that the log-ratios of both responses are raised by their sequential KLs, before TRL's
    loss sees them. Arguments, datasets, PEFT and the reference model are [`~trl.DPOTrainer`]'s; `args` may be a plain
    [`~trl.DPOConfig`], which trains TDPO2 with the paper's α.

    Logged in addition to DPOTrainer's metrics: `position_kl/chosen`, `position_kl/rejected` (sequence sums in nats),
    `position_kl/margin` (chosen − rejected), and the paper's rewards `β (logratio + SeqKL)` as `rewards_tdpo/chosen`
    and `rewards_tdpo/rejected`.

    Raises:
        `ValueError`: an option without a meaning for TDPO (`ld_alpha`, `use_weighting`, `f_divergence_type`, `label_smoothing` without a
        loss that reads it, `loss_type="sft"` alone, prompt-learning PEFT), or a model for which `share_prompt` is not exact. Raised before
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

    _tag_names = ["trl", "trl-ext", "dpo", "tdpo"]
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
    config_class = TDPOConfig
    refused_options = TokenLevelTrainer.refused_options | {
        "use_weighting": (
            False,
            "the head that computes the KL has no weights of WPO. Leave it `False`, or use `trl.DPOTrainer`.",
        ),
    }
