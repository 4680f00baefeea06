"""
What `trl_ext` relies on in TRL beyond its documented API, so that an upgrade breaks here first, and by name.

Oracle: TRL 1.16. A failure after an upgrade means: read what changed, and adapt the trainers and kernels, then this file. An additional
parameter with a default breaks nothing.
"""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tests.conftest import first_batch, labels_and_mask, step_metrics, train_step
from tests.oracles.tdpo import token_logps
from tests.test_layers import imports, is_private_to_trl, modules, part
from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer


# Names TRL does not export -> their parameters. For an autograd function, those of `forward` after `ctx`.
NOT_EXPORTED = {
    "trl.data_utils._tokenize": "processing_class input apply_chat_template_kwargs",
    "trl.data_utils.common_prefix_length": "ids other_ids",
    "trl.kernels.chunked_logprob._addmm_fp32": "acc a b",
    "trl.models.utils.disable_gradient_checkpointing": "model gradient_checkpointing_kwargs",
    "trl.trainer.dpo_trainer.DataCollatorForPreference": "pad_token_id max_length truncation_mode pad_to_multiple_of "
    "return_tensors",
    "trl.trainer.utils.FusedCausalLMOutput": "loss log_probs entropy log_sum_sq_probs mean_logits is_top1 label_mask aux_loss",
    "trl.trainer.utils.generate_model_card": "base_model model_name hub_model_id dataset_name tags wandb_url trackio_url "
    "trainer_name trainer_citation template_file paper_title paper_id comet_url",
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.trainer.utils.global_then_local_main_first": "",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "params",
    "trl.trainer.utils.pad": "tensors padding_value padding_side pad_to_multiple_of",
}
NOT_EXPORTED = {tuple(name.rsplit(".", 1)): tuple(names.split()) for name, names in NOT_EXPORTED.items()}

# Methods of DPOTrainer that are overridden or called -> their parameters
METHODS = {
    # The order matters: the trainers pass the first ones by position
    "__init__": "self model ref_model args data_collator train_dataset eval_dataset processing_class compute_metrics callbacks "
    "optimizers quantization_config peft_config",
    "_compute_loss": "self model inputs return_outputs",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_precompute_ref_logps": "self dataset name batch_size",
    "_prepare_dataset": "self dataset processing_class args dataset_name",
    "_set_signature_columns_if_needed": "self",
    "create_model_card": "self model_name dataset_name tags",
    "compute_ref_log_probs": "self model inputs",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",  # calls `_compute_loss`
}
METHODS = {name: tuple(names.split()) for name, names in METHODS.items()}

# Attributes that DPOTrainer sets in its constructor -> their values for a plain config
ATTRIBUTES = {
    "_is_vision_dataset": False,
    "_precompute_model_hash": None,
    "_total_train_tokens": 0,
    "aux_loss_enabled": False,
    "beta": 0.1,
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "precompute_ref_logps": False,
    "use_weighting": False,
}

ADDED_METRICS = {
    TDPOTrainer: {
        *("position_kl/chosen", "position_kl/rejected", "position_kl/margin"),
        *("rewards_tdpo/chosen", "rewards_tdpo/rejected"),
    },
    SelfRefineDPOTrainer: {
        *("refinement/margin", "refinement/margin_std", "refinement/share", "refinement/accuracies"),
        "refinement/marginal",
    },
}
CONFIGS = {TDPOTrainer: TDPOConfig, SelfRefineDPOTrainer: SelfRefineDPOConfig}


# Names and signatures


