"""
Adds forward flags to a causal LM that compute the position KL, as TRL's `add_fused_lm_head` adds one for log-probabilities.

The reference is called with `completion_states=True` and returns its hidden states at the completion positions and
its head; the policy is called with `reference=` those states and returns per-token results. Both
run inside the model's own forward, where PEFT has the right adapter active and DDP, FSDP2 and ZeRO-3 see the use of the
head.
"""

import functools
import inspect
import types
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from ..kernels.position_kl import log_probs, position_kl
from .packed_pairs import PackedPairs
from .upstream import gathered_parameter


@dataclass
class CompletionStates:
    """
    A model's hidden states at the N completion positions of a batch, and its LM head. Deliberately not a
    `ModelOutput`: accelerate would convert the head to fp32 on the way out of the forward.
    """

    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


@dataclass
class PositionKLOutput(FusedCausalLMOutput):
    """
    [`~trl.trainer.utils.FusedCausalLMOutput`] with more per-token fields of shape `(2B, T)`, zero outside the completions.

    `log_probs` has the value of the log-probability and the gradient of `log π + κ KL`; `position_kl` and `ref_log_probs`
    have none. `sft_log_probs`, of the chosen completions only, has the log-probability's own.
    """

    ref_log_probs: torch.Tensor | None = None
    position_kl: torch.Tensor | None = None
    sft_log_probs: torch.Tensor | None = None


@dataclass
class CachedPrompts:
    """B prompts in two parts. Deliberately not a `dict` of `input_ids`, which accelerate and PEFT would look into."""

    prefix_ids: torch.Tensor  # (1, L), the common beginning of all prompts; L may be 0
    input_ids: torch.Tensor  # (B, P), the rest of each prompt, padded on the left; P is at least 1
    attention_mask: torch.Tensor  # (B, P)


