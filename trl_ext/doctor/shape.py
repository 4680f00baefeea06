"""
A model's sizes from its configuration alone. The model is built, and run once, on the meta device, where tensors have shapes but no
memory. No weights are loaded.
"""

from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PROBE_TOKENS = 16
NF4_BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes' defaults: values per scale, and scales per scale of scales


@dataclass
class Shape:
    """
    Args:
        parameters (`int`):
            Number of parameters; tied ones count once.
        linear (`list[int]`):
            Parameters of each linear layer that can be quantized: all but the output head.
        linear_rows (`int`):
            Output features of those layers together; 8-bit weights have one scale for each.
        layers, hidden, vocabulary (`int`):
            As in the configuration.
        kv_elements (`int`):
            Elements of the KV cache per token.
        saved_bytes (`int`):
            Bytes that autograd keeps of a forward pass through the layers, per token, in 16 bits, with the adapter if there is one.
        lora (`int`):
            Trainable parameters of the adapter; 0 without one.
    """

    parameters: int
    linear: list[int]
    linear_rows: int
    layers: int
    hidden: int
    vocabulary: int
    kv_elements: int
    saved_bytes: int
    lora: int

    def weights(self, dtype: str) -> int:
        return self.parameters * BYTES[dtype]

    def nf4(self, dtype: str, nested: bool) -> int:
        """Bytes with the linear layers in NF4, and the rest in `dtype`."""
        scales = [-(-size // NF4_BLOCK) for size in self.linear]
        kept = (self.parameters - sum(self.linear)) * BYTES[dtype]
        scale_bytes = [n + 4 * -(-n // NESTED_BLOCK) if nested else 4 * n for n in scales]
        return kept + sum(size // 2 for size in self.linear) + sum(scale_bytes)

    def int8(self, dtype: str) -> int:
        """Bytes with the linear layers in 8 bits."""
        return (self.parameters - sum(self.linear)) * BYTES[dtype] + sum(self.linear) + 4 * self.linear_rows


def model_shape(config: PreTrainedConfig, model_args: ModelConfig, trust_remote_code: bool = False) -> Shape:
    """
    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of a causal language model.
        model_args ([`~trl.ModelConfig`]):
            Whether there is an adapter, and which.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    kv_elements = _kv_elements(model)
    lora = 0
    if model_args.use_peft:
        model = get_peft_model(model, get_peft_config(model_args), low_cpu_mem_usage=True)
        lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.enable_input_require_grads()  # as the trainers do with checkpointing
    return Shape(
        parameters=parameters,
        linear=[m.weight.numel() for m in linear],
        linear_rows=sum(m.weight.shape[0] if isinstance(m, nn.Linear) else m.weight.shape[1] for m in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_elements=kv_elements,
        saved_bytes=saved_bytes(model, PROBE_TOKENS) // PROBE_TOKENS,
        lora=lora,
    )


def _kv_elements(model: nn.Module) -> int:
    """Elements of all layers' keys and values per token, read off the cache of a forward pass."""
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) // PROBE_TOKENS


def saved_bytes(model: nn.Module, tokens: int) -> int:
    """
    Bytes that autograd keeps of a forward pass of one sequence through the model without its head, weights not included. With few
    tokens, the attention matrices, which fused kernels do not keep, are a small part.
    """
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    # A complete mask: transformers would read the values of any other, and meta tensors have none
    mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16, device=device)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def classifier_parameters(config: PreTrainedConfig, trust_remote_code: bool = False) -> int:
    """Number of parameters of a reward model."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters())
