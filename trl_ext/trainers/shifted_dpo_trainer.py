"""
DPO on shifted log-ratios: the base class of this package's preference trainers, and of your own.

Every loss of TRL's DPO is a function of `log π(y|x) − log π_ref(y|x)` of both responses of a pair. A method that shifts these log-ratios
is therefore DPO with other numbers, and TRL's own `_compute_loss` runs unchanged: once for each loss type, on shifted log-ratios, and
once for the metrics, on the unshifted ones. Deliberately not here: losses, and metrics that TRL has.

It relies on three properties of `_compute_loss` that TRL does not document and `tests/test_trl_contract.py` checks: it calls its argument
`model`; it reads precomputed log-probabilities of the reference from the batch after that call; and with `use_weighting` it multiplies a
pair's loss by weights made from `log_sum_sq_probs`.
"""

import contextlib
import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig
from torch import nn
from transformers.utils import ModelOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .judged_rows import JudgedRows
from .model_card import complete_card
from .packed_pairs import PackedPairs, take_packed_pairs, why_not_packed
from .position_kl_head import add_position_kl_head
from .token_batches import TokenBatches
from .upstream import keep_nf4_trainable, load_adapter_weights, load_sharded_reference, unshard_head


# Losses that cannot be multiplied by weights of the pairs -> reason
WITHOUT_WEIGHTS = {
    "aot": "it sorts the pairs, so that each would get the weight of another",
    "aot_unpaired": "it sorts the pairs, so that each would get the weight of another",
    "hinge": "TRL multiplies it in place, which breaks its gradient (`tests/trainers/test_upstream.py`)",
}


@dataclass(frozen=True)
class Term:
    """
    One of the losses whose sum is trained on.

    Args:
        loss_type (`str`):
            TRL's name for the loss.
        weight (`float`):
            Factor of the loss in the sum.
        of_sums (`bool`, *optional*, defaults to `False`):
            For `"ipo"` and `"sigmoid_norm"`: use the log-ratios of whole responses, as IPO's paper does, instead of TRL's means over tokens.
    """

    loss_type: str
    weight: float
    of_sums: bool = False


@dataclass
class Pairs:
    """
    A batch of B pairs with the outputs of both models.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            The batch, `[chosen, rejected]` along the first dimension, with the trainer's `columns`.
        outputs ([`~trl.trainer.utils.FusedCausalLMOutput`]):
            The policy's outputs for each token, `(2B, T)`: `log_probs`, `entropy`, `mean_logits`, `is_top1`.
        ref_logps (`torch.Tensor` of shape `(2, B)`):
            Log-probabilities of the chosen and of the rejected responses under the reference, in nats.
    """

    inputs: dict[str, torch.Tensor]
    outputs: ModelOutput
    ref_logps: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Mask of the responses' tokens, `(2B, T)`, aligned with the outputs."""
        return self.inputs["completion_mask"][:, 1:].bool()

    @property
    def lengths(self) -> torch.Tensor:
        """Number of tokens of the responses by which TRL's means divide, at least 1, `(2, B)`."""
        return self.inputs["completion_mask"].sum(dim=1).clamp(min=1.0).view(2, -1)

    def sums(self, per_token: torch.Tensor) -> torch.Tensor:
        """Sum an output over the responses, `(2B, T)` to `(2, B)`. It must be zero elsewhere, as the models' outputs are."""
        # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
        return per_token[:, -self.mask.size(1) :].sum(dim=1).view(2, -1)

    @property
    def logps(self) -> torch.Tensor:
        """Log-probabilities under the policy, in nats, `(2, B)`."""
        return self.sums(self.outputs.log_probs)

    @property
    def logratios(self) -> torch.Tensor:
        """`log π(y|x) − log π_ref(y|x)` of the chosen and of the rejected responses, in nats, without gradient, `(2, B)`."""
        return self.logps.detach() - self.ref_logps


