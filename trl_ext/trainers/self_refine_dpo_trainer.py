import copy
import json
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig
from trl.data_utils import _tokenize, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from ..losses.self_refine import self_refine_dpo_loss
from .pairwise_trainer import PairBatch, PairLogps, PairwiseTrainer
from .self_refine_dpo_config import SelfRefineDPOConfig


AUGMENTED = "augmented_"


def augment_prompt(prompt: str | list[dict], refinement_prompt: str, role: str = "user") -> str | list[dict]:
    """
    The paper's `p ⊕ x`: put the refinement prompt before the query.

    Args:
        prompt (`str` or `list[dict]`):
            Plain text, or messages with `role` and `content`.
        refinement_prompt (`str`):
            The prompt p. An empty one leaves the prompt as it is.
        role (`str`, *optional*, defaults to `"user"`):
            The message that takes p: the first one of this role, `"user"` or `"system"`.

    Raises:
        `ValueError`: a plain-text prompt with `role="system"`, no user message, or content that is not text.

    Example:

    ```python
    >>> augment_prompt("Why is the sky blue?", "Be useful. Query:")
    'Be useful. Query: Why is the sky blue?'
    ```
    """
    if not refinement_prompt:
        return prompt
    if isinstance(prompt, str):
        if role != "user":
            raise ValueError("`refinement_prompt_role='system'` needs conversational prompts; these are plain text.")
        return f"{refinement_prompt} {prompt}"
    messages = copy.deepcopy(prompt)
    message = next((message for message in messages if message["role"] == role), None)
    if message is None and role == "system":
        return [{"role": "system", "content": refinement_prompt}, *messages]
    if message is None or not isinstance(message["content"], str):
        raise ValueError(
            f"The refinement prompt goes before the text of the first {role} message, and this prompt has none: {prompt}"
        )
    separator = " " if role == "user" else "\n\n"
    message["content"] = f"{refinement_prompt}{separator}{message['content']}"
    return messages


