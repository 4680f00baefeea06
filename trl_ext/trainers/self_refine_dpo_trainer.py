import copy
import dataclasses
import json
import os
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers.utils.generic import is_flash_attention_requested
from trl import DPOConfig
from trl.data_utils import _tokenize, common_prefix_length, is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import global_then_local_main_first, pad

from ..losses.shifts import self_refine_shifts
from ..rows.judge import TOKENS
from .position_kl_head import CachedPrompts, takes_cached_prompts
from .self_refine_dpo_config import SelfRefineDPOConfig
from .tdpo_trainer import TokenLevelTrainer


logger = get_logger(__name__)

# Tensors that the collator adds for the refinement function
AUGMENTED_TENSORS = (
    "augmented_prefix_ids",
    "augmented_prompt_ids",
    "augmented_prompt_mask",
    "completion_ids",
    "completion_attention_mask",
)
# Columns of the reference's precomputed log-probabilities of chosen and rejected given p ⊕ x
REF_AUGMENTED_LOGPS = ("ref_augmented_chosen_logps", "ref_augmented_rejected_logps")


def augment_prompt(prompt: str | list[dict], refinement_prompt: str, role: str = "user") -> str | list[dict]:
    """
    Put the refinement prompt before the query, the paper's `p ⊕ x`.

    Args:
        prompt (`str` or `list[dict]`):
            Plain text, or messages with `role` and `content`.
        refinement_prompt (`str`):
            The prompt p. An empty one leaves the prompt as it is.
        role (`str`, *optional*, defaults to `"user"`):
            Role of the message that gets p, the first one of `"user"` or `"system"`.

    Raises:
        `ValueError`: a plain-text prompt with `role="system"`, a prompt without a user message, or content that is not text.

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
            raise ValueError(
                "`refinement_prompt_role='system'` needs conversational prompts, but these are plain text. Use 'user'."
            )
        return f"{refinement_prompt} {prompt}"
    messages = copy.deepcopy(prompt)
    message = next((message for message in messages if message["role"] == role), None)
    if message is None and role == "system":
        return [{"role": "system", "content": refinement_prompt}, *messages]
    if message is None or not isinstance(message["content"], str):
        raise ValueError(
            f"The refinement prompt goes before the text of the first {role} message, but this prompt has no such text: {prompt}"
        )
    separator = " " if role == "user" else "\n\n"
    message["content"] = f"{refinement_prompt}{separator}{message['content']}"
    return messages


def augmented_lengths(dataset: Dataset, args: DPOConfig) -> np.ndarray:
    """The number of tokens of each row's augmented prompt and its longer answer, as far as truncation leaves it, `(len(dataset),)`."""
    table = dataset.select_columns([*TOKENS, "augmented_prompt_ids"]).with_format("arrow")[:]
    prompt, chosen, rejected, augmented = (pc.list_value_length(column).to_numpy() for column in table.columns)
    answer = np.maximum(chosen, rejected)
    if args.max_length is not None:
        answer = np.minimum(answer, args.max_length - (prompt if args.truncation_mode == "keep_start" else 0))
    return augmented + answer


