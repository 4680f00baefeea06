"""
What `trl_ext` relies on in TRL beyond its documented API, so that an upgrade breaks here first, and by name.

Oracle: TRL 1.16. A failure after an upgrade means: read what changed, adapt the trainers and kernels, then this file
and `trl_ext/trainers/trl_contract.py`, which lists the names and signatures.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from tests.conftest import first_batch, labels_and_mask, step_metrics, train_step
from tests.oracles.tdpo import token_logps
from tests.test_layers import imports, is_private_to_trl, modules, part
from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers import trl_contract
from trl_ext.trainers.trl_contract import METHODS, NOT_EXPORTED, missing, parameters


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
    """One parameter more with a default is no break; one more without, another order or one less is."""
    expected = ("self", "model", "inputs")
    for function, problem in [
        (lambda self, model, inputs: None, None),
        (lambda self, model, inputs, scale=1.0, **kwargs: None, None),
        (lambda self, model, inputs, scale: None, "needs ['scale'] too"),
        (lambda self, inputs, model: None, "takes ('self', 'inputs', 'model'), not ('self', 'model', 'inputs')"),
        (lambda self, model: None, "takes ('self', 'model'), not ('self', 'model', 'inputs')"),
    ]:
        assert missing(parameters(function), expected) == problem


COMPUTE_LOSS = DPOTrainer._compute_loss


def calls_its_own_model(self, model, inputs, return_outputs):
    return COMPUTE_LOSS(self, self.model, inputs, return_outputs)


def reads_the_reference_first(self, model, inputs, return_outputs):
    return COMPUTE_LOSS(self, model, {name: value.clone() for name, value in inputs.items()}, return_outputs)


def takes_means(self, model, inputs, return_outputs):
    def means(**kwargs):
        outputs = model(**kwargs)
        return replace(outputs, log_probs=outputs.log_probs / 2)

    return COMPUTE_LOSS(self, means, inputs, return_outputs)


def ignores_the_weights(self, model, inputs, return_outputs):
    self.use_weighting = False
    return COMPUTE_LOSS(self, model, inputs, return_outputs)


def has_another_option(self, model, inputs, return_outputs, scale=1.0):
    return scale * COMPUTE_LOSS(self, model, inputs, return_outputs)


@pytest.mark.parametrize(
    ("compute_loss", "problem"),
    [
        (calls_its_own_model, "calls another model"),
        (reads_the_reference_first, "does not read the reference's log-probabilities after the call"),
        (takes_means, "does not sum `log_probs`"),
        (ignores_the_weights, "does not weigh a pair"),
        (has_another_option, None),
    ],
)
def test_what_doctor_says_of_a_loss_that_differs(monkeypatch, compute_loss, problem):
    """The seams of this package in TRL's loss, each broken in its own way; an optional parameter is no break."""
    monkeypatch.setattr(DPOTrainer, "_compute_loss", compute_loss)
    problems = trl_contract.broken()
    assert (problems == []) if problem is None else any(problem in line for line in problems)


def test_what_doctor_says_of_a_trl_that_differs(monkeypatch):
    """Nothing of this one; of others, each name with what it has become."""
    assert trl_contract.broken() == []
    monkeypatch.setitem(trl_contract.NOT_EXPORTED, ("trl.trainer.utils", "pad"), ("images",))
    monkeypatch.setitem(trl_contract.NOT_EXPORTED, ("trl.trainer.utils", "no_such_name"), ())
    monkeypatch.setitem(trl_contract.METHODS, "no_such_method", ())
    assert [problem.split(" ")[0] + " " + problem.split(" ")[1] for problem in trl_contract.broken()] == [
        "trl.trainer.utils.pad takes",
        "trl.trainer.utils.no_such_name is",
        "DPOTrainer.no_such_method is",
    ]


def test_attributes(make_trainer):
    trainer = make_trainer(DPOTrainer, DPOConfig)
    assert {name: getattr(trainer, name) for name in ATTRIBUTES} == ATTRIBUTES
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer.ref_model is not None


# Behaviour


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
    """Off inside, on again after, and left off where it was off."""
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
