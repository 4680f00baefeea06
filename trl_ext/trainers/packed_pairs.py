"""
Chosen and rejected of a pair in one sequence, so that what they begin with, their prompt, is computed once.

In: a collated batch, `[chosen, rejected]` along the first dimension. Out: B sequences `[shared | chosen | rejected]`, P + 2R tokens
in the place of 2 (P + R), in which the two answers see what they share and themselves, and where to find each token of the
batch again. Exact, as long as nothing but attention passes from one token to the next: [`why_not_packed`] says where it is not.
"""

from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_causal_mask
from trl import DPOConfig


# Architectures whose packed sequences the tests compare with the sequences themselves
EXACT_MODEL_TYPES = {
    *("cohere", "gemma", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2"),
    *("olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
}
ATTENTION = ("sdpa", "eager", "flex_attention")  # those that take any mask
SHARED, CHOSEN, REJECTED, PADDING = range(4)  # the parts of a packed sequence


@dataclass
class PackedPairs:
    """
    B pairs, each in one sequence of S tokens, padded on the right. Deliberately not a `dict` of `input_ids`: accelerate and PEFT
    would look into it.
    """

    input_ids: torch.Tensor  # (B, S)
    position_ids: torch.Tensor  # (B, S), the columns of the batch: those of rejected start again after what is shared
    parts: torch.Tensor  # (B, S)
    places: torch.Tensor  # (2B, W), where the tokens of the batch are in their pair's sequence; for padding anywhere

    @classmethod
    def from_batch(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, pad_to_multiple_of: int | None = None
    ) -> "PackedPairs":
        """
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(2B, W)`):
                The batch, padded on either side.
            pad_to_multiple_of (`int`, *optional*):
                Of which S is to be a multiple.
        """
        width, multiple = input_ids.size(1), pad_to_multiple_of or 1
        (chosen, rejected), masks = input_ids.chunk(2), attention_mask.bool()
        chosen_mask, rejected_mask = masks.chunk(2)
        same = (chosen == rejected) & (chosen_mask == rejected_mask)
        shared = same.cumprod(dim=1).bool()  # (B, W): the columns before the first difference
        tokens = torch.cat([chosen_mask, rejected_mask & ~shared], dim=1)  # (B, 2W): of both rows, those to compute
        length = int(tokens.sum(dim=1).max())
        length = -(-length // multiple) * multiple
        order = tokens.argsort(dim=1, descending=True, stable=True)[:, :length]  # (B, S)
        parts = torch.cat([torch.where(shared, SHARED, CHOSEN), torch.full_like(chosen, REJECTED)], dim=1)
        parts = parts.masked_fill(~tokens, PADDING)
        places = (tokens.cumsum(dim=1) - 1).clamp(min=0)  # (B, 2W)
        chosen_places, rejected_places = places.split(width, dim=1)
        return cls(
            input_ids=torch.cat([chosen, rejected], dim=1).gather(1, order),
            position_ids=order % width,
            parts=parts.gather(1, order),
            places=torch.cat([chosen_places, torch.where(shared, chosen_places, rejected_places)]),
        )

    def model_inputs(self, backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
        """What the model without its head takes, the mask in the form that its attention takes."""
        parts = self.parts

        def visible(batch, head, query, key):
            return (parts[batch, key] == SHARED) | (parts[batch, key] == parts[batch, query])

        mask = create_causal_mask(
            config=backbone.config,
            # Of which only the shape, the type and the device are looked at
            inputs_embeds=torch.empty(*parts.shape, 0, dtype=backbone.dtype, device=parts.device),
            attention_mask=None,
            past_key_values=None,
            and_mask_function=visible,
        )
        return {
            "input_ids": self.input_ids,
            "attention_mask": mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }

    def take(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        The states of some tokens of the batch.

        Args:
            states (`torch.Tensor` of shape `(B, S, ...)`):
                Of the packed sequences.
            mask (`torch.Tensor` of shape `(2B, T)`):
                Set for the N tokens, in the batch's first T columns.

        Returns:
            `torch.Tensor` of shape `(N, ...)`: as `states_of_the_batch[:, :T][mask]`.
        """
        row, column = mask.nonzero(as_tuple=True)
        return states[row % states.size(0), self.places.to(row.device)[row, column]]

    def take_router_logits(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Those of the experts' routers, `(B · S, E)` for each layer, as `(N, E)` of the batch's N tokens."""
        mask = attention_mask.bool()
        return tuple(self.take(logits.view(*self.parts.shape, -1), mask.to(logits.device)) for logits in router_logits)


def why_not_packed(
    model: str | PreTrainedModel | PeftModel, args: DPOConfig, peft_config: PeftConfig | None = None
) -> str | None:
    """
    The reason why a model's answers cannot stand beside each other in one sequence, and the way out; `None` where they can.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As the trainers take it; of a path, only the configuration is read.
        args ([`~trl.DPOConfig`]):
            For a path: `model_init_kwargs` and `trust_remote_code`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Of an adapter that the model is going to have.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else [peft_config]
    if any(isinstance(adapter, PromptLearningConfig) for adapter in adapters):
        return (
            "prompt-learning PEFT (prompt, prefix or p-tuning) puts tokens of its own before each sequence. Use LoRA."
        )
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        config = AutoConfig.from_pretrained(model, **options)
        is_transformers_own = not (options["trust_remote_code"] and "auto_map" in vars(config))
    else:
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        config = model.config
        is_transformers_own = type(model.base_model).__module__.startswith("transformers.models.")
    name, attention = config.model_type, config._attn_implementation
    if not is_transformers_own:
        return f"this {name} has modelling code of its own, whose positions and masks are not known."
    cache = DynamicCache(config=config.get_text_config())
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return (
            f"{name} has recurrent, convolutional or linear-attention layers, which would carry chosen into rejected."
        )
    if any(cache.is_sliding):
        return (
            f"this {name} attends in sliding windows or chunks, and between rejected and its prompt stands chosen. Where the "
            'window is longer than your sequences, switch it off with `model_init_kwargs={"sliding_window": None}`.'
        )
    if name not in EXACT_MODEL_TYPES:
        return f"it is not known to be exact for {name}, only for {', '.join(sorted(EXACT_MODEL_TYPES))}."
    if attention not in (None, *ATTENTION):  # None: a path, and transformers takes SDPA
        return (
            f"`attn_implementation={attention!r}` takes no other mask than a causal one. Load the model with "
            f"{' or '.join(map(repr, ATTENTION))}."
        )
    return None