@dataclass
class DataCollatorForSelfRefinement(DataCollatorForPreference):
    """
    [`~trl.trainer.dpo_trainer.DataCollatorForPreference`] that collates the same completions twice: after the prompt,
    and after the augmented prompt under keys with the prefix `augmented_`. Truncation follows the plain sequence, so both
    halves keep the same completion tokens: the augmented sequences may exceed `max_length` by the length of the
    refinement prompt.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        kept = [None if self.max_length is None else self.max_length - len(e["prompt_ids"]) for e in examples]
        augmented_examples = [
            {
                "prompt_ids": example["augmented_prompt_ids"],
                "chosen_ids": example["chosen_ids"][:k],
                "rejected_ids": example["rejected_ids"][:k],
            }
            for example, k in zip(examples, kept, strict=True)
        ]
        collator = DataCollatorForPreference(self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        augmented = collator.torch_call(augmented_examples)
        return batch | {AUGMENTED + key: value for key, value in augmented.items()}


class SelfRefineDPOTrainer(PairwiseTrainer):
    """
    Trainer for quality-aware self-refined DPO and IPO (Sr-DPO, Sr-IPO, https://huggingface.co/papers/2405.21040).

    The only change w.r.t. [`~trl.DPOTrainer`] is the loss: the margin of each pair is lowered by `λ Δ`, where Δ (Eq. 12)
    is DPO's own margin under a prompt that asks for the best answer, without gradient. Arguments, datasets, PEFT and the
    reference model are [`~trl.DPOTrainer`]'s; `args` may be a plain [`~trl.DPOConfig`], which takes the defaults of
    [`SelfRefineDPOConfig`].

    Logged besides DPOTrainer's metrics: `refinement/margin` (Δ), `refinement/accuracies` (share of pairs with Δ > 0: the
    paper's accuracy on prompt-augmented pairs) and `refinement/marginal` (the paper's average marginal,
    `logratio(y_w|x) − logratio(y_l|x)`, in nats).

    Raises:
        `ValueError`: an option that has no meaning here (`precompute_ref_log_probs`, `ld_alpha`, `use_weighting`,
        `f_divergence_type`, `label_smoothing`, `truncation_mode="keep_end"`, other loss types than "sigmoid", "ipo" and
        "sft"), before any model is loaded; a vision dataset.

    Example:

    ```python
    >>> from trl_ext import SelfRefineDPOTrainer
    >>> from datasets import load_dataset

    >>> trainer = SelfRefineDPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-ext", "self-refine-dpo"]
    _name = "Self-Refine DPO"
    _paper = {
        "title": "Direct Alignment of Language Models via Quality-Aware Self-Refinement",
        "id": "2405.21040",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yu2024direct,
                title        = {{Direct Alignment of Language Models via Quality-Aware Self-Refinement}},
                author       = {Runsheng Yu and Yong Wang and Xiaoqi Jiao and Youzhi Zhang and James T. Kwok},
                year         = 2024,
                eprint       = {arXiv:2405.21040},
            }"""),
    }

    _pair_loss_types = ("sigmoid", "ipo")
    _refused_options = PairwiseTrainer._refused_options | {
        "precompute_ref_log_probs": (
            False,
            "the reference also has to answer the augmented prompts, and is gone by then. Set it to `False`; with LoRA the "
            "reference costs no memory, since it is the model without adapter.",
        ),
        "truncation_mode": (
            "keep_start",
            "the plain and the augmented sample must keep the same completion tokens. Use 'keep_start' (the default).",
        ),
    }

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, data_collator=None, *pos, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SelfRefineDPOConfig(f"{model_name.split('/')[-1]}-Self-Refine-DPO")
        self._refuse_options(args)
        config = args if isinstance(args, SelfRefineDPOConfig) else SelfRefineDPOConfig  # a plain DPOConfig: defaults
        self.refinement_weight = config.refinement_weight
        self.refinement_prompt = config.refinement_prompt
        self.refinement_prompt_role = config.refinement_prompt_role
        self.ipo_length_normalization = config.ipo_length_normalization

        super().__init__(model, ref_model, args, data_collator, *pos, **kwargs)

        if self._is_vision_dataset:
            raise ValueError(
                "SelfRefineDPOTrainer does not support vision datasets: their prompts are rendered batch by batch, out of "
                "its reach. Use `trl.DPOTrainer`."
            )
        if data_collator is None:
            self.data_collator = DataCollatorForSelfRefinement(**vars(self.data_collator))

    # Data: each row gets the token ids of its augmented prompt

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        def tokenize_augmented_prompt(example, processing_class, refinement_prompt, role):
            template_kwargs = {}
            if is_conversational(example):  # rendered as DPOTrainer renders it
                tools = example.get("tools")
                tools = json.loads(tools) if isinstance(tools, str) else tools
                template_kwargs = {
                    "tools": tools,
                    "add_generation_prompt": True,
                    **example.get("chat_template_kwargs", {}),
                }
            prompt = augment_prompt(example["prompt"], refinement_prompt, role)
            augmented_ids = _tokenize(processing_class, prompt, **template_kwargs)["input_ids"]
            prompt_ids = _tokenize(processing_class, example["prompt"], **template_kwargs)["input_ids"]
            # Where the template renders a prompt differently alone than before a completion, DPOTrainer leaves the end
            # of the prompt out of the sequence; leave out the same tokens here
            left_out = len(prompt_ids) - len(example["prompt_ids"])
            return {"augmented_prompt_ids": augmented_ids[: len(augmented_ids) - left_out]}

        map_kwargs = {}
        if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Augmenting {dataset_name} prompts"}
        fn_kwargs = {
            "processing_class": processing_class,
            "refinement_prompt": self.refinement_prompt,
            "role": self.refinement_prompt_role,
        }
        with global_then_local_main_first():
            return dataset.map(tokenize_augmented_prompt, fn_kwargs=fn_kwargs, **map_kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "augmented_prompt_ids" not in self._signature_columns:
            self._signature_columns.append("augmented_prompt_ids")

    @staticmethod
    def _split_augmented(inputs: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        """Splits a collated batch into the plain and the augmented one, both under TRL's keys."""
        plain = {key: value for key, value in inputs.items() if not key.startswith(AUGMENTED)}
        augmented = {key[len(AUGMENTED) :]: value for key, value in inputs.items() if key.startswith(AUGMENTED)}
        return plain, augmented

    # Loss

    def _compute_loss(self, model, inputs, return_outputs):
        plain, augmented = self._split_augmented(inputs)
        if not augmented:
            raise ValueError(
                "The batch has no `augmented_input_ids`: a custom `data_collator` must collate `augmented_prompt_ids` too. "
                "Derive it from `trl_ext.trainers.self_refine_dpo_trainer.DataCollatorForSelfRefinement`."
            )
        self._augmented_logratios = self._augmented_forward(model, PairBatch.from_inputs(augmented))
        return super()._compute_loss(model, plain, return_outputs)

    def _augmented_forward(self, model, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios of chosen and rejected given `p ⊕ x`, each `(B,)`, without gradient (Eq. 12)."""
        forward_kwargs = {**batch.model_kwargs, "labels": batch.labels, "fused_lm_head": True}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            logps = self._sum_over_completion(model(**forward_kwargs).log_probs, batch)
        with self._reference_model() as ref_model:
            ref_logps = self._sum_over_completion(ref_model(**forward_kwargs).log_probs, batch)
        return logps[0] - ref_logps[0], logps[1] - ref_logps[1]

    def _pair_losses(self, loss_type, batch: PairBatch, policy, logps: PairLogps) -> torch.Tensor:
        augmented_chosen, augmented_rejected = self._augmented_logratios
        chosen, rejected = logps.chosen_logratios, logps.rejected_logratios
        if loss_type == "ipo" and self.ipo_length_normalization:
            # TRL's IPO takes means over the response's tokens; Δ must be in the same unit
            chosen_length, rejected_length = (batch.labels != -100).sum(dim=1).clamp(min=1.0).chunk(2, dim=0)
            chosen, augmented_chosen = chosen / chosen_length, augmented_chosen / chosen_length
            rejected, augmented_rejected = rejected / rejected_length, augmented_rejected / rejected_length
        # Eq. 12
        refinement_margin = self.beta * (augmented_chosen - augmented_rejected)  # (B,)
        losses, _, _ = self_refine_dpo_loss(
            chosen,
            rejected,
            refinement_margin,
            beta=self.beta,
            refinement_weight=self.refinement_weight,
            loss_type=loss_type,
        )
        return losses

    def _record_metrics(self, batch: PairBatch, policy, logps: PairLogps) -> None:
        super()._record_metrics(batch, policy, logps)
        augmented_chosen, augmented_rejected = self._augmented_logratios
        refinement_margin = self.beta * (augmented_chosen - augmented_rejected)
        self._record_mean("refinement/margin", refinement_margin)
        self._record_mean("refinement/accuracies", (refinement_margin > 0).float())
        self._record_mean("refinement/marginal", logps.chosen_logratios - logps.rejected_logratios)
