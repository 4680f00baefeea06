"""
GPU memory of a stage, by arithmetic: [`Item`]s with their bytes and how they were computed. One device, nothing sharded.

Weights, gradients, optimizer states, adapters and the KV cache are exact. Activations are what autograd keeps of the model's layers,
counted on the meta device for sequences of full length, so they are an upper bound for shorter ones. `OVERHEAD` is our guess.
"""

from dataclasses import dataclass

from trl import DPOConfig, ModelConfig

from ..aries.config import GenerationConfig
from ..kernels.position_kl import KEPT_GRADIENT_BYTES, TILE_ELEMENTS
from ..trainers.token_level_config import TokenLevelConfig
from .checks import gigabytes
from .shape import BYTES, Shape


OVERHEAD = 10**9  # CUDA's context, workspaces and fragmentation; our guess
# `optim` -> (states per parameter, bytes of each or None for the parameter's own type). Others count as AdamW
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), (2, None)),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), (2, 1)),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), (2, 4)),
    **dict.fromkeys(("rmsprop", "adagrad"), (1, None)),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit", "lion_32bit", "paged_lion_32bit"), (1, 4)),
    **dict.fromkeys(("rmsprop_bnb_8bit", "lion_8bit", "paged_lion_8bit"), (1, 1)),
    "sgd": (0, None),
}


@dataclass
class Item:
    """One line of an estimate: its name, its bytes, and the arithmetic."""

    what: str
    bytes: int
    how: str


@dataclass
class Estimate:
    """The memory of one stage."""

    stage: str
    items: list[Item]

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)

    def lines(self) -> list[str]:
        return [f"{gigabytes(item.bytes):>10}  {item.what}: {item.how}" for item in self.items]


def training_memory(
    shape: Shape, model_args: ModelConfig, args: DPOConfig, dtype: str, has_ref_adapter: bool = False
) -> Estimate:
    """
    The largest step of preference training: every sequence has `max_length` tokens, and a forward no more than `max_batch_tokens`.

    Args:
        shape ([`~doctor.shape.Shape`]), model_args ([`~trl.ModelConfig`]), args ([`~trl.DPOConfig`]):
            The model and the recipe's settings.
        dtype (`str`):
            Data type of the weights, `"float32"`, `"bfloat16"` or `"float16"`.
        has_ref_adapter (`bool`, *optional*, defaults to `False`):
            Whether the reference is a second adapter, as in ARIES' rounds after the first.
    """
    items = [base_weights("policy", shape, model_args, dtype)]
    if model_args.use_peft:
        # TRL casts adapters on quantized bases to bfloat16; PEFT keeps others in float32
        size = 2 if model_args.load_in_4bit or model_args.load_in_8bit else 4
        trained, where = shape.lora, "LoRA"
        items.append(Item("adapter", size * trained, f"{trained:,} parameters × {size} B"))
        if has_ref_adapter:
            items.append(Item("reference", 4 * trained, f"a frozen adapter: {trained:,} parameters × 4 B"))
    else:
        size, trained, where = BYTES[dtype], shape.parameters, "all"
        if not args.precompute_ref_log_probs:
            items.append(base_weights("reference", shape, model_args, dtype))
        if dtype == "float32" and (args.bf16 or args.fp16):
            linear = sum(shape.linear)
            items.append(Item("autocast", 2 * linear, f"16-bit copies of {linear:,} weights of linear layers × 2 B"))
    items.append(Item("gradients", size * trained, f"{trained:,} parameters ({where}) × {size} B"))
    name = str(getattr(args.optim, "value", args.optim))
    states, each = OPTIMIZERS.get(name, (2, 4))
    as_adam = "" if name in OPTIMIZERS else ", counted as AdamW's"
    each = each or size
    how = f"{name}: {trained:,} parameters × {states} states × {each} B{as_adam}"
    items.append(Item("optimizer", trained * states * each, how))
    return Estimate("training", [*items, *step_memory(shape, model_args, args), overhead()])


