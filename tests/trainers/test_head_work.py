"""
What a step costs in the head: on 5000 words, tiles of logits of ten rows, nothing larger in memory and as many products as promised.
"""

import importlib

import pytest
import torch
from tests.benchmarks.tdpo import FullLogitsTDPOTrainer
from tests.trainers.methods import METHODS, TDPO2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaForCausalLM


KERNEL = "trl_ext.kernels.position_kl"  # the module with `TILE_ELEMENTS`
LARGE_VOCABULARY, TILE_ROWS = 5000, 10


class HeadProbe(TorchDispatchMode):
    """
    Watches every operation of a step: keeps the shapes of the tensors it made with more elements than a tile of logits,
    in fp32 or wider, and counts the FLOP of the matrix products with the head.
    """

    def __init__(self):
        super().__init__()
        self.large: dict[tuple[int, ...], int] = {}
        self.flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.itemsize >= 4
                and tensor.numel() > TILE_ROWS * LARGE_VOCABULARY
                and tensor.untyped_storage().data_ptr() not in given  # neither a view nor in place
            ):
                shape = tuple(tensor.shape)
                self.large[shape] = self.large.get(shape, 0) + 1
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if max(*a.shape, *b.shape) > 1000:  # no other product has a side this long
                self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.fixture(scope="module")
def large_vocabulary_dir(tiny_model_dir, tmp_path_factory):
    """The tiny Llama with 5000 words, of which the tokenizer uses the first."""
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.vocab_size = LARGE_VOCABULARY
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("large-vocabulary")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def large_trainer(make_trainer, large_vocabulary_dir, conversational_pairs, monkeypatch):
    """Returns a function that builds a trainer on 5000 words whose tiles of logits have ten rows."""
    monkeypatch.setitem(importlib.import_module(KERNEL).TILE_ELEMENTS, "cpu", TILE_ROWS * LARGE_VOCABULARY)

    def make(method=TDPO2, trainer_class=None, **options):
        defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        options["trainer"] = {"eval_dataset": conversational_pairs, **(options.get("trainer") or {})}
        options = {**defaults, **method.options, **options}
        return make_trainer(trainer_class or method.trainer, method.config, model=str(large_vocabulary_dir), **options)

    return make


def completion_tokens(trainer) -> int:
    (batch,) = trainer.get_eval_dataloader()
    return int(batch["completion_mask"][:, 1:].sum())


# Head GEMMs of a step: TDPO has those of policy, reference and gradient. Sr-DPO has one more forward of each model, under the augmented prompt,
# and a share of TRL's saving
GEMMS = {"tdpo1": 3, "tdpo2": 3, "sr": 5, "sr-tdpo1": 5, "sr-tdpo2": 5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("adapter", "bf16"), [(True, False), (False, False), (False, True)])
def test_training_step_is_flat(large_trainer, lora_config, method, adapter, bf16):
    """
    A whole step of the training loop, optimizer and all. With a frozen head nothing is larger than a tile of logits; with
    a trained one only tensors of its weight's shape and, once, the `[N, V]` gradient that the kernel keeps (in fp32 if
    the step is). The head takes GEMMS of 2·N·V·H FLOP if it is frozen and one more if it is trained; for TDPO `DPOTrainer`'s
    kernels would take 4 and 5.
    """
    trainer = large_trainer(METHODS[method], bf16=bf16, trainer={"peft_config": lora_config} if adapter else None)
    gemms = GEMMS[method] + (not adapter)
    positions = completion_tokens(trainer)
    assert positions > 5 * TILE_ROWS
    with HeadProbe() as probe:
        trainer.train()
    allowed = set() if adapter else {(LARGE_VOCABULARY, 32), (32, LARGE_VOCABULARY)}
    if not adapter and not bf16:
        allowed.add((positions, LARGE_VOCABULARY))
    assert probe.large.keys() <= allowed
    assert probe.large.get((positions, LARGE_VOCABULARY), 0) <= 1
    assert gemms - 1 < probe.flop / (2 * positions * LARGE_VOCABULARY * 32) <= gemms


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_evaluation_is_flat(large_trainer, lora_config, adapter):
    """An evaluation makes nothing larger than a tile of logits, and takes one GEMM with each model's head."""
    trainer = large_trainer(trainer={"peft_config": lora_config} if adapter else None)
    with HeadProbe() as probe:
        trainer.evaluate()
    assert probe.large == {}
    assert probe.flop == 2 * 2 * completion_tokens(trainer) * LARGE_VOCABULARY * 32


def test_probe_sees_full_logits(large_trainer):
    """The control: TDPO as its paper's code computes it has `(2B, T, V)` tensors in fp32, and the probe finds them."""
    trainer = large_trainer(trainer_class=FullLogitsTDPOTrainer)
    (batch,) = trainer.get_eval_dataloader()
    rows, length = batch["input_ids"].shape
    with HeadProbe() as probe:
        trainer.evaluate()
    assert probe.large[rows, length - 1, LARGE_VOCABULARY] > 3
