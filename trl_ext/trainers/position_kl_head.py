"""
A forward flag that gives a causal LM the position KL, in the way TRL's `add_fused_lm_head` gives it log-probabilities.

The reference is called with `completion_states=True` and answers with its hidden states at the completion positions and
the head that goes with them; the policy is called with `reference=` those states and answers with per-token results. Both
run inside the model's own forward, where PEFT has the right adapter active and DDP, FSDP2 and ZeRO-3 see the use of the
head.
"""

import functools
import types
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from ..kernels.fused_position_kl import fused_position_kl
from ..kernels.position_kl import position_kl


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
    [`~trl.trainer.utils.FusedCausalLMOutput`] with two more per-token fields of shape `(2B, T)`, zero outside the
    completions: `ref_log_probs` and `position_kl`.
    """

    ref_log_probs: torch.Tensor | None = None
    position_kl: torch.Tensor | None = None


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """
    Scale and soft-capping that a text config applies to its logits, under the names `add_fused_lm_head` knows.

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


def gather(parameter: DTensor) -> torch.Tensor:
    """
    The whole of a parameter that FSDP2 has sharded, where its own hooks do not gather it: where the head is a unit of its
    own, whose forward is never called.
    """
    # By default, the gradient is taken to be the same in all processes, and each would train its part on its own pairs
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def add_position_kl_head(model: PreTrainedModel) -> None:
    """
    Add the flags `completion_states=True` and `reference=...` to `model.forward`. Without them the forward is unchanged.

    With `kl_weight=(κ_chosen, κ_rejected)`, besides `reference`, the fused kernel runs: `log_probs` has the value of the
    log-probability and the gradient of `log π + κ KL`, and `position_kl` has none. Without it both are differentiable.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch, not wrapped by PEFT (patch its base model).
    """
    original_forward = model.forward
    text_config = model.config.get_text_config()
    logit_scale, softcap = logit_transform(text_config)

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(self, *args, labels=None, completion_states=False, reference=None, kl_weight=None, **kwargs):
        if not completion_states and reference is None:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(*args, **kwargs)

        backbone_outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        # The backbone and the head are looked up on each call, since FSDP and PEFT replace them after patching
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2
            weight, bias = gather(weight), None if bias is None else gather(bias)
        labels = labels[:, 1:].to(weight.device)  # (2B, T)
        mask = labels != -100
        hidden = backbone_outputs.last_hidden_state[:, :-1].to(weight.device)[mask]  # (N, H)
        if completion_states:
            if isinstance(self, FSDPModule):  # frees the unsharded head when this forward ends
                weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
            return CompletionStates(hidden, weight, bias, logit_scale, softcap)

        arguments = (hidden, weight, bias, reference.hidden, reference.weight, reference.bias, labels[mask])
        transforms = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "ref_logit_scale": reference.logit_scale,
            "ref_softcap": reference.softcap,
        }
        if kl_weight is None:
            per_token = position_kl(*arguments, **transforms)._asdict()
        else:
            per_pair = torch.tensor(kl_weight, device=hidden.device).repeat_interleave(mask.size(0) // 2)  # (2B,)
            per_token = fused_position_kl(
                *arguments, per_pair.unsqueeze(1).expand_as(mask)[mask], **transforms
            )._asdict()
            # The value of the log-probability, the gradient of log-probability and weighted KL together
            weighted = per_token.pop("weighted")
            per_token["log_probs"] = weighted + (per_token["log_probs"] - weighted).detach()
        aux_loss = None
        if kwargs.get("output_router_logits"):
            # Mixtral's load-balancing loss is the one every MoE family pulls in through the modular system
            aux_loss = load_balancing_loss_func(
                backbone_outputs.router_logits,
                text_config.num_experts,
                text_config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        # `masked_scatter` keeps the output connected to the model even when no label is valid
        per_token = {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in per_token.items()}  # (2B, T)
        return PositionKLOutput(**per_token, label_mask=mask, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)
