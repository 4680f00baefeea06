"""
Packs all pairs of a batch into one sequence without padding; with `share_prompt`, common beginnings are computed once.

In: a collated batch, `[chosen, rejected]` along the first dimension. Out: one sequence of its tokens, an attention mask,
and the place of each token of the batch. With `share_prompt`, the tokens are `[prefix | prompt chosen rejected | prompt chosen
rejected | ...]`: both answers follow one prompt, and all prompts follow the common beginning of all rows. This is exact as long as only
attention carries information from token to token; [`why_not_packed`] refuses other models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested
from trl import DPOConfig


# Architectures for which the tests compare packed with unpacked sequences
EXACT_MODEL_TYPES = {
    *("cohere", "cohere2", "gemma", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "ministral"),
    *("mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "smollm3", "stablelm", "starcoder2"),
}
PACKED_SDPA = "packed_sdpa"  # name of the SDPA that computes packed sequences run by run
ATTENTION = (PACKED_SDPA, "sdpa", "eager", "flex_attention")  # implementations with arbitrary masks
# Shortest common beginning of all rows that is computed once: behind it, every run needs a mask
LEAST_PREFIX = 16


class RunMask(torch.Tensor):
    """
    The attention mask of a packed sequence, instead of one of shape `(1, 1, S, S)`: integers of shape `(1, 1, N, 4)` on the CPU. Each
    row is a run of tokens, in order: its length, the number of tokens it sees at the sequence's start (the prefix), the number it sees at
    the start of the run before (the prompt), and the sliding window, `0` for none. Each token also sees the earlier tokens of its run.
    """

    padded: tuple[torch.Tensor, ...] | None = None  # on a GPU, what all layers of its kind share


def attention_by_runs(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    transformers' SDPA that also takes a [`RunMask`]: one product per run, with only the keys that the run sees.

    Returns:
        `tuple[torch.Tensor, None]`: the attention's output, `(1, S, heads, head size)`.
    """
    if not isinstance(attention_mask, RunMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.is_cuda:
        return attention_by_padded_runs(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True  # for runs without a mask
    runs = attention_mask[0, 0].tolist()
    queries, keys, values = (x.split([length for length, *_ in runs], dim=2) for x in (query, key, value))
    longest_prefix = max(prefix for _, prefix, _, _ in runs)
    first = [x[0][:, :, :longest_prefix] for x in (keys, values)]
    outputs = []
    for i, (length, prefix, prompt, window) in enumerate(runs):
        if length == 0:
            continue
        seen, mask = [keys[i], values[i]], None
        if prefix + prompt > 0:
            before = [x[i - 1][:, :, :prompt] for x in (keys, values)]
            seen = [torch.cat([x[:, :, :prefix], y, z], dim=2) for x, y, z in zip(first, before, seen, strict=True)]
        width = prefix + prompt + length
        if width > length or 0 < window < width:
            mask = torch.ones(length, width, dtype=torch.bool, device=query.device).tril_(width - length)
            if window > 0:
                mask = mask.triu_(width - length - window + 1)
        output, _ = sdpa_attention_forward(module, queries[i], *seen, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def attention_by_padded_runs(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RunMask,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    [`attention_by_runs`] with one product of all runs, padded: for a GPU, which would wait for the launches of one product per run.
    Everything but attention is computed without padding all the same.
    """
    if attention_mask.padded is None:
        attention_mask.padded = padded_runs(attention_mask, query.device)
    queries_of, keys_of, visible, places = attention_mask.padded
    states = [x[0][:, of].transpose(0, 1) for x, of in ((query, queries_of), (key, keys_of), (value, keys_of))]
    output, _ = sdpa_attention_forward(module, *states, visible, **kwargs)  # (R, L, heads, head size)
    return output.flatten(0, 1)[places][None], None


def padded_runs(runs: RunMask, device: torch.device) -> tuple[torch.Tensor, ...]:
    """
    The R runs that are not empty, padded to L queries and K keys each.

    Returns:
        `tuple[torch.Tensor, ...]`: the places of the queries in the sequence, `(R, L)`, and of the keys, `(R, K)`; the mask, `(R, 1, L, K)`;
        and the place of each token of the sequence among the R · L queries, `(S,)`.
    """
    table = runs[0, 0].as_subclass(torch.Tensor)
    starts = table[:, 0].cumsum(0) - table[:, 0]
    columns = torch.stack([*table.T, starts, starts.roll(1)])[:, table[:, 0] > 0, None]
    length, prefix, prompt, window, start, start_before = columns  # (R, 1) each
    seen = prefix + prompt
    query, key = torch.arange(int(length.max())), torch.arange(int((seen + length).max()))
    queries_of = (start + query).where(query < length, 0)
    keys_of = torch.where(key < prefix, key, torch.where(key < seen, start_before + key - prefix, start + key - seen))
    keys_of = keys_of.where(key < seen + length, 0)
    distance = (seen + query)[:, :, None] - key  # (R, L, K): how far the key is behind the query
    visible = (distance >= 0) & ((window == 0)[:, :, None] | (distance < window[:, :, None]))
    visible |= (query >= length)[:, :, None]  # padding sees anything: a row without a key would be NaN
    places = (query < length).flatten().nonzero()[:, 0]
    return tuple(x.to(device) for x in (queries_of, keys_of, visible[:, None], places))


AttentionInterface.register(PACKED_SDPA, attention_by_runs)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def take_packed_pairs(model: PreTrainedModel) -> None:
    """Let a model with SDPA compute packed sequences run by run. Other sequences, and models with other attention, are unaffected."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED_SDPA)


@dataclass
class PackedPairs:
    """
    B pairs in one sequence of S tokens. Deliberately not a `dict` of `input_ids`, which accelerate and PEFT would look into.
    """

    input_ids: torch.Tensor  # (1, S)
    position_ids: torch.Tensor  # (1, S), columns in the batch
    places: torch.Tensor  # (2B, W), indices of the batch's tokens in the sequence; arbitrary for padding
    prefix: int  # number of tokens at the start that all pairs share
    lengths: list[tuple[int, int, int]]  # per pair: prompt without prefix, chosen, rejected
    padding: int  # number of padding tokens at the end

    @classmethod
    def from_batch(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        share_prompt: bool,
        pad_to_multiple_of: int | None = None,
    ) -> "PackedPairs":
        """
        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(2B, W)`):
                The batch, padded on either side.
            share_prompt (`bool`):
                Whether the common beginning of a pair's sequences, and that of all pairs, is computed once.
            pad_to_multiple_of (`int`, *optional*):
                Pad S to a multiple of this value.
        """
        (pairs, width), mask = (input_ids.size(0) // 2, input_ids.size(1)), attention_mask.bool()
        shared, prefix = torch.zeros_like(mask[:pairs]), torch.zeros_like(mask[0])
        if share_prompt:
            (chosen, rejected), (chosen_mask, rejected_mask) = input_ids.chunk(2), mask.chunk(2)
            same = (chosen == rejected) & (chosen_mask == rejected_mask)
            shared = same.cumprod(dim=1).bool()  # (B, W): columns before the first difference
            same = ((input_ids == input_ids[0]) & (mask == mask[0])).all(dim=0)
            prefix = same.cumprod(dim=0).bool()  # (W,)
            prefix = prefix & ((prefix & mask[0]).sum() >= LEAST_PREFIX) & (pairs > 1)
        own = mask & ~torch.cat([prefix.expand(pairs, -1), shared])  # (2B, W): tokens to compute besides the prefix
        own[0] = mask[0]
        # Pair by pair, (B, 2W)
        tokens, ids, columns = (
            torch.cat(x.chunk(2), dim=1)
            for x in (own, input_ids, torch.arange(width, device=mask.device).expand_as(input_ids))
        )
        places = (tokens.flatten().cumsum(0) - 1).clamp(min=0).view(pairs, 2 * width)
        places = torch.cat(places.split(width, dim=1))  # (2B, W)
        places = torch.where(torch.cat([torch.zeros_like(shared), shared]), places[:pairs].repeat(2, 1), places)
        places = torch.where(prefix, places[0], places)
        of_prompts, of_answers = mask[:pairs] & shared & ~prefix, mask & ~(shared | prefix).repeat(2, 1)
        lengths = torch.stack([of_prompts.sum(dim=1), *of_answers.sum(dim=1).chunk(2)], dim=1)  # (B, 3)
        prefix_length, *flat = torch.cat([(prefix & mask[0]).sum()[None], lengths.flatten()]).tolist()
        total, multiple = prefix_length + sum(flat), pad_to_multiple_of or 1
        padding = -total % multiple
        return cls(
            input_ids=nn.functional.pad(ids[tokens], (0, padding))[None],
            position_ids=nn.functional.pad(columns[tokens], (0, padding))[None],
            places=places,
            prefix=prefix_length,
            lengths=list(zip(*[iter(flat)] * 3, strict=True)),
            padding=padding,
        )

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """
        The sequence as runs of tokens with causal attention: the length of each, and the number of tokens that it sees at the sequence's
        start and at the start of the run before.
        """
        first = self.prefix  # the first pair's prompt follows the prefix
        for prompt, chosen, rejected in self.lengths:
            yield first + prompt + chosen, self.prefix - first, 0
            yield rejected, self.prefix - first, first + prompt
            first = 0
        yield self.padding, 0, 0

    def model_inputs(self, backbone: PreTrainedModel) -> dict:
        """The inputs of the model without its head, with the mask in the form of its attention implementation."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if is_flash_attention_requested(backbone.config):
            lengths = [length for length, *_ in self.runs() if length > 0]
            ends = torch.tensor([0, *lengths], device=self.input_ids.device).cumsum(0, dtype=torch.int32)
            both = {"cu_seq_lens": ends, "max_length": max(lengths)}
            return {**inputs, "attention_mask": None, **{f"{k}_{of}": v for k, v in both.items() for of in "qk"}}
        config = backbone.config.get_text_config()
        is_sliding = DynamicCache(config=config).is_sliding
        masks = {kind: self._mask(backbone, config.sliding_window if kind else None) for kind in set(is_sliding)}
        if len(masks) == 1:
            return {**inputs, "attention_mask": masks.popitem()[1]}
        return {**inputs, "attention_mask": {"full_attention": masks[False], "sliding_attention": masks[True]}}

    def _mask(self, backbone: PreTrainedModel, window: int | None) -> torch.Tensor:
        if backbone.config._attn_implementation == PACKED_SDPA:
            return torch.tensor([[[[*run, window or 0] for run in self.runs()]]]).as_subclass(RunMask)
        device, positions = self.input_ids.device, self.position_ids[0]
        # The prefix has number 0, and each pair's parts have three numbers
        lengths = torch.tensor(
            [self.prefix, *(part for pair in self.lengths for part in pair), self.padding], device=device
        )
        parts = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # (S,)
        prompts = (parts - 1) // 3 * 3 + 1  # (S,): number of each token's prompt

        def visible(batch, head, query, key):
            seen = (parts[key] == parts[query]) | (parts[key] == prompts[query]) | (parts[key] == 0)
            return seen if window is None else seen & (positions[query] - positions[key] < window)

        return create_causal_mask(
            config=backbone.config,
            # Only its shape, type and device are used
            inputs_embeds=torch.empty(*self.input_ids.shape, 0, dtype=backbone.dtype, device=device),
            attention_mask=None,
            past_key_values=None,
            and_mask_function=visible,
        )

    def take(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Select the states of some tokens of the batch.

        Args:
            states (`torch.Tensor` of shape `(1, S, ...)`):
                States of the packed sequence.
            mask (`torch.Tensor` of shape `(2B, T)`):
                True for the N tokens, in the batch's first T columns.

        Returns:
            `torch.Tensor` of shape `(N, ...)`: what `states_of_the_batch[:, :T][mask]` would be.
        """
        return states[0, self.places[:, : mask.size(1)].to(mask.device)[mask]]

    def take_router_logits(
        self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The logits of the experts' routers, `(S, E)` for each layer, as `(N, E)` for the batch's N tokens."""
        mask = attention_mask.bool()
        return tuple(self.take(logits[None], mask.to(logits.device)) for logits in router_logits)


def has_virtual_tokens(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> bool:
    """Whether prompt-learning PEFT, of a loaded model or a new adapter, puts virtual tokens before each sequence."""
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else [peft_config]
    return any(isinstance(adapter, PromptLearningConfig) for adapter in adapters)


def why_not_packed(
    model: str | PreTrainedModel | PeftModel,
    args: DPOConfig,
    peft_config: PeftConfig | None = None,
    *,
    share_prompt: bool = False,
) -> str | None:
    """
    Why a model's pairs cannot be packed into one sequence, and what to change; `None` if they can.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The trainers' argument; only the configuration is read from a path.
        args ([`~trl.DPOConfig`]):
            `model_init_kwargs` and `trust_remote_code` are used for a path.
        peft_config ([`~peft.PeftConfig`], *optional*):
            An adapter that the model will get.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether both answers of a pair follow one prompt.
    """
    if has_virtual_tokens(model, peft_config):
        return "prompt-learning PEFT (prompt, prefix or p-tuning) puts virtual tokens before each sequence. Use LoRA."
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
        return f"this {name} has custom modelling code, whose positions and masks are unknown."
    cache = DynamicCache(config=config.get_text_config())
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return f"{name} has recurrent, convolutional or linear-attention layers, which would carry one answer into the next."
    if name not in EXACT_MODEL_TYPES:
        return f"it is not known to be exact for {name}, only for {', '.join(sorted(EXACT_MODEL_TYPES))}."
    if attention in (None, *ATTENTION):  # None: a path, for which transformers chooses SDPA
        return None
    if not is_flash_attention_requested(requested_attention_implementation=attention):
        return f"`attn_implementation={attention!r}` is not known to keep packed sequences apart. Load the model with 'sdpa' or 'flex_attention'."
    if share_prompt:
        return (
            f"`attn_implementation={attention!r}` cannot put two answers behind one prompt. Load the model with 'sdpa' or "
            "'flex_attention', or set `padding_free` alone."
        )
    return None
