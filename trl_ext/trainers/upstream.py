"""
Works around faults of the libraries below, each in one place, with the upstream issue or the test that fails once it is fixed there
(`tests/trainers/test_upstream.py`).
"""

import os
from pathlib import Path

import torch
from accelerate.utils import fsdp2_load_full_state_dict
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Partial
from transformers.utils import is_bitsandbytes_available
from trl import DPOTrainer


def load_adapter_weights(model: PeftModel, path: str | Path, adapter_name: str) -> None:
    """
    Load saved weights into an adapter of `model`. Resuming needs it: beside a "ref" adapter, transformers (5.17) loads the
    adapters in a checkpoint's subfolders but not the trained one, at its root.
    """
    set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name=adapter_name)


def load_sharded_reference(trainer: DPOTrainer, weights: dict[str, torch.Tensor] | None) -> None:
    """
    Give all processes their part of the reference. With `fsdp_cpu_ram_efficient_loading` only the main process has
    loaded its weights, and the others have zeros; accelerate broadcasts the policy's weights when it shards it, but TRL (1.16)
    shards the reference without a broadcast.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer, whose policy is not sharded yet.
        weights (`dict[str, torch.Tensor]`, *optional*):
            The reference's weights. Default: the policy's.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
        weights = trainer.model.state_dict() if weights is None else weights
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        fsdp2_load_full_state_dict(trainer.accelerator, trainer.ref_model, weights, cpu_offload=offloads)


def own_device() -> dict[str, None]:
    """
    The loading arguments of a model in one of several processes with a device each: TRL (1.16) would spread the reference over all GPUs
    under FSDP.
    """
    return {"device_map": None} if "WORLD_SIZE" in os.environ else {}


def keep_nf4_trainable(model: nn.Module) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs NF4 weights for inference in the first forward of an evaluation and
    does not unpack them for training, so that no gradient passes through them any more. Prevent the packing.
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def unshard_head(model: nn.Module) -> None:
    """
    Gather the head before a forward with gradient. Under FSDP2, TRL (1.16) reads the head's weight without calling the head. If the head
    is a unit of its own, TRL gathers the weight itself, and each process would train its part of the head on its own pairs only.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule) and torch.is_grad_enabled():
        head.unshard()


def gathered_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """
    Gather a parameter that FSDP2 has sharded and whose hooks do not run, such as the weight of a head that is a unit of its own and never
    called. By default torch (2.13) assumes the same gradient in all processes, and each would train its part on its own pairs only.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