@dataclass
class DataCollatorForSelfRefinement(DataCollatorForPreference):
    """
    [`~trl.trainer.dpo_trainer.DataCollatorForPreference`] that adds the augmented prompts and their completions. For B pairs:

    - `augmented_prefix_ids` (`torch.Tensor` of shape `(1, L)`): the common beginning of all prompts p ⊕ x, with p in it if
      the chat template puts p first,
    - `augmented_prompt_ids`, `augmented_prompt_mask` (`torch.Tensor` of shape `(B, P)`): the rest of the prompts, padded on the left,
    - `completion_ids`, `completion_attention_mask` (`torch.Tensor` of shape `(2B, R)`): the completions alone, padded on
      the right, exactly the tokens that truncation left in `input_ids`. p ⊕ x and a completion together may therefore
      exceed `max_length` by the length of the refinement prompt.

    Precomputed log-probabilities of the augmented pairs are collated like those of the plain ones.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        prompts = [torch.tensor(example["augmented_prompt_ids"]) for example in examples]
        # A single pair shares its prompt anyhow; and each prompt keeps its last token
        shared = len(os.path.commonprefix([p[:-1].tolist() for p in prompts])) if len(prompts) > 1 else 0
        completions = [
            ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]

        def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
            ids = pad(rows, self.pad_token_id, side, self.pad_to_multiple_of)
            return ids, pad([torch.ones_like(row) for row in rows], 0, side, self.pad_to_multiple_of)

        batch["augmented_prefix_ids"] = prompts[0][:shared].unsqueeze(0)
        batch["augmented_prompt_ids"], batch["augmented_prompt_mask"] = padded([p[shared:] for p in prompts], "left")
        batch["completion_ids"], batch["completion_attention_mask"] = padded(completions, "right")
        for name in REF_AUGMENTED_LOGPS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class SelfRefineDPOTrainer(TokenLevelTrainer):
    """
    Trainer for quality-aware self-refined DPO and IPO (Sr-DPO, Sr-IPO, https://huggingface.co/papers/2405.21040).

    The only change w.r.t. [`~trl.DPOTrainer`] is that the margin of each pair is lowered by `λ Δ` before TRL's loss sees it. Δ (Eq. 12)
    is DPO's own margin, without gradient, under a prompt that asks for the best answer. Arguments, datasets, PEFT and the
    reference model are [`~trl.DPOTrainer`]'s; `args` may be a plain [`~trl.DPOConfig`], which takes the defaults of
    [`SelfRefineDPOConfig`].

    Logged in addition to DPOTrainer's metrics: `refinement/margin` and `refinement/margin_std` (Δ), `refinement/share`
    (`λ mean|Δ| / mean|u|`, with u DPO's margin), `refinement/accuracies` (share of pairs with Δ > 0: the paper's accuracy on
    prompt-augmented pairs) and `refinement/marginal` (the paper's average marginal, `logratio(y_w|x) − logratio(y_l|x)`, in
    nats).

    Raises:
        `ValueError`: an option without a meaning here (`ld_alpha`, `f_divergence_type`, `label_smoothing` without a loss that reads it,
        `loss_type="sft"` alone, `variant` with `use_weighting` or prompt-learning PEFT), or a model for which
        `share_prompt` is not exact, raised before any model is loaded; or a vision dataset.

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

    _tag_names = ["trl", "trl-ext", "dpo", "self-refine-dpo"]
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

    config_class = SelfRefineDPOConfig
    takes_rendered = False
    _precomputes_augmented = False
    _own_columns = (*TokenLevelTrainer._own_columns, "augmented_prompt_ids", *REF_AUGMENTED_LOGPS)
    _own_inputs = (*TokenLevelTrainer._own_inputs, *AUGMENTED_TENSORS, *REF_AUGMENTED_LOGPS)

    def __init__(self, *pos, **kwargs):
        super().__init__(*pos, **kwargs)
        if self._is_vision_dataset:
            raise ValueError(
                "SelfRefineDPOTrainer does not support vision datasets: TRL renders their prompts batch by batch, after "
                "the refinement prompt would be added. Use `trl.DPOTrainer`."
            )

    def _take_options(self, args, learns_prompt):
        super()._take_options(args, learns_prompt)
        config = self._config(args)
        self.refinement_weight = config.refinement_weight
        self.refinement_prompt = config.refinement_prompt
        self.refinement_prompt_role = config.refinement_prompt_role
        self.ipo_length_normalization = config.ipo_length_normalization
        self._learns_prompt = learns_prompt
        # λ = 0 is DPOTrainer to the last bit; WPO's weights come from TRL's head
        self._own_head = self.refinement_weight > 0 and not learns_prompt and not args.use_weighting

    @classmethod
    def refuse_options(cls, args):
        super().refuse_options(args)
        if args.use_weighting and cls._config(args).variant is not None:
            raise ValueError(
                f"`use_weighting=True` is not supported by {cls.__name__} with `variant`, whose head has no such weights. "
                "Leave one of them out."
            )

    def _prepare(self):
        if type(self.data_collator) is DataCollatorForPreference:  # TRL's default; a user's collator stays
            self.data_collator = DataCollatorForSelfRefinement(**vars(self.data_collator))
        super()._prepare()

    @property
    def _caches_prompts(self) -> bool:
        """Whether chosen and rejected can continue the key-value cache of their augmented prompt."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if is_peft_model(model) else model
        return not self._learns_prompt and takes_cached_prompts(model)

    # Data: each row gets the token ids of its augmented prompt

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        def tokenize_augmented_prompt(example, processing_class, refinement_prompt, role):
            prompt = augment_prompt(example["prompt"], refinement_prompt, role)
            completions = [example["chosen"], example["rejected"]]
            template_kwargs, generation = {}, {}
            if is_conversational(example):  # rendered as DPOTrainer renders it
                tools = example.get("tools")
                tools = json.loads(tools) if isinstance(tools, str) else tools
                template_kwargs = {"tools": tools, **example.get("chat_template_kwargs", {})}
                generation = {"add_generation_prompt": True}
            ids = _tokenize(processing_class, prompt, **generation, **template_kwargs)["input_ids"]
            # If the template renders the prompt alone otherwise than before a completion, DPOTrainer leaves the end of
            # the prompt out of the sequence, and so does this
            whole = [_tokenize(processing_class, prompt + c, **template_kwargs)["input_ids"] for c in completions]
            return {"augmented_prompt_ids": ids[: min(common_prefix_length(ids, w) for w in whole)]}

        map_kwargs = {}
        if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Augmenting {dataset_name} prompts"}
        fn_kwargs = {
            "processing_class": processing_class,
            "refinement_prompt": self.refinement_prompt,
            "role": self.refinement_prompt_role,
        }
        with global_then_local_main_first():
            dataset = dataset.map(tokenize_augmented_prompt, fn_kwargs=fn_kwargs, **map_kwargs)
        if isinstance(dataset, Dataset) and self._positions is not None:
            longest = augmented_lengths(dataset, args)
            if rows := int((longest > self._positions).sum()):
                logger.warning(
                    f"{rows} of {len(dataset)} rows of the {dataset_name} dataset have up to {longest.max()} tokens with `refinement_prompt`, and the "
                    f"model has {self._positions} positions. Lower `max_length`, which limits them without it, or the rows cannot be computed."
                )
        return dataset

    # Precomputed references: a second pass, over the augmented prompts

    def _precompute_ref_logps(self, dataset, name, batch_size):
        plain = super()._precompute_ref_logps(dataset, name, batch_size)
        model_hash = self._precompute_model_hash
        self._precomputes_augmented, self._precompute_model_hash = True, f"{model_hash}-augmented"
        try:
            # With a `variant` too, log-probabilities are enough here
            augmented = super(TokenLevelTrainer, self)._precompute_ref_logps(dataset, f"augmented {name}", batch_size)
        finally:
            self._precomputes_augmented, self._precompute_model_hash = False, model_hash
        columns = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), REF_AUGMENTED_LOGPS, strict=True))
        return concatenate_datasets([plain, augmented.select_columns(list(columns)).rename_columns(columns)], axis=1)

    def compute_ref_log_probs(self, model, inputs):
        if not self._precomputes_augmented:
            return super().compute_ref_log_probs(model, inputs)
        return self._with_reference(inputs, lambda **_: self._augmented_logps(model, inputs))

    # Loss

    def _reference_forward(self, inputs):
        if missing := set(AUGMENTED_TENSORS) - inputs.keys():
            raise ValueError(
                f"The batch has no {', '.join(sorted(missing))}. A custom `data_collator` must collate `augmented_prompt_ids` too; derive "
                "it from `trl_ext.trainers.self_refine_dpo_trainer.DataCollatorForSelfRefinement`."
            )
        if self.precompute_ref_logps:
            self._augmented_ref_logps = torch.stack([inputs[name] for name in REF_AUGMENTED_LOGPS])
        else:
            model = self.ref_model or self.model
            self._augmented_ref_logps = torch.stack(
                self._with_reference(inputs, lambda **_: self._augmented_logps(model, inputs))
            )
        return super()._reference_forward(inputs)

    def _policy_forward(self, model, inputs, reference, kwargs):
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            logps = torch.stack(self._augmented_logps(model, inputs))
        # Log-ratios of chosen and rejected given p ⊕ x, (2, B), without gradient (Eq. 12)
        self._augmented_logratios = logps - self._augmented_ref_logps
        return super()._policy_forward(model, inputs, reference, kwargs)

    def _augmented_logps(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of chosen and rejected given `p ⊕ x`, each `(B,)`."""
        prefix_ids, prompt_ids, prompt_mask, ids, mask = (inputs[name] for name in AUGMENTED_TENSORS)
        labels = ids.masked_fill(mask == 0, -100)
        # FlashAttention cannot put two answers behind one prompt
        packs = self._packs and not is_flash_attention_requested(self.model.config)
        if self._caches_prompts and not packs:
            prompts = CachedPrompts(prefix_ids, prompt_ids, prompt_mask)
            batch = {"input_ids": ids, "attention_mask": mask, "cached_prompts": prompts, "completion_log_probs": True}
        else:
            prefix_ids = prefix_ids.expand(prompt_ids.size(0), -1)
            prompt_ids = torch.cat([prefix_ids, prompt_ids], dim=1).repeat(2, 1)  # (2B, L + P)
            prompt_mask = torch.cat([torch.ones_like(prefix_ids), prompt_mask], dim=1).repeat(2, 1)
            ids = torch.cat([prompt_ids, ids], dim=1)  # (2B, L + P + R)
            labels = torch.cat([torch.full_like(prompt_ids, -100), labels], dim=1)
            mask = torch.cat([prompt_mask, mask], dim=1)
            # All padding to the right, as in the plain sequences
            order = mask.argsort(dim=1, descending=True, stable=True)
            ids, mask, labels = (x.gather(1, order) for x in (ids, mask, labels))
            batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            if packs:
                batch = {**self._model_kwargs(batch, share_prompt=True), "completion_log_probs": True}
            else:
                batch["fused_lm_head"] = True
        return model(**batch, labels=labels).log_probs.sum(dim=1).chunk(2, dim=0)

    def _terms(self):
        return [
            dataclasses.replace(term, of_sums=term.loss_type == "ipo" and not self.ipo_length_normalization)
            for term in super()._terms()
        ]

    def logratio_shifts(self, pairs, term):
        chosen, rejected = super().logratio_shifts(pairs, term)
        takes_means = term.loss_type in ("ipo", "sigmoid_norm") and not term.of_sums
        chosen_refinement, rejected_refinement = self_refine_shifts(
            *self._augmented_logratios,
            beta=self.beta,
            refinement_weight=self.refinement_weight,
            loss_type=term.loss_type,
            lengths=pairs.lengths if takes_means else None,
        )
        return chosen + chosen_refinement, rejected + rejected_refinement

    def pair_metrics(self, pairs):
        augmented_chosen, augmented_rejected = self._augmented_logratios
        chosen, rejected = pairs.logratios
        return {
            **super().pair_metrics(pairs),
            "refinement/margin": self.beta * (augmented_chosen - augmented_rejected),
            "refinement/accuracies": (augmented_chosen > augmented_rejected).float(),
            "refinement/marginal": chosen - rejected,
        }

    def _record_metrics(self, pairs):
        super()._record_metrics(pairs)
        metrics = self.pair_metrics(pairs)
        deltas = self.accelerator.gather(metrics["refinement/margin"])
        marginals = self.accelerator.gather(metrics["refinement/marginal"])
        shift, margin = (x.abs().mean().item() for x in (self.refinement_weight * deltas, self.beta * marginals))
        self._record("refinement/margin_std", deltas.std(correction=0).item())
        self._record("refinement/share", shift / margin if margin > 0 else 0.0)