def parameters(function) -> tuple[inspect.Parameter, ...]:
    """The parameters of a function; for an autograd function, those of `forward` after `ctx`."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return tuple(inspect.signature(function.forward).parameters.values())[1:]
    return tuple(inspect.signature(function).parameters.values())


def missing(found: tuple[inspect.Parameter, ...], expected: tuple[str, ...]) -> str | None:
    """Why a signature cannot be called with the `expected` parameters, in this order; `None` if it can."""
    names = tuple(parameter.name for parameter in found)
    if tuple(name for name in names if name in expected) != expected:
        return f"takes {names}, not {expected}"
    catching = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in found if p.default is p.empty and p.kind not in catching and p.name not in expected]
    return f"needs {needed} too" if needed else None


def test_the_table_is_what_the_code_uses():
    """The names TRL does not export, as trainers/ and kernels/ import them, are the ones listed here."""
    used = {
        imported
        for module in modules()
        if part(module) in ("trainers", "kernels")
        for imported in imports(module)
        if is_private_to_trl(*imported)
    }
    assert used == set(NOT_EXPORTED)


@pytest.mark.parametrize(("module", "name"), NOT_EXPORTED)
def test_name_exists_with_the_signature_relied_on(module, name):
    assert missing(parameters(getattr(importlib.import_module(module), name)), NOT_EXPORTED[module, name]) is None


@pytest.mark.parametrize("method", METHODS)
def test_method_has_the_signature_relied_on(method):
    assert missing(parameters(getattr(DPOTrainer, method)), METHODS[method]) is None


def test_what_a_signature_may_be():
    """An additional parameter with a default breaks nothing; one without, another order, or a missing one does."""
    expected = ("self", "model", "inputs")
    for function, problem in [
        (lambda self, model, inputs: None, None),
        (lambda self, model, inputs, scale=1.0, **kwargs: None, None),
        (lambda self, model, inputs, scale: None, "needs ['scale'] too"),
        (lambda self, inputs, model: None, "takes ('self', 'inputs', 'model'), not ('self', 'model', 'inputs')"),
        (lambda self, model: None, "takes ('self', 'model'), not ('self', 'model', 'inputs')"),
    ]:
        assert missing(parameters(function), expected) == problem


def test_attributes(make_trainer):
    trainer = make_trainer(DPOTrainer, DPOConfig)
    assert {name: getattr(trainer, name) for name in ATTRIBUTES} == ATTRIBUTES
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer.ref_model is not None


# Behaviour


def test_compute_loss(make_trainer):
    """
    The three properties that `ShiftedDPOTrainer` relies on, with made-up log-probabilities against DPO's equations: `_compute_loss` calls
    its argument `model`, with the batch; it sums `log_probs`, and reads the reference's log-probabilities from the batch after that call;
    and it multiplies a pair's loss by weights made from `log_sum_sq_probs`. Without loss types the loss is 0.
    """
    trainer = make_trainer(DPOTrainer, DPOConfig)
    trainer.model.train()
    batch = first_batch(trainer)
    mask, pairs = batch["completion_mask"][:, 1:], len(batch["input_ids"]) // 2
    generator = torch.Generator().manual_seed(0)
    log_probs = (torch.randn(mask.shape, generator=generator) * mask).requires_grad_()
    ref_logps, weights = torch.randn(2, pairs, generator=generator), torch.rand(mask.shape, generator=generator)
    zeros, buffers, calls = torch.zeros(mask.shape), {}, []
    outputs = FusedCausalLMOutput(
        log_probs=log_probs,
        log_sum_sq_probs=log_probs.detach() - weights,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=mask.bool(),
    )

    def policy(**kwargs):
        calls.append(kwargs.keys())
        for buffer, values in zip(buffers.values(), ref_logps, strict=True):
            buffer.copy_(values)
        return outputs

    def compute_loss(**attributes):
        buffers.update({f"ref_{side}_logps": torch.zeros(pairs) for side in ("chosen", "rejected")})
        vars(trainer).update(attributes, precompute_ref_logps=True)
        return trainer._compute_loss(policy, {**batch, **buffers}, False)

    logratios = log_probs.sum(dim=1).view(2, pairs) - ref_logps
    losses = -F.logsigmoid(trainer.beta * (logratios[0] - logratios[1]))
    loss = compute_loss()
    (arguments,) = calls
    assert {"input_ids", "attention_mask", "labels", "fused_lm_head"} <= arguments
    torch.testing.assert_close(loss, losses.mean())
    gradients = [torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (loss, losses.mean())]
    torch.testing.assert_close(*gradients)
    metrics, rewards = step_metrics(trainer), trainer.beta * logratios.mean(dim=1)
    assert [metrics["rewards/chosen"], metrics["rewards/rejected"]] == pytest.approx(rewards.tolist())
    pair_weights = ((weights * mask).sum(dim=1) / mask.sum(dim=1)).exp().view(2, pairs).prod(dim=0)
    torch.testing.assert_close(compute_loss(use_weighting=True), (losses * pair_weights).mean())
    assert compute_loss(loss_types=[], loss_weights=[], use_weighting=False) == 0.0


def test_collator():
    """By hand: `[chosen, rejected]` along the first dimension, padded on the right, completions marked."""
    batch = DataCollatorForPreference(pad_token_id=0)(
        [
            {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
            {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]],
    }


def test_prepared_rows(make_trainer, conversational_pairs):
    """`_prepare_dataset` keeps the columns and adds the token ids; the default collator is the one derived from."""
    trainer = make_trainer(DPOTrainer, DPOConfig)
    assert type(trainer.data_collator) is DataCollatorForPreference
    assert set(trainer.train_dataset.column_names) == {
        *conversational_pairs.column_names,
        *("prompt_ids", "chosen_ids", "rejected_ids"),
    }
    trainer._set_signature_columns_if_needed()
    assert set(trainer._signature_columns) == {
        *("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"),
    }


def test_fused_lm_head(tiny_model_dir, make_trainer):
    """
    Oracle: float64 full logits. `fused_lm_head=True` gives per-token log-probabilities of shape `(2B, T)`, shifted by one,
    and 0 where the label is -100.
    """
    batch = first_batch(make_trainer(DPOTrainer, DPOConfig))
    labels, mask = labels_and_mask(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    expected = token_logps(model(**inputs).logits[:, :-1], labels).masked_fill(mask == 0, 0)
    add_fused_lm_head(model)
    masked_labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    log_probs = model(**inputs, labels=masked_labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-5)


def test_disable_gradient_checkpointing(tiny_model_dir):
    """Off inside, on again after, and left off if it was off."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with disable_gradient_checkpointing(model, None):
        assert not model.is_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    with disable_gradient_checkpointing(model, None):
        assert not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("trainer_class", ADDED_METRICS, ids=lambda cls: cls.__name__)
def test_metrics_are_dpos_and_the_added_ones(make_trainer, trainer_class):
    """The keys DPOTrainer records for a step, each also recorded by ours, which adds the ones listed and no other."""
    stock, ours = make_trainer(DPOTrainer, DPOConfig), make_trainer(trainer_class, CONFIGS[trainer_class])
    for trainer in (stock, ours):
        train_step(trainer, first_batch(trainer))
    stock_keys, keys = set(step_metrics(stock)), set(step_metrics(ours))
    assert keys - ADDED_METRICS[trainer_class] == stock_keys
    assert ADDED_METRICS[trainer_class] & stock_keys == set()
    assert ADDED_METRICS[trainer_class] <= keys