@dataclass
class DataCollatorWithColumns:
    """
    Adds columns of numbers to the batches of another collator, each a `torch.Tensor` of shape `(B,)`.

    Args:
        collator (`Callable`):
            The other collator.
        columns (`tuple[str, ...]`):
            Names of the columns. The other collator may make some of them itself.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in self.columns:
            if name not in batch:
                if any(name not in example for example in examples):
                    raise ValueError(
                        f"A row has no `{name}`, which the trainer needs. Its columns: {', '.join(examples[0])}."
                    )
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


@contextlib.contextmanager
def having(owner: object, **attributes) -> Iterator[None]:
    """Set existing attributes within a `with` block."""
    before = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(before)


class ShiftedDPOTrainer(TokenBatches, JudgedRows, DPOTrainer):
    """
    [`~trl.DPOTrainer`] whose log-ratios are shifted, pair by pair, before TRL's own losses see them. The only change w.r.t.
    [`~trl.DPOTrainer`] is the input of its `_compute_loss`; options, losses and metrics are its own, and `rewards/*` and `logps/*` are
    unshifted.

    A subclass overrides [`logratio_shifts`], and optionally [`pair_weights`] and [`pair_metrics`]. `columns` names the columns of
    numbers that these methods read from `pairs.inputs`.

    Raises:
        `ValueError`: the first row of `train_dataset` lacks one of `columns`; `loss_type="aot"` with `ld_alpha`; [`pair_weights`] with a
        loss that is not a mean over pairs, or with "hinge".

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ext import ShiftedDPOTrainer

    >>> class MarginDPOTrainer(ShiftedDPOTrainer):
    ...     columns = ("margin",)
    ...
    ...     def logratio_shifts(self, pairs, term):
    ...         return -pairs.inputs["margin"] / self.beta, 0.0
    ```
    """

    # Besides `columns`: columns of the dataset, and keys of a batch, that the model must not get
    _own_columns: ClassVar[tuple[str, ...]] = ()
    _own_inputs: ClassVar[tuple[str, ...]] = ()
    # Option -> (the only accepted value, the reason and what to do instead)
    refused_options: ClassVar[dict[str, tuple[object, str]]] = {}
    # Whether log-probabilities come from this package's head instead of TRL's: the same up to rounding, in fewer head GEMMs
    _own_head = False
    # Whether all pairs are computed in one sequence without padding. With `share_prompt`, both answers of a pair follow one prompt
    padding_free = False
    _packs = False
    _is_prepared = False

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, *pos, **kwargs):
        padding_free = args is not None and args.padding_free
        if args is not None:
            self.refuse_options(args)
            self._set_packing(args, kwargs.get("peft_config"), model, ref_model)
        self._ref_weights = ref_model.state_dict() if isinstance(ref_model, nn.Module) else None
        # DPOTrainer (1.16) ignores `padding_free` with a warning
        with having(args, padding_free=False) if padding_free else contextlib.nullcontext():
            super().__init__(model, ref_model, args, *pos, **kwargs)
        self.padding_free = padding_free
        self._check_parts()
        self._prepare()

    def _prepare(self) -> None:
        """Finish the set-up once the models are loaded; DPOTrainer's constructor needs it earlier to precompute the reference."""
        if self._is_prepared:
            return
        self._is_prepared = True
        keep_nf4_trainable(self.model)
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        if self.ref_model is not None:
            load_sharded_reference(self, self._ref_weights)
            models.append(self.accelerator.unwrap_model(self.ref_model))
        self._ref_weights = None
        for model in models:
            add_position_kl_head(model)
            if self._packs:
                take_packed_pairs(model)
        if self.columns:
            self.data_collator = DataCollatorWithColumns(self.data_collator, self.columns)

    @classmethod
    def refuse_options(cls, args: DPOConfig) -> None:
        """Raise a `ValueError` with the option, the reason and what to do, before any model is loaded."""
        for name, (accepted, reason) in cls.refused_options.items():
            if getattr(args, name) != accepted:
                raise ValueError(f"`{name}={getattr(args, name)!r}` is not supported by {cls.__name__}: {reason}")
        by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if by_length and args.remove_unused_columns:  # otherwise a column `length` would do
            raise ValueError(
                f"`train_sampling_strategy={args.train_sampling_strategy!r}` is not supported by {cls.__name__}: a pair has no `input_ids`, whose "
                "length transformers takes. Leave it out; `padding_free=True` computes no padding in any order."
            )
        if "aot" in args.loss_type and args.ld_alpha is not None:
            raise ValueError(
                f"`loss_type='aot'` with `ld_alpha={args.ld_alpha}` is not supported by {cls.__name__}: AOT sorts the policy's log-"
                "probabilities apart from the reference's, so that the shift would be reweighted too. Use one of the two."
            )
        if cls._weighs_pairs() and (unweighed := [name for name in args.loss_type if name in WITHOUT_WEIGHTS]):
            raise ValueError(
                f"`loss_type={unweighed[0]!r}` is not supported by {cls.__name__}, which weighs pairs: {WITHOUT_WEIGHTS[unweighed[0]]}."
            )

    def _set_packing(self, args: DPOConfig, peft_config: PeftConfig | None, *models) -> None:
        """
        Check that the models can compute the pairs of a batch in one sequence, if `padding_free` or `share_prompt` asks for it. Called
        before `super().__init__`.
        """
        asked = {"padding_free": args.padding_free, "share_prompt": self.share_prompt}
        names = "` and `".join(f"{name}=True" for name in asked if asked[name])
        if self.max_batch_tokens is not None:
            self._check_token_batches(self.max_batch_tokens, bool(names), args)
        if not names:
            return
        advice = (
            f"Or leave out `{names}`: then the sequences of a batch are padded, and each prompt is computed twice."
        )
        if args.use_weighting:
            raise ValueError(
                f"`use_weighting=True` is not supported with `{names}`: the head for packed sequences has no such weights. {advice}"
            )
        for model in models:
            reason = (
                None if model is None else why_not_packed(model, args, peft_config, share_prompt=self.share_prompt)
            )
            if reason is not None:
                raise ValueError(f"`{names}` is not supported here: {reason} {advice}")
        self._packs = self._own_head = True

    # For a subclass to override

    def logratio_shifts(self, pairs: Pairs, term: Term) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """
        Compute the shifts that are added to the log-ratios before the loss.

        Args:
            pairs ([`Pairs`]):
                The batch.
            term ([`Term`]):
                The loss that is computed, never `"sft"`. IPO and `"sigmoid_norm"` divide the shifted log-ratios by the `lengths` of the
                responses.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(B,)` or `float`: the shifts of the chosen and of the rejected responses, in nats.
            Their gradient, if any, reaches the policy.
        """
        return 0.0, 0.0

    def pair_weights(self, pairs: Pairs, term: Term) -> torch.Tensor | None:
        """
        Compute the weights of the pairs' losses, `(B,)`, each at least 0 and without gradient; `None` for 1. The batch's loss is the
        mean of the products. The weights do not apply to `"sft"`; `"aot"`, `"aot_unpaired"` and `"hinge"` are refused.
        """
        return None

    def pair_metrics(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """Compute metrics by name, each `(B,)`. Their means over the pairs of all processes are logged."""
        return {}

    # TRL's loss with the subclass's shifts

    def _terms(self) -> list[Term]:
        return [Term(*term) for term in zip(self.loss_types, self.loss_weights, strict=True)]

    def _compute_loss(self, model, inputs, return_outputs):
        batch = self._trls(inputs)
        reference = self._reference_forward(inputs)
        pairs = term = None

        def policy(fused_lm_head=False, **kwargs):
            """Stands in for the model: runs it once, and returns what TRL sees for a term."""
            nonlocal pairs
            if not fused_lm_head:  # the logits for `compute_metrics`
                return model(**kwargs)
            if pairs is None:
                pairs = self._policy_forward(model, inputs, reference, kwargs)
            outputs, ref_logps = (pairs.outputs, pairs.ref_logps) if term is None else self._shifted(pairs, term)
            for seen, values in zip(buffers.values(), ref_logps, strict=True):
                seen.copy_(values)
            return outputs

        # Without a term: TRL's metrics on unshifted log-ratios, the experts' auxiliary loss and the logits
        buffers = self._reference_buffers(batch)
        with having(self, loss_types=[], loss_weights=[], precompute_ref_logps=True):
            result = super()._compute_loss(policy, {**batch, **buffers}, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        for term in self._terms():  # noqa: B007  (`policy` reads it)
            buffers = self._reference_buffers(batch)
            only = {"loss_types": [term.loss_type], "loss_weights": [term.weight], "precompute_ref_logps": True}
            weighs = (self.use_weighting or self._weighs_pairs()) and term.loss_type != "sft"
            only |= {"aux_loss_enabled": False, "use_weighting": weighs}
            unlogged = {"_metrics": {mode: defaultdict(list) for mode in self._metrics}}
            with having(self, **only, **unlogged, _total_train_tokens=self._total_train_tokens):
                term_loss = super()._compute_loss(policy, {**batch, **buffers}, False)
            loss = loss + self._term_loss(pairs, term, term_loss)
        self._record_metrics(pairs)
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _reference_buffers(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Buffers that TRL reads like the log-probabilities of a precomputed reference."""
        size, device = batch["input_ids"].size(0) // 2, batch["input_ids"].device
        return {f"ref_{side}_logps": torch.zeros(size, device=device) for side in ("chosen", "rejected")}

    def _shifted(self, pairs: Pairs, term: Term) -> tuple[ModelOutput, torch.Tensor]:
        """
        What TRL sees for a term: the policy's outputs, and the reference's log-probabilities `(2, B)` minus the shift, which shifts the
        log-ratios.
        """
        outputs, ref_logps = pairs.outputs, pairs.ref_logps
        if term.loss_type == "sft":
            return outputs, ref_logps
        shifts = [torch.as_tensor(shift).to(ref_logps) for shift in self.logratio_shifts(pairs, term)]
        shifts = torch.stack([shift.expand(ref_logps.size(1)) for shift in shifts])  # (2, B)
        changes = {}
        if term.loss_type == "aot":
            # AOT sorts the policy's log-probabilities apart from the reference's, so the policy's get the shift
            *first, last = outputs.log_probs.split([outputs.log_probs.size(1) - 1, 1], dim=1)
            changes["log_probs"] = torch.cat([*first, last + shifts.reshape(-1, 1)], dim=1)
        elif term.of_sums:  # TRL divides by the lengths
            logps = pairs.logps
            ref_logps = logps - pairs.lengths * (logps - ref_logps + shifts)
        else:
            ref_logps = ref_logps - shifts
        if self._weighs_pairs():
            changes["log_sum_sq_probs"] = self._weighted(pairs, self.pair_weights(pairs, term))
        return dataclasses.replace(outputs, **changes), ref_logps

    @classmethod
    def _weighs_pairs(cls) -> bool:
        return cls.pair_weights is not ShiftedDPOTrainer.pair_weights

    def _weighted(self, pairs: Pairs, weights: torch.Tensor | None) -> torch.Tensor:
        """
        `log_sum_sq_probs` that make TRL multiply each pair's loss by its weight. TRL's factor (WPO, Eq. 2) is `exp` of the mean over the
        response of `log_probs − log_sum_sq_probs`, for chosen and rejected; the weight goes into the factor of chosen.
        """
        length = pairs.mask.size(1)
        log_probs = pairs.outputs.log_probs.detach()[:, -length:]  # (2B, T)
        neutral = pairs.outputs.log_sum_sq_probs[:, -length:] if self.args.use_weighting else log_probs
        if weights is None:
            return neutral
        log_weights = torch.cat([weights.log(), torch.zeros_like(weights)]).unsqueeze(1)  # (2B, 1)
        return torch.where(pairs.mask, neutral - log_weights, neutral)

    def _term_loss(self, pairs: Pairs, term: Term, loss: torch.Tensor) -> torch.Tensor:
        """Return a term's loss; a subclass may record it."""
        return loss

    # The models

    def _trls(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a batch that TRL knows and passes on to the models."""
        return {name: value for name, value in inputs.items() if name not in (*self.columns, *self._own_inputs)}

    def _model_kwargs(self, kwargs: dict[str, Any], share_prompt: bool | None = None) -> dict[str, Any]:
        """
        The arguments of a model, packed if asked for, from TRL's: `input_ids`, `attention_mask` and `labels`, each `(2B, T + 1)`, and
        options. `share_prompt` overrides the trainer's.
        """
        if not self._packs:
            return kwargs
        tensors = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor) and name != "labels"}
        if others := tensors.keys() - {"input_ids", "attention_mask"}:
            raise ValueError(
                f"`padding_free` and `share_prompt` pack `input_ids` and `attention_mask`; this batch has {', '.join(sorted(others))} "
                "for the model too. Leave these out in your `data_collator`, or leave both options at `False`."
            )
        packed = PackedPairs.from_batch(
            **tensors,
            share_prompt=self.share_prompt if share_prompt is None else share_prompt,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )
        return {**kwargs, "packed_pairs": packed}

    @property
    def _log_probs_flag(self) -> dict[str, bool]:
        """The argument that asks a model for log-probabilities."""
        return {"completion_log_probs": True} if self._own_head else {"fused_lm_head": True}

    def compute_ref_log_probs(self, model, inputs):
        def reference(fused_lm_head, **kwargs):
            return model(**self._model_kwargs(kwargs), **self._log_probs_flag)

        return super().compute_ref_log_probs(reference, self._trls(inputs))

    def _with_reference(self, inputs: dict[str, torch.Tensor], forward: Callable) -> Any:
        """
        Call `forward(**kwargs)` as TRL calls the reference, under its adapter and precision and without gradient, and return its result.
        """
        found = []

        def reference(fused_lm_head, **kwargs):
            found.append(forward(**kwargs))
            return FusedCausalLMOutput(log_probs=torch.zeros_like(kwargs["labels"][:, 1:], dtype=torch.float32))

        super().compute_ref_log_probs(reference, self._trls(inputs))
        return found[0]

    def _reference_forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Run the reference for [`_policy_forward`]; here it returns log-probabilities, `(2, B)`."""
        if self.precompute_ref_logps:
            return torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return torch.stack(self.compute_ref_log_probs(self.ref_model or self.model, inputs))

    def _policy_forward(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reference: Any, kwargs: dict[str, Any]
    ) -> Pairs:
        """Run the policy with TRL's arguments."""
        if not self._own_head:
            unshard_head(self.model)
        return Pairs(inputs, model(**self._model_kwargs(kwargs), **self._log_probs_flag), reference)

    # Metrics

    def _record_metrics(self, pairs: Pairs) -> None:
        """Record the metrics beyond TRL's."""
        for name, values in self.pair_metrics(pairs).items():
            self._record(name, self.accelerator.gather(values.detach()).mean().item())

    def _record(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    # Around the training

    def _precompute_ref_logps(self, dataset, name, batch_size):
        self._prepare()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        own = (*self.columns, *self._own_columns)
        self._signature_columns += [name for name in own if name not in self._signature_columns]

    def train(self, *pos, **kwargs):
        """
        [`~transformers.Trainer.train`], after a check that there are parameters to train.

        Raises:
            `ValueError`: the adapter was loaded frozen. The constructor does not raise, since such a model can be evaluated.
        """
        if is_peft_model(self.model) and not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "The model is a `PeftModel` without trainable parameters, because PEFT freezes an adapter that it loads. Load it with "
                "`PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        return super().train(*pos, **kwargs)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write TRL's card with the data and the recipe. `dataset_name` may be a path; only names on the Hub are linked."""
        on_disk = dataset_name is not None and os.path.exists(dataset_name)
        super().create_model_card(model_name, None if on_disk else dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(self, os.path.basename(dataset_name) if on_disk else dataset_name)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if is_peft_model(model) and "ref" in model.peft_config:
            load_adapter_weights(model, resume_from_checkpoint, "default")
