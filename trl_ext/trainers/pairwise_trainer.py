"""
`DPOTrainer` with its one long `_compute_loss` split into named steps, for trainers that change one of them.

What a step computes is TRL's (1.16), line by line where it can be; `tests/test_trl_contract.py` pins what is relied on. Added
is TDPO's token-level term, the KL at each position, for the trainers that ask for it (`_set_token_level`). Deliberately not
here: the options of `DPOTrainer` that change the log-ratios themselves (`ld_alpha`, f-divergences, WPO weights). They are
refused by name.
"""

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from accelerate.utils import fsdp2_load_full_state_dict, is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers.utils import ModelOutput, is_bitsandbytes_available
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from .model_card import complete_card, model_settings, recipe_section, settings
from .packed_pairs import PackedPairs, take_packed_pairs, why_not_packed
from .position_kl_head import CompletionStates, add_position_kl_head


logger = get_logger(__name__)


@dataclass
class PairBatch:
    """A collated batch of B pairs, `[chosen, rejected]` along the first dimension, as the models take it."""

    model_kwargs: dict[str, torch.Tensor | bool | PackedPairs]
    labels: torch.Tensor  # (2B, T + 1), −100 outside the completions
    completion_mask: torch.Tensor  # (2B, T), aligned with the log-probabilities
    ref_logps: tuple[torch.Tensor, torch.Tensor] | None  # precomputed, of chosen and rejected, each (B,)

    @classmethod
    def from_inputs(
        cls,
        inputs: dict[str, torch.Tensor],
        packs: bool = False,
        share_prompt: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> "PairBatch":
        other = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        model_kwargs = {key: value for key, value in inputs.items() if key not in other}
        completion_mask = inputs["completion_mask"]
        ref_logps = None
        if "ref_chosen_logps" in inputs:
            ref_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        packed = {}
        if packs:
            if others := model_kwargs.keys() - {"input_ids", "attention_mask"}:
                raise ValueError(
                    f"`padding_free` and `share_prompt` pack `input_ids` and `attention_mask`; this batch has "
                    f"{', '.join(sorted(others))} for the model too. Leave these out in your `data_collator`, or leave both "
                    "at `False`."
                )
            packed["packed_pairs"] = PackedPairs.from_batch(
                **model_kwargs, share_prompt=share_prompt, pad_to_multiple_of=pad_to_multiple_of
            )
        return cls(
            model_kwargs={**model_kwargs, **packed, "use_cache": False},
            labels=inputs["input_ids"].masked_fill(completion_mask == 0, -100),
            completion_mask=completion_mask[:, 1:],
            ref_logps=ref_logps,
        )


@dataclass
class PairLogps:
    """Log-probabilities of B pairs, each of shape `(B,)`, in nats, summed over the completion."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor

    @property
    def chosen_logratios(self) -> torch.Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> torch.Tensor:
        return self.rejected - self.ref_rejected


def load_adapter_weights(model: PeftModel, path: str | Path, adapter_name: str) -> None:
    """
    Load saved weights into an adapter that `model` has. Resuming needs it: beside a "ref" adapter, transformers loads the
    adapters in a checkpoint's subfolders and leaves the trained one, at its root, as it was.
    """
    set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name=adapter_name)


def load_sharded_reference(trainer: DPOTrainer, weights: dict[str, torch.Tensor] | None) -> None:
    """
    Give all processes their part of the reference. With `fsdp_cpu_ram_efficient_loading` the main process alone has
    loaded its weights, the others have zeros; accelerate sends them the policy's from there when it shards it, but TRL
    shards the reference as it is.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            With its models, of which the policy is not sharded yet.
        weights (`dict[str, torch.Tensor]`, *optional*):
            The reference's. Default: the policy's.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
        weights = trainer.model.state_dict() if weights is None else weights
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        fsdp2_load_full_state_dict(trainer.accelerator, trainer.ref_model, weights, cpu_offload=offloads)


def own_device() -> dict[str, None]:
    """
    What a model is loaded with in one of several processes, each of which has its own: TRL would spread the reference over all
    GPUs under FSDP.
    """
    return {"device_map": None} if "WORLD_SIZE" in os.environ else {}


def count_truncated(dataset: Dataset, max_length: int) -> tuple[int, int]:
    """
    What `max_length` cuts off a tokenized preference dataset.

    Returns:
        `tuple[int, int]`: rows with a sequence that is longer, and the tokens beyond, of chosen and rejected together.
    """
    rows = tokens = 0
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        prompt, chosen, rejected = (pc.list_value_length(table[column]).to_numpy() for column in columns)
        beyond = np.maximum(prompt + chosen - max_length, 0) + np.maximum(prompt + rejected - max_length, 0)
        rows, tokens = rows + int((beyond > 0).sum()), tokens + int(beyond.sum())
    return rows, tokens


def keep_nf4_trainable(model: nn.Module) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs NF4 weights for inference in the first forward of an evaluation and
    does not unpack them for training: from then on no gradient passes them. Leave them as they are.
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


class PairwiseTrainer(DPOTrainer):
    """
    Base of the preference trainers of this package. The only change w.r.t. [`~trl.DPOTrainer`] is that `_compute_loss`
    is an outline of steps: [`_reference_forward`], [`_policy_forward`], [`_pair_losses`], [`_record_metrics`].
    """

    # TDPO's variant, for a loss with its token-level term
    variant: str | None = None
    # Whether the policy's log-probabilities come from the head of this package rather than from TRL's: the same numbers, but
    # for rounding, in fewer head GEMMs
    _own_head = False
    _separate_sft = False
    # Whether all pairs are computed in one sequence without padding, and whether both answers of a pair stand behind one prompt
    _packs = False
    share_prompt = False
    _is_prepared = False
    # Loss types the subclass has a loss for, besides "sft", which is DPOTrainer's
    _pair_loss_types: ClassVar[tuple[str, ...]] = ()
    # Option -> (the only accepted value, why, and what to do instead)
    _refused_options: ClassVar[dict[str, tuple[object, str]]] = {
        "ld_alpha": (
            None,
            "it reweights the tokens of DPO's own log-ratios. Leave it unset, or use `trl.DPOTrainer`.",
        ),
        "use_weighting": (
            False,
            "WPO's weights are defined for DPO's losses. Leave it `False`, or use `trl.DPOTrainer`.",
        ),
        "f_divergence_type": (
            "reverse_kl",
            "the loss is derived for the reverse KL. Leave it at 'reverse_kl', or use `trl.DPOTrainer`.",
        ),
        "label_smoothing": (
            0.0,
            "the paper's loss has no label smoothing. Leave it at 0, or use `trl.DPOTrainer` with 'robust'.",
        ),
    }

    def __init__(self, model, ref_model, args, *pos, **kwargs):
        self._ref_weights = ref_model.state_dict() if isinstance(ref_model, nn.Module) else None
        padding_free, args.padding_free = args.padding_free, False  # of which DPOTrainer (1.16) says that it has none
        try:
            super().__init__(model, ref_model, args, *pos, **kwargs)
        finally:
            args.padding_free = padding_free
        self.padding_free = padding_free
        self._prepare_models()

    def _prepare_models(self) -> None:
        """
        Give both models the head of this package, once; TRL's own stays for all that does not ask for ours. DPOTrainer's
        constructor needs it already where it precomputes the reference.
        """
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

    @classmethod
    def _refuse_options(cls, args: DPOConfig, honoured: Collection[str] = ()) -> None:
        """
        Raise a `ValueError` that names the option, the reason and the way out, before any model is loaded. Options that are
        `honoured`, beside others of `args`, are let through.
        """
        for name, (accepted, reason) in cls._refused_options.items():
            if name not in honoured and getattr(args, name) != accepted:
                raise ValueError(f"`{name}={getattr(args, name)!r}` is not supported by {cls.__name__}: {reason}")
        accepted = (*cls._pair_loss_types, "sft")
        for loss_type in args.loss_type:
            if loss_type not in accepted:
                raise ValueError(
                    f"`loss_type={loss_type!r}` is not supported by {cls.__name__}, which knows {list(accepted)}. Use "
                    "one of these, or `trl.DPOTrainer` for the other losses."
                )
        if not set(args.loss_type) & set(cls._pair_loss_types):
            raise ValueError(
                f"`loss_type={args.loss_type!r}` has no preference loss, so {cls.__name__} would be plain SFT on the "
                f"chosen answers. Add one of {list(cls._pair_loss_types)}, or use `trl.SFTTrainer`."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):  # streaming datasets have no length
            message = (
                f"{len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset were dropped: "
                f"their prompt alone fills `max_length={args.max_length}`."
            )
            if len(prepared) == 0:
                raise ValueError(f"{message} Nothing is left to train on: raise `max_length`.")
            logger.warning(message)
        if isinstance(prepared, Dataset) and "prompt_ids" in prepared.column_names and args.max_length is not None:
            rows, tokens = count_truncated(prepared, args.max_length)
            if rows > 0:
                logger.warning(
                    f"{rows} of {len(prepared)} rows of the {dataset_name} dataset are longer than "
                    f"`max_length={args.max_length}`: {tokens} tokens are cut off."
                )
        return prepared

    def train(self, *pos, **kwargs):
        """
        [`~transformers.Trainer.train`], of a model that has something to train.

        Raises:
            `ValueError`: an adapter that was loaded frozen. Not in the constructor: such a model can be evaluated, and TRL asks for a
            `train_dataset` in any case.
        """
        if is_peft_model(self.model) and not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "The model is a `PeftModel` without a trainable parameter: nothing would be trained. PEFT freezes an adapter that it "
                "loads; load it with `PeftModel.from_pretrained(..., is_trainable=True)`."
            )
        return super().train(*pos, **kwargs)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's card, with the data and the recipe. `dataset_name` may be a path; only one on the Hub is linked."""
        on_disk = dataset_name is not None and os.path.exists(dataset_name)
        super().create_model_card(model_name, None if on_disk else dataset_name, tags)
        if not self.is_world_process_zero():
            return
        model, base = self.accelerator.unwrap_model(self.model), get_config_model_id(self.model.config)
        rows = (
            f"{len(self.train_dataset):,} preference pairs" if isinstance(self.train_dataset, Dataset) else "A stream"
        )
        source = os.path.basename(dataset_name) if on_disk else dataset_name
        sections = {
            "Data": f"{rows}." if source is None else f"{rows} of `{source}`.",
            "Recipe": recipe_section({**model_settings(model, base), **settings(self.args)}),
        }
        file = Path(self.args.output_dir) / "README.md"
        chat = getattr(self.processing_class, "chat_template", None) is not None
        file.write_text(complete_card(file.read_text(encoding="utf-8"), base, chat, sections), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if is_peft_model(model) and "ref" in model.peft_config:
            load_adapter_weights(model, resume_from_checkpoint, "default")

    def _set_token_level(self, variant: str | None, alpha: float, args: DPOConfig) -> None:
        """Ask for the KL at each position and the gradient that TDPO's `variant` takes from it. Before `super().__init__`."""
        self.variant, self.alpha = variant, alpha
        # Weight of the KL against the log-probability in the gradient of each side: with it one Jacobian is enough. SFT on
        # the chosen answers needs the log-probability's alone, which TDPO1 does not leave there.
        self._kl_weight = {None: None, "tdpo1": (1.0, 1.0), "tdpo2": (0.0, alpha)}[variant]
        self._separate_sft = variant == "tdpo1" and "sft" in args.loss_type

    def _set_packing(self, args: DPOConfig, share_prompt: bool, peft_config: PeftConfig | None, *models) -> None:
        """
        Have all of `models` that there are compute the pairs of a batch in one sequence, for `padding_free` and for
        `share_prompt`. Before `super().__init__`.
        """
        options = [
            name for name, asked in (("padding_free", args.padding_free), ("share_prompt", share_prompt)) if asked
        ]
        if not options:
            return
        for model in models:
            reason = None if model is None else why_not_packed(model, args, peft_config, share_prompt=share_prompt)
            if reason is not None:
                raise ValueError(
                    f"`{'=True` and `'.join(options)}=True` is not supported here: {reason} Or leave {' and '.join(options)} at "
                    "`False`: all pairs are then padded to the longest sequence of the batch, each prompt computed twice."
                )
        self.share_prompt, self._packs, self._own_head = share_prompt, True, True

    def _pair_batch(self, inputs: dict[str, torch.Tensor]) -> PairBatch:
        return PairBatch.from_inputs(inputs, self._packs, self.share_prompt, self.args.pad_to_multiple_of)

    def _compute_loss(self, model, inputs, return_outputs):
        batch = self._pair_batch(inputs)
        reference = self._reference_forward(batch)
        policy = self._policy_forward(model, batch, reference)
        logps = self._pair_logps(batch, policy, reference)
        loss = self._loss(batch, policy, logps)
        self._record_metrics(batch, policy, logps)
        if return_outputs:
            warnings.warn(
                "`return_outputs=True` is deprecated in TRL: the logits are recomputed with an extra forward pass.",
                FutureWarning,
                stacklevel=2,
            )
            with torch.no_grad():
                return loss, model(**batch.model_kwargs)
        return loss

    # Step 1: the reference

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        """
        The model that answers as the reference: `ref_model`, the "ref" copy of a trained adapter, or the base model of
        a new one. No gradients, inside accelerate's autocast (a forward patched after the model was prepared would
        run outside it).
        """
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            peft_model = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
            adapter,
        ):
            yield self.model if self.ref_model is None else self.ref_model

    def _reference_forward(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor] | CompletionStates:
        """
        Returns the reference's log-probabilities of chosen and rejected, each `(B,)`, or for a token-level loss its states at
        the completions, from which the policy's forward computes them beside the KL.
        """
        if self.precompute_ref_logps:
            return batch.ref_logps
        with self._reference_model() as ref_model:
            if self.variant is not None:
                return ref_model(**batch.model_kwargs, labels=batch.labels, completion_states=True)
            return self._reference_logps(ref_model, batch)

    def _reference_logps(self, ref_model: nn.Module, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        ref_outputs = ref_model(**batch.model_kwargs, labels=batch.labels, **self._head_kwargs())
        return self._sum_over_completion(ref_outputs.log_probs, batch)

    def compute_ref_log_probs(self, model, inputs):
        if not self._packs:
            return super().compute_ref_log_probs(model, inputs)
        with self._reference_model():
            return self._reference_logps(model, self._pair_batch(inputs))

    # Step 2: the policy

    def _policy_forward(
        self, model: nn.Module, batch: PairBatch, reference: tuple[torch.Tensor, torch.Tensor] | CompletionStates
    ) -> ModelOutput:
        """Returns the policy's per-token outputs, each `(2B, T)`."""
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        head_kwargs = self._head_kwargs()
        if self.variant is not None:
            head_kwargs = {"reference": reference, "kl_weight": self._kl_weight, "separate_sft": self._separate_sft}
        elif not self._own_head:
            self._unshard_head()
        return model(**batch.model_kwargs, **router, labels=batch.labels, **head_kwargs)

    def _unshard_head(self) -> None:
        """
        Under FSDP2, TRL reads the head's weight without calling the head. Where that is a unit of its own, TRL would gather the
        weight itself, and each process would train its part of the head on its own pairs only.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule) and torch.is_grad_enabled():
            head.unshard()

    def _head_kwargs(self) -> dict[str, bool]:
        """The forward flag that asks a model for log-probabilities."""
        return {"completion_log_probs": True} if self._own_head else {"fused_lm_head": True}

    def _pair_logps(
        self,
        batch: PairBatch,
        policy: ModelOutput,
        reference: tuple[torch.Tensor, torch.Tensor] | CompletionStates,
    ) -> PairLogps:
        if self.variant is not None:
            reference = self._sum_over_completion(policy.ref_log_probs, batch)
        return PairLogps(*self._sum_over_completion(policy.log_probs, batch), *reference)

    def _position_kls(self, batch: PairBatch, policy: ModelOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """TDPO's `SeqKL` of chosen and rejected, each `(B,)`."""
        return self._sum_over_completion(policy.position_kl, batch)

    @staticmethod
    def _sum_over_completion(per_token: torch.Tensor, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums `(2B, T)` over the completions, zero elsewhere, to chosen and rejected, each `(B,)`."""
        # Prompt-learning PEFT prepends virtual tokens to the outputs; keep the positions of the real tokens
        return per_token[:, -batch.completion_mask.size(1) :].sum(dim=1).chunk(2, dim=0)

    # Step 3: the loss

    def _pair_losses(self, loss_type: str, batch: PairBatch, policy: ModelOutput, logps: PairLogps) -> torch.Tensor:
        """The subclass's preference loss, `(B,)`."""
        raise NotImplementedError

    def _loss(self, batch: PairBatch, policy: ModelOutput, logps: PairLogps) -> torch.Tensor:
        loss = 0.0
        for loss_type, loss_weight in zip(self.loss_types, self.loss_weights, strict=True):
            if loss_type == "sft":
                chosen_mask, _ = batch.completion_mask.chunk(2, dim=0)
                per_token_logps = policy.sft_log_probs if self._separate_sft else policy.log_probs
                chosen_per_token_logps, _ = per_token_logps[:, -batch.completion_mask.size(1) :].chunk(2, dim=0)
                losses = -chosen_per_token_logps[chosen_mask.bool()].mean()
            else:
                losses = self._pair_losses(loss_type, batch, policy, logps)
            loss = loss + losses.mean() * loss_weight
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        return loss

    # Step 4: the metrics

    def _record(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _record_mean(self, name: str, per_pair: torch.Tensor) -> None:
        """Record the mean over all processes of a value per pair, `(B,)`."""
        self._record(name, self.accelerator.gather(per_pair.detach()).mean().item())

    def _record_token_mean(self, name: str, per_token: torch.Tensor, mask: torch.Tensor) -> None:
        """Record the mean over all processes' tokens where `mask` is set."""
        total = self.accelerator.gather_for_metrics(per_token.detach()[mask.bool()].sum()).sum()
        count = self.accelerator.gather_for_metrics(mask.sum()).sum()
        self._record(name, (total / count).item() if count > 0 else 0.0)

    def _record_metrics(self, batch: PairBatch, policy: ModelOutput, logps: PairLogps) -> None:
        """DPOTrainer's metrics, under its names and with its meanings."""
        seq_len = batch.completion_mask.size(1)
        chosen_mask, rejected_mask = batch.completion_mask.chunk(2, dim=0)
        chosen_mean_logits, rejected_mean_logits = policy.mean_logits[:, -seq_len:].chunk(2, dim=0)
        chosen_is_top1, _ = policy.is_top1[:, -seq_len:].chunk(2, dim=0)

        if self.aux_loss_enabled:
            self._record("aux_loss", self.accelerator.gather_for_metrics(policy.aux_loss).mean().item())
        self._record_token_mean("entropy", policy.entropy[:, -seq_len:], batch.completion_mask)
        if self.model.training:
            num_tokens = self.accelerator.gather_for_metrics(batch.model_kwargs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += num_tokens // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        self._record_token_mean("logits/chosen", chosen_mean_logits, chosen_mask)
        self._record_token_mean("logits/rejected", rejected_mean_logits, rejected_mask)
        self._record_token_mean("mean_token_accuracy", chosen_is_top1.float(), chosen_mask)

        chosen_rewards = self.beta * logps.chosen_logratios
        rejected_rewards = self.beta * logps.rejected_logratios
        self._record_mean("rewards/chosen", chosen_rewards)
        self._record_mean("rewards/rejected", rejected_rewards)
        self._record_mean("rewards/accuracies", (chosen_rewards > rejected_rewards).float())
        self._record_mean("rewards/margins", chosen_rewards - rejected_rewards)
        self._record_mean("logps/chosen", logps.chosen)
        self._record_mean("logps/rejected", logps.rejected)
        if self.variant is not None:
            chosen_kl, rejected_kl = self._position_kls(batch, policy)
            self._record_mean("position_kl/chosen", chosen_kl)
            self._record_mean("position_kl/rejected", rejected_kl)
            self._record_mean("position_kl/margin", chosen_kl - rejected_kl)
            # The paper's rewards, β (logratio + SeqKL)
            self._record_mean("rewards_tdpo/chosen", chosen_rewards + self.beta * chosen_kl)
            self._record_mean("rewards_tdpo/rejected", rejected_rewards + self.beta * rejected_kl)
