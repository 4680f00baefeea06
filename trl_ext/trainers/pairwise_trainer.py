"""
`DPOTrainer` with its one long `_compute_loss` split into named steps, for trainers that change one of them.

What a step computes is TRL's (1.16), line by line where it can be; `tests/test_trl_contract.py` pins what is relied on.
Deliberately not here: the options of `DPOTrainer` that change the log-ratios themselves (`ld_alpha`, f-divergences, WPO
weights) and precomputed references. They are refused by name.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import fsdp2_load_full_state_dict, is_peft_model
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers.utils import ModelOutput
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter


logger = get_logger(__name__)


@dataclass
class PairBatch:
    """A collated batch of B pairs, `[chosen, rejected]` along the first dimension, as the models take it."""

    model_kwargs: dict[str, torch.Tensor | bool]
    labels: torch.Tensor  # (2B, T + 1), −100 outside the completions
    completion_mask: torch.Tensor  # (2B, T), aligned with the log-probabilities

    @classmethod
    def from_inputs(cls, inputs: dict[str, torch.Tensor]) -> "PairBatch":
        model_kwargs = {key: value for key, value in inputs.items() if key != "completion_mask"}
        completion_mask = inputs["completion_mask"]
        return cls(
            model_kwargs=model_kwargs | {"use_cache": False},
            labels=inputs["input_ids"].masked_fill(completion_mask == 0, -100),
            completion_mask=completion_mask[:, 1:],
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


class PairwiseTrainer(DPOTrainer):
    """
    Base of the preference trainers of this package. The only change w.r.t. [`~trl.DPOTrainer`] is that `_compute_loss`
    is an outline of steps: [`_reference_forward`], [`_policy_forward`], [`_pair_losses`], [`_record_metrics`].
    """

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

    def __init__(self, model, ref_model=None, *pos, **kwargs):
        ref_weights = None if ref_model is None else ref_model.state_dict()
        super().__init__(model, ref_model, *pos, **kwargs)
        if self.ref_model is not None and self.is_fsdp_enabled:
            self._load_sharded_reference(self.model.state_dict() if ref_weights is None else ref_weights)

    def _load_sharded_reference(self, weights: dict[str, torch.Tensor]) -> None:
        """
        Give all processes their part of the reference's `weights`. With `fsdp_cpu_ram_efficient_loading` the main process
        alone has loaded them, the others have zeros; accelerate sends them the policy's from there when it shards it,
        but TRL shards the reference as it is.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
            offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
            fsdp2_load_full_state_dict(self.accelerator, self.ref_model, weights, cpu_offload=offloads)

    @classmethod
    def _refuse_options(cls, args: DPOConfig) -> None:
        """Raise a `ValueError` that names the option, the reason and the way out, before any model is loaded."""
        for name, (accepted, reason) in cls._refused_options.items():
            if getattr(args, name) != accepted:
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
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if is_peft_model(model) and "ref" in model.peft_config:
            load_adapter_weights(model, resume_from_checkpoint, "default")

    def _compute_loss(self, model, inputs, return_outputs):
        batch = PairBatch.from_inputs(inputs)
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

    def _reference_forward(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the reference's log-probabilities of chosen and rejected, each `(B,)`."""
        with self._reference_model() as ref_model:
            ref_outputs = ref_model(**batch.model_kwargs, labels=batch.labels, fused_lm_head=True)
        return self._sum_over_completion(ref_outputs.log_probs, batch)

    # Step 2: the policy

    def _policy_forward(self, model: nn.Module, batch: PairBatch, reference: object) -> ModelOutput:
        """Returns the policy's per-token outputs, each `(2B, T)`."""
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule) and torch.is_grad_enabled():
            # TRL reads the head's weight without calling the head. Where that is a unit of its own, TRL would gather the
            # weight itself, and each process would train its part of the head on its own pairs only
            head.unshard()
        return model(**batch.model_kwargs, **router, labels=batch.labels, fused_lm_head=True)

    def _pair_logps(self, batch: PairBatch, policy: ModelOutput, reference: object) -> PairLogps:
        return PairLogps(*self._sum_over_completion(policy.log_probs, batch), *reference)

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
                chosen_per_token_logps, _ = policy.log_probs[:, -batch.completion_mask.size(1) :].chunk(2, dim=0)
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