def step_memory(shape: Shape, model_args: ModelConfig, args: DPOConfig) -> list[Item]:
    """Memory of a forward and backward pass: activations, hidden states of the answers, tiles of logits."""
    length = args.max_length or 1024
    tokens = 2 * args.per_device_train_batch_size * length
    size = 2 if args.bf16 or args.fp16 else 4
    shown = f"2 × {args.per_device_train_batch_size} × {length} tokens"
    most = args.max_batch_tokens if isinstance(args, TokenLevelConfig) else None
    if most is not None and most < tokens:
        tokens = max(most, 2 * length)  # one pair may have more
        shown = f"{tokens} tokens at a time"
    kept = shape.saved_bytes * size // 2
    if args.gradient_checkpointing:
        inputs = Item(
            "checkpoints",
            tokens * shape.hidden * shape.layers * size,
            f"{shown} × {shape.layers} layers × {shape.hidden} × {size} B",
        )
        layer = kept // shape.layers
        items = [inputs, Item("one layer", tokens * layer, f"{shown} × {layer:,} B that autograd keeps of a layer")]
    else:
        items = [
            Item("activations", tokens * kept, f"{shown} × {kept:,} B that autograd keeps of {shape.layers} layers")
        ]
    tile = 2 * 4 * min(TILE_ELEMENTS["cuda"], tokens * shape.vocabulary)
    items.append(Item("tiles", tile, f"logits of policy and reference × {tile // 8:,} elements × 4 B"))
    if not model_args.use_peft:
        gradient = min(KEPT_GRADIENT_BYTES, tokens * shape.vocabulary * size)
        items.append(Item("head", gradient, f"the head's gradient tiles, at most {gigabytes(KEPT_GRADIENT_BYTES)}"))
    return items


def base_weights(what: str, shape: Shape, model_args: ModelConfig, dtype: str) -> Item:
    """The weights of a model, quantized if the recipe says so."""
    linear = sum(shape.linear)
    rest = f"{shape.parameters - linear:,} parameters × {BYTES[dtype]} B ({dtype})"
    if model_args.load_in_4bit:
        nested = model_args.use_bnb_nested_quant
        scales = "scales in 8 bits" if nested else "a 4 B scale per 64"
        return Item(what, shape.nf4(dtype, nested), f"{linear:,} parameters × ½ B ({scales}) + {rest}")
    if model_args.load_in_8bit:
        return Item(what, shape.int8(dtype), f"{linear:,} parameters × 1 B + {rest}")
    return Item(what, shape.weights(dtype), f"{shape.parameters:,} parameters × {BYTES[dtype]} B ({dtype})")


def engine_memory(shape: Shape, generation: GenerationConfig, dtype: str, lora_rank: int | None) -> Estimate:
    """
    vLLM's minimum on one of `tensor_parallel_size` GPUs, with KV cache for one sequence of `max_model_len`. It takes more if it can, up
    to `gpu_memory_utilization`.
    """
    parts = generation.tensor_parallel_size
    split = "" if parts == 1 else f" / {parts} GPUs"
    if generation.quantization == "bitsandbytes":
        weights = Item("weights", shape.nf4(dtype, nested=False) // parts, f"NF4, the rest in {dtype}{split}")
    else:
        how = f"{shape.parameters:,} parameters × {BYTES[dtype]} B ({dtype}){split}"
        weights = Item("weights", shape.weights(dtype) // parts, how)
    items = [weights]
    if lora_rank is not None:
        items.append(Item("adapter", shape.lora * BYTES[dtype], f"{shape.lora:,} parameters × {BYTES[dtype]} B"))
    token = kv_bytes(shape, dtype) // parts
    how = f"{generation.max_model_len} tokens × {token:,} B (one sequence of `max_model_len`)"
    items.append(Item("KV cache", generation.max_model_len * token, how))
    return Estimate("engine", [*items, overhead()])


def kv_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of the KV cache per token, in the engine's data type."""
    return shape.kv_elements * BYTES[dtype]


def concurrency(shape: Shape, generation: GenerationConfig, dtype: str, estimate: Estimate, total: int) -> int:
    """How many sequences of `max_model_len` fit on a GPU of `total` bytes: in `gpu_kv_cache_gib` or else in `gpu_memory_utilization`."""
    sequence = generation.max_model_len * kv_bytes(shape, dtype) // generation.tensor_parallel_size
    room = generation.gpu_kv_cache_bytes
    if room is None:
        room = int(generation.gpu_memory_utilization * total - (estimate.total - sequence))
    return max(0, room) // sequence


def overhead() -> Item:
    return Item("overhead", OVERHEAD, "CUDA's context, workspaces, fragmentation; a guess")


def engine_dtype(generation: GenerationConfig, checkpoint: str) -> str:
    """vLLM's data type: for `auto` the checkpoint's, or bfloat16 if that is float32."""
    if generation.dtype != "auto":
        return generation.dtype
    return "bfloat16" if checkpoint == "float32" else checkpoint