def takes_cached_prompts(model: PreTrainedModel) -> bool:
    """Whether [`states_after_cached_prompts`] is exact for a model: it takes positions, and caches only keys and values."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return (
        "position_ids" in inspect.signature(type(model.base_model).forward).parameters
        and not model._is_stateful
        and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    )


def states_after_cached_prompts(
    backbone: PreTrainedModel, prompts: CachedPrompts, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Compute the states that predict 2B completions of B prompts, with each prompt computed once, and the common beginning of all
    prompts once: L + B (P + 2R) positions instead of 2B (L + P + R). For models with a key-value cache, without gradients.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            The model without its LM head.
        prompts ([`CachedPrompts`]):
            The prompts.
        input_ids, attention_mask (`torch.Tensor` of shape `(2B, R)`):
            The completions, chosen and then rejected, padded on the right.

    Returns:
        `torch.Tensor` of shape `(2B, R, H)`: state t predicts token t of the completion.
    """
    prefix_ids, prompt_ids, mask = prompts.prefix_ids, prompts.input_ids, prompts.attention_mask
    pairs, length, device = prompt_ids.size(0), prefix_ids.size(1), prompt_ids.device
    mask = torch.cat([mask.new_ones(pairs, length), mask], dim=1)  # (B, L + P)
    cache = None
    config = backbone.config.get_text_config()
    if (
        any(DynamicCache(config=config).is_sliding) or config.model_type == "gpt_neo"
    ):  # its cache does not know its windows
        # A window counts the padding between two parts, so the prompts go in one, all padding to its left
        order = mask.argsort(dim=1, stable=True)
        prompt_ids = torch.cat([prefix_ids.expand(pairs, -1), prompt_ids], dim=1).gather(1, order)
        mask, length = mask.gather(1, order), 0
    elif length > 0:
        cache = backbone(input_ids=prefix_ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.zeros(pairs, dtype=torch.long, device=device))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs = backbone(
        input_ids=prompt_ids,
        attention_mask=mask,
        position_ids=positions[:, length:],
        past_key_values=cache,
        use_cache=True,
    )
    pair = torch.arange(pairs, device=device).repeat(2)  # (2B,): chosen, then rejected
    first = outputs.last_hidden_state[:, -1:][pair]  # (2B, 1, H)
    if input_ids.size(1) == 1:
        return first
    cache = outputs.past_key_values
    cache.batch_select_indices(pair)
    # The last token predicts nothing
    outputs = backbone(
        input_ids=input_ids[:, :-1],
        attention_mask=torch.cat([mask[pair], attention_mask[:, :-1]], dim=1),
        position_ids=positions[pair, -1:] + torch.arange(1, input_ids.size(1), device=device),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, outputs.last_hidden_state], dim=1)


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """
    The scale and soft cap that a text config applies to its logits, under the names that `add_fused_lm_head` knows.

    Returns:
        `tuple[float, float | None]`: the multiplier (`1.0` for none) and the soft cap (`None` for none).
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name), softcap
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        multiplies = config.model_type == "hyperclovax"
        return (config.logits_scaling if multiplies else 1 / config.logits_scaling), softcap
    return 1.0, softcap


def add_position_kl_head(model: PreTrainedModel) -> None:
    """
    Add three flags to `model.forward`. Without them the forward is unchanged.

    - `completion_states=True` returns [`CompletionStates`].
    - `reference=...`, such states of the reference, returns a [`PositionKLOutput`]. `kl_weight=(κ_chosen, κ_rejected)` is the
      weight of the KL in the gradient, for all pairs or, as a tensor `(2, B)`, for each, and `separate_sft=True` adds
      `sft_log_probs`.
    - `completion_log_probs=True` returns a [`~trl.trainer.utils.FusedCausalLMOutput`], as TRL's `fused_lm_head=True` does.
      With `cached_prompts=...`, [`CachedPrompts`], `input_ids` are the completions alone, `(2B, R)`, and each prompt is computed
      once for its two completions; no gradient.

    With `packed_pairs=...`, [`PackedPairs`] of the same batch, the model computes these; the outputs stay the same.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch. Of a PEFT model, patch the base model.
    """
    original_forward = model.forward
    text_config = model.config.get_text_config()
    logit_scale, softcap = logit_transform(text_config)
    transform = {"logit_scale": logit_scale, "softcap": softcap}

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        labels=None,
        completion_states=False,
        completion_log_probs=False,
        cached_prompts=None,
        packed_pairs: PackedPairs | None = None,
        reference=None,
        kl_weight=(0.0, 0.0),
        separate_sft=False,
        **kwargs,
    ):
        if not completion_states and not completion_log_probs and reference is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(*args, **kwargs)

        # The backbone and the head are looked up on each call, since FSDP and PEFT replace them after patching
        backbone = self.base_model
        if cached_prompts is not None:
            hidden = states_after_cached_prompts(
                backbone, cached_prompts, kwargs["input_ids"], kwargs["attention_mask"]
            )  # (2B, R, H)
        elif packed_pairs is not None:
            backbone_outputs = backbone(**{**kwargs, **packed_pairs.model_inputs(backbone)})
            hidden, labels = backbone_outputs.last_hidden_state, labels[:, 1:]  # (B, S, H), (2B, T)
        else:
            backbone_outputs = backbone(*args, **{**kwargs, "use_cache": False})
            hidden, labels = backbone_outputs.last_hidden_state[:, :-1], labels[:, 1:]  # (2B, T, H), (2B, T)
        head = self.get_output_embeddings()
        weight, bias = gathered_parameter(head.weight), gathered_parameter(head.bias)
        labels, hidden = labels.to(weight.device), hidden.to(weight.device)
        mask = labels != -100  # (2B, T)
        hidden = hidden[mask] if packed_pairs is None else packed_pairs.take(hidden, mask)  # (N, H)
        if completion_states:
            if isinstance(self, FSDPModule):  # frees the unsharded head when this forward ends
                weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
            return CompletionStates(hidden, weight, bias, logit_scale, softcap)

        if reference is None:
            per_token = log_probs(hidden, weight, bias, labels[mask], **transform)._asdict()
        else:
            per_row = torch.as_tensor(kl_weight, device=hidden.device).reshape(2, -1)
            per_row = per_row.expand(2, mask.size(0) // 2).flatten()  # (2B,)
            per_token = position_kl(
                hidden,
                weight,
                bias,
                reference.hidden,
                reference.weight,
                reference.bias,
                labels[mask],
                per_row.unsqueeze(1).expand_as(mask)[mask],
                **transform,
                ref_logit_scale=reference.logit_scale,
                ref_softcap=reference.softcap,
            )._asdict()
            # The value of the log-probability, the gradient of log-probability and weighted KL together
            weighted = per_token.pop("weighted")
            per_token["log_probs"] = weighted + (per_token["log_probs"] - weighted).detach()
        # `masked_scatter` keeps the output connected to the model even when no label is valid
        per_token = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in per_token.items()}  # (2B, T)
        if separate_sft:
            chosen = mask.clone()
            chosen[mask.size(0) // 2 :] = False
            sft = log_probs(hidden[chosen[mask]], weight, bias, labels[chosen], **transform).log_probs
            per_token["sft_log_probs"] = sft.new_zeros(mask.shape).masked_scatter(chosen, sft)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            router_logits, token_mask = backbone_outputs.router_logits, kwargs.get("attention_mask")
            if packed_pairs is not None:  # a shared token counts twice, as in the batch
                router_logits = packed_pairs.take_router_logits(router_logits, token_mask)
                token_mask = None
            # Mixtral's load-balancing loss is the one every MoE family pulls in through the modular system
            aux_loss = load_balancing_loss_func(
                router_logits, text_config.num_experts, text_config.num_experts_per_tok, token_mask
            )
        output_class = FusedCausalLMOutput if reference is None else PositionKLOutput
        return output_class(**per_token, label_mask=mask, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)
