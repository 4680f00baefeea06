"""
`SelfRefineDPOTrainer` on a tiny Llama, against the float64 transcription of the paper from full logits
(`tests/oracles/self_refine.py`) and, where the two must coincide, against `trl.DPOTrainer`.

The trainer computes the responses under the augmented prompt from shared key-value caches; the oracle sees them as whole
sequences, put together from the collated batch by `augmented_sequences`.
"""

import json
from dataclasses import fields

import pytest
import torch
import transformers
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tests.conftest import (
    CHAT_TEMPLATE,
    TINY,
    FullLogits,
    assert_gradients_close,
    first_batch,
    labels_and_mask,
    perturb,
    step_metrics,
    train_step,
)
from tests.oracles import self_refine as oracle
from tests.oracles.tdpo import logratio, sequence_kl, sft_loss_from_logits
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers.self_refine_dpo_trainer import DataCollatorForSelfRefinement, augment_prompt


LN_2 = torch.tensor(2.0).log().item()  # in fp32, as the loss

# PAPERS.md §2
PAPERS_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is the "
    "minimum. Query:"
)

# What the trainer does with each option that DPOConfig adds to TrainingArguments. A field that is new in TRL fails
# `test_every_dpo_option_is_accounted_for` until it is put in one of these.
HONOURED = {
    "activation_offloading",
    "beta",
    "dataset_num_proc",
    "disable_dropout",
    "discopop_tau",
    "label_smoothing",  # with "exo_pair" and "robust", which read it; refused without
    "loss_type",  # those of LOSSES and "sft"; others are refused, see OTHER_LOSS_TYPES
    "loss_weights",
    "max_length",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",  # disabled with a warning in TRL 1.16, for every preference trainer
    "precompute_ref_batch_size",
    "precompute_ref_log_probs",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "router_aux_loss_coef",
    "sync_ref_model",
    "truncation_mode",
    "trust_remote_code",
    "use_weighting",
}
REFUSED = {
    "f_divergence_type": "js_divergence",
    "ld_alpha": 0.5,
}
# Read only together with a refused option
WITHOUT_EFFECT = {"f_alpha_divergence_coef": "f_divergence_type"}
OTHER_LOSS_TYPES = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"]

# The losses, as options of the config
LOSSES = {
    "sr-dpo": {"loss_type": "sigmoid"},
    "sr-ipo-paper": {"loss_type": "ipo", "ipo_length_normalization": False},
    "sr-ipo-trl": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.3},
    "sigmoid-norm": {"loss_type": "sigmoid_norm"},
}
# Two at once: sums beside means, and a term that is not of pairs
LOSS_LISTS = {
    "sft": {"loss_type": ["sigmoid", "sft"]},
    "sft-weighted": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]},
    "sums-and-means": {"loss_type": ["ipo", "sigmoid", "sigmoid_norm", "sft"], "loss_weights": [0.5, 1.0, 2.0, 0.1]},
    "smoothed": {"loss_type": ["exo_pair", "hinge"], "label_smoothing": 0.2},
}
full_and_lora = pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])


class RecordingTrainer(SelfRefineDPOTrainer):
    """Keeps the loss of each training step, as the training loop (with its autocast) computes it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


class WholeSequenceTrainer(SelfRefineDPOTrainer):
    """Computes each augmented sequence by itself, as for models that cannot continue a shared cache."""

    _shares_prompts = False


def augmented_sequences(batch: dict) -> dict:
    """The collated batch's responses after their augmented prompts, as a batch of whole sequences, padded on the right."""
    pairs = len(batch["augmented_prompt_ids"])
    ids, completion_masks = [], []
    for row, (completion, mask) in enumerate(
        zip(batch["completion_ids"], batch["completion_attention_mask"], strict=True)
    ):
        prompt, prompt_mask = (batch[f"augmented_prompt_{name}"][row % pairs] for name in ("ids", "mask"))
        prompt = torch.cat([batch["augmented_prefix_ids"][0], prompt[prompt_mask.bool()]])
        completion = completion[mask.bool()]
        ids.append(torch.cat([prompt, completion]))
        completion_masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(completion)]))
    rows = {
        "input_ids": ids,
        "attention_mask": [torch.ones_like(row) for row in ids],
        "completion_mask": completion_masks,
    }
    return {name: pad_sequence(values, batch_first=True) for name, values in rows.items()}


def paper_margin(policy: FullLogits, ref: FullLogits, batch: dict, **kwargs) -> torch.Tensor:
    """Delta_pi, `(B,)`, of a collated batch, with a graph."""
    augmented = augmented_sequences(batch)
    labels, mask = labels_and_mask(augmented)
    return oracle.refinement_margin_from_logits(policy(augmented), ref(augmented), labels, mask, **kwargs)


def paper_losses(
    policy: FullLogits,
    ref: FullLogits,
    batch: dict,
    *,
    loss_type="sigmoid",
    ipo_length_normalization=True,
    beta=0.1,
    refinement_weight=0.3,
    **options,
) -> torch.Tensor:
    """One loss, `(B,)`, of a collated batch, from the config's options. Delta is held constant by the oracle."""
    length_normalized = loss_type == "sigmoid_norm" or (loss_type == "ipo" and ipo_length_normalization)
    return oracle.self_refine_loss_from_logits(
        policy(batch),
        ref(batch),
        *labels_and_mask(batch),
        paper_margin(policy, ref, batch, beta=beta, length_normalized=length_normalized),
        beta=beta,
        refinement_weight=refinement_weight,
        loss_type=loss_type,
        length_normalized=length_normalized,
        **options,
    )


def paper_loss(policy: FullLogits, ref: FullLogits, batch: dict, *, loss_type, loss_weights=None, **options):
    """The loss of a list of loss types, a scalar."""
    loss = 0.0
    for one, weight in zip(loss_type, loss_weights or [1.0] * len(loss_type), strict=True):
        if one == "sft":
            term = sft_loss_from_logits(policy(batch), *labels_and_mask(batch))
        else:
            term = paper_losses(policy, ref, batch, loss_type=one, **options).mean()
        loss = loss + weight * term
    return loss


def mean_or_std(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean over pairs of each metric, but for the standard deviation."""
    return {
        name: (per_pair.std(correction=0) if name.endswith("_std") else per_pair.mean()).item()
        for name, per_pair in values.items()
    }


def paper_metrics(policy, ref, batch: dict, *, beta=0.1, refinement_weight=0.3) -> dict[str, float]:
    """This package's metrics and DPO's rewards, of a collated batch."""
    delta = paper_margin(policy, ref, batch, beta=beta)
    chosen_logratios, rejected_logratios = logratio(policy(batch), ref(batch), *labels_and_mask(batch)).chunk(2)
    u = beta * (chosen_logratios - rejected_logratios)
    per_pair = {
        "refinement/margin": delta,
        "refinement/margin_std": delta,
        "refinement/accuracies": (delta > 0).double(),
        "refinement/marginal": chosen_logratios - rejected_logratios,
        "rewards/chosen": beta * chosen_logratios,
        "rewards/rejected": beta * rejected_logratios,
        "rewards/margins": u,
        "rewards/accuracies": (u > 0).double(),
    }
    share = refinement_weight * delta.abs().mean() / u.abs().mean()
    return {**mean_or_std(per_pair), "refinement/share": share.item()}


def is_sublist(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


# Against the paper


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_match_the_paper(make_trainer, tiny_model_dir, loss, gradient_checkpointing):
    """
    Oracle: float64 full logits of the same weights, on a collated batch; every parameter's gradient, with Delta held
    constant. The oracle's gradient with Delta not held constant is another one, so this can tell.
    """
    options = {**LOSSES[loss], "beta": 0.3, "refinement_weight": 0.5}
    trainer = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, gradient_checkpointing=gradient_checkpointing, **options
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    actual = train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    expected = paper_losses(policy, ref, batch, **options).mean()
    expected.backward()
    without_delta = paper_losses(policy, ref, batch, **{**options, "refinement_weight": 0.0}).mean()
    assert abs(expected.item() - without_delta.item()) > 1e-3  # Delta matters here
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


@pytest.mark.parametrize("losses", LOSS_LISTS)
def test_several_losses(make_trainer, tiny_model_dir, losses):
    """Oracle: the weighted sum of the losses, and of TRL's SFT term under the plain prompt; value and gradients."""
    options = {**LOSS_LISTS[losses], "beta": 0.3, "refinement_weight": 0.5}
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, **options)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    expected = paper_loss(policy, ref, batch, **options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_metrics_match_the_paper(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits, for this package's numbers and DPO's rewards."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, beta=0.3, refinement_weight=0.5)
    perturb(trainer.model)
    batch = first_batch(trainer)
    train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    expected = paper_metrics(policy, ref, batch, beta=0.3, refinement_weight=0.5)
    assert 0 < expected["refinement/accuracies"] < 1
    assert expected["refinement/margin_std"] > 0.1
    metrics = step_metrics(trainer)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert {name for name in metrics if name.startswith("refinement/")} == {
        name for name in expected if name.startswith("refinement/")
    }


def test_evaluation_matches_the_paper(make_trainer, tiny_model_dir, conversational_pairs):
    """Oracle: float64 full logits, averaged over two batches of four; for a dataset given to `evaluate`, too."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"eval_dataset": conversational_pairs})
    perturb(trainer.model)
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    batches = []
    for batch in trainer.get_eval_dataloader():
        batches.append(paper_metrics(policy, ref, batch) | {"loss": paper_losses(policy, ref, batch).mean().item()})
    assert len(batches) == 2
    expected = {f"eval_{name}": sum(batch[name] for batch in batches) / 2 for name in batches[0]}
    for results in (trainer.evaluate(), trainer.evaluate(conversational_pairs)):
        assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


# Limits


def ours_and_stock(make_trainer, refinement_weight: float, ours: dict | None = None, **options):
    """A `SelfRefineDPOTrainer` and a `DPOTrainer` after the same step; returns them and their losses."""
    trainers, losses = [], []
    for trainer_class, config_class, extra in [
        (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": refinement_weight, **(ours or {})}),
        (DPOTrainer, DPOConfig, {}),
    ]:
        trainer = make_trainer(trainer_class, config_class, **options, **extra)
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    return trainers, losses


@full_and_lora
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "sr-ipo-paper"] + list(LOSS_LISTS))
def test_refinement_weight_zero_is_dpo_bit_for_bit(make_trainer, lora_config, loss, adapter):
    """
    Limit: lambda 0 gives `trl.DPOTrainer`'s loss and gradients, every bit; "ipo" is TRL's normalised one. The gradients of
    several losses of pairs are added up in another order, which is the last bit, and TRL divides some metrics in Python.
    """
    options = (LOSSES | LOSS_LISTS)[loss]
    (ours, stock), losses = ours_and_stock(
        make_trainer, 0.0, trainer={"peft_config": lora_config} if adapter else None, **options
    )
    assert torch.equal(*losses)
    stock_gradients = {name: p.grad for name, p in stock.model.named_parameters() if p.requires_grad}
    if len({*options["loss_type"]} - {"sft"}) > 1 and isinstance(options["loss_type"], list):
        assert_gradients_close(ours.model, stock_gradients, tolerance=2e-6)
    else:
        assert all(gradient.any() for gradient in stock_gradients.values())
        for name, parameter in ours.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.grad, stock_gradients[name]), name
    metrics, stock_metrics = step_metrics(ours), step_metrics(stock)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-6)


def test_refinement_weight_zero_is_dpo_with_experts(make_trainer, tiny_moe_dir):
    """Limit: the same on a Mixtral, whose load-balancing loss is that of the plain prompts alone."""
    (ours, stock), losses = ours_and_stock(make_trainer, 0.0, model=str(tiny_moe_dir), router_aux_loss_coef=0.5)
    assert losses[0] == losses[1] > 1
    assert step_metrics(ours)["aux_loss"] == step_metrics(stock)["aux_loss"]


def test_refinement_weight_zero_is_dpo_with_prompt_tuning(make_trainer):
    """Limit: the same under prompt tuning, whose virtual tokens shift all positions."""
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    losses = []
    for trainer_class, config_class, options in [
        (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.0}),
        (DPOTrainer, DPOConfig, {}),
    ]:
        trainer = make_trainer(trainer_class, config_class, trainer={"peft_config": peft_config}, **options)
        perturb(trainer.model, scale=1.0)
        losses.append(train_step(trainer, first_batch(trainer)).item())
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(LN_2, rel=1e-3)


@pytest.mark.parametrize("model", ["full", "lora", "experts"])
@pytest.mark.parametrize("loss", ["sr-dpo", "sums-and-means"])
def test_a_vanishing_refinement_weight_is_dpo(make_trainer, tiny_moe_dir, lora_config, loss, model):
    """
    Limit: lambda 1e-9 is DPO to rounding, although the log-probabilities come from this package's head: loss, gradients and
    metrics, the auxiliary loss of experts among them.
    """
    options = {
        "full": {},
        "lora": {"trainer": {"peft_config": lora_config}},
        "experts": {"model": str(tiny_moe_dir), "router_aux_loss_coef": 0.5},
    }[model]
    (ours, stock), losses = ours_and_stock(make_trainer, 1e-9, **options, **(LOSSES | LOSS_LISTS)[loss])
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in stock.model.named_parameters() if p.requires_grad}
    assert_gradients_close(ours.model, stock_gradients, tolerance=1e-5)
    metrics, stock_metrics = step_metrics(ours), step_metrics(stock)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("refinement_weight", "head"), [(0.3, "completion_log_probs"), (0.0, "fused_lm_head")])
def test_which_head_is_asked(make_trainer, refinement_weight, head):
    """The plain forward of the policy asks this package's head, but for lambda 0, where every bit is TRL's."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, refinement_weight=refinement_weight)
    flags = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: flags.append({name for name, value in kwargs.items() if value is True}),
        with_kwargs=True,
    )
    train_step(trainer, first_batch(trainer))
    assert flags == [{"completion_log_probs"}, {head}]  # under the augmented prompt, and the plain one


def test_empty_refinement_prompt_is_dpo_with_a_smaller_beta(make_trainer):
    """Limit (eq. 10): with p empty, Delta is DPO's own margin, so Sr-DPO's value is DPO's at beta (1 - lambda)."""
    ours = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, refinement_prompt="", beta=0.5, refinement_weight=0.3
    )
    stock = make_trainer(DPOTrainer, DPOConfig, beta=0.5 * (1 - 0.3))
    losses = []
    for trainer in (ours, stock):
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert step_metrics(ours)["refinement/share"] == pytest.approx(0.3, rel=1e-5)  # lambda |u| / |u|


@full_and_lora
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_policy_equal_to_reference_is_ln_2(make_trainer, lora_config, bf16, adapter):
    """Limit: at the start the loss is exactly ln 2 and Delta exactly 0, in the training loop, under autocast too."""
    trainer = make_trainer(
        RecordingTrainer,
        SelfRefineDPOConfig,
        bf16=bf16,
        max_steps=1,
        trainer={"peft_config": lora_config} if adapter else None,
    )
    trainer.train()
    assert trainer.losses == [LN_2]
    log = trainer.state.log_history[0]
    assert {name: log[name] for name in log if name.startswith("refinement/")} == {
        "refinement/margin": 0.0,
        "refinement/margin_std": 0.0,
        "refinement/share": 0.0,
        "refinement/accuracies": 0.0,
        "refinement/marginal": 0.0,
    }
    assert log["grad_norm"] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_training_reduces_the_loss(make_trainer, loss):
    """Eight pairs seen in full at each step: a few steps lower the loss and raise the marginal."""
    trainer = make_trainer(
        RecordingTrainer,
        SelfRefineDPOConfig,
        # The paper's IPO has gradients a response's length larger; the hinge's loss of 0 is soon reached
        learning_rate={"sr-ipo-paper": 1e-3, "hinge": 1e-3}.get(loss, 5e-3),
        max_steps=6,
        per_device_train_batch_size=8,
        seed=0,
        **LOSSES[loss],
    )
    trainer.train()
    assert all(after < before for before, after in zip(trainer.losses, trainer.losses[1:], strict=False))
    assert trainer.state.log_history[0]["refinement/marginal"] == 0
    assert trainer.state.log_history[5]["refinement/marginal"] > 0


# With TDPO's token-level term


VARIANTS = {"tdpo1": {"variant": "tdpo1"}, "tdpo2": {"variant": "tdpo2", "alpha": 0.7}}


def paper_tdpo_losses(policy, ref, batch: dict, *, variant, alpha=0.5, beta=0.1, refinement_weight=0.3):
    """TDPO's losses with the refinement margin, `(B,)`, of a collated batch."""
    return oracle.self_refine_tdpo_loss_from_logits(
        policy(batch),
        ref(batch),
        *labels_and_mask(batch),
        paper_margin(policy, ref, batch, beta=beta),
        beta=beta,
        refinement_weight=refinement_weight,
        alpha=alpha,
        variant=variant,
    )


@full_and_lora
@pytest.mark.parametrize("sft", [False, True], ids=["", "sft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tdpo_with_refinement_matches_the_papers(make_trainer, tiny_model_dir, lora_config, variant, sft, adapter):
    """Oracle: float64 full logits, the transcriptions of both papers together; loss, gradients and metrics."""
    options = {**VARIANTS[variant], "beta": 0.3, "refinement_weight": 0.5}
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        loss_type=["sigmoid", "sft"] if sft else "sigmoid",
        trainer={"peft_config": lora_config} if adapter else None,
        **options,
    )
    perturb(trainer.model, scale=0.2 if adapter else 0.05)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config if adapter else None)
    ref = FullLogits(tiny_model_dir)
    expected = paper_tdpo_losses(policy, ref, batch, **options).mean()
    if sft:
        expected = expected + sft_loss_from_logits(policy(batch), *labels_and_mask(batch))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())

    chosen_kl, rejected_kl = sequence_kl(policy(batch), ref(batch), labels_and_mask(batch)[1]).chunk(2)
    expected_metrics = paper_metrics(policy, ref, batch, beta=0.3, refinement_weight=0.5)
    expected_metrics |= {
        "position_kl/chosen": chosen_kl.mean().item(),
        "position_kl/rejected": rejected_kl.mean().item(),
        "position_kl/margin": (chosen_kl - rejected_kl).mean().item(),
        "rewards_tdpo/chosen": expected_metrics["rewards/chosen"] + 0.3 * chosen_kl.mean().item(),
        "rewards_tdpo/rejected": expected_metrics["rewards/rejected"] + 0.3 * rejected_kl.mean().item(),
    }
    metrics = step_metrics(trainer)
    assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tdpo_with_refinement_weight_zero_is_tdpo(make_trainer, variant):
    """Limit: lambda 0 gives `TDPOTrainer`'s loss, gradients and metrics."""
    trainers, losses = [], []
    for trainer_class, config_class, options in [
        (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.0}),
        (TDPOTrainer, TDPOConfig, {}),
    ]:
        trainer = make_trainer(trainer_class, config_class, **VARIANTS[variant], **options)
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-6)
    tdpo_gradients = {name: p.grad for name, p in trainers[1].model.named_parameters()}
    assert_gradients_close(trainers[0].model, tdpo_gradients, tolerance=1e-6)
    metrics, tdpo_metrics = (step_metrics(trainer) for trainer in trainers)
    assert "position_kl/margin" in tdpo_metrics
    assert {name: metrics[name] for name in tdpo_metrics} == pytest.approx(tdpo_metrics, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("loss_type", {"loss_type": "ipo"}),
        ("loss_type", {"loss_type": ["sigmoid", "hinge"]}),
        ("precompute_ref_log_probs", {"precompute_ref_log_probs": True}),
        ("prompt-learning", {"trainer": {"peft_config": PromptTuningConfig(num_virtual_tokens=4)}}),
        ("prompt-learning", {"trainer": {"peft_config": PrefixTuningConfig(num_virtual_tokens=4)}}),
    ],
    ids=["ipo", "sigmoid-hinge", "precompute", "prompt-tuning", "prefix-tuning"],
)
def test_tdpo_refuses_what_it_cannot_do(make_trainer, variant, option, options):
    """The error names the variant and the option, and comes before the model is loaded: the path leads nowhere."""
    with pytest.raises(ValueError, match=rf"variant='{variant}'[\s\S]*{option}"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model="/no/such/model", **VARIANTS[variant], **options)


def test_tdpo_refuses_a_prompt_learning_peft_model(make_trainer, tiny_model_dir):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), peft_config)
    with pytest.raises(ValueError, match="prompt-learning"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model=model, variant="tdpo2")


def test_a_plain_dpo_config_has_no_variant(make_trainer):
    trainer = make_trainer(SelfRefineDPOTrainer, DPOConfig)
    train_step(trainer, first_batch(trainer))
    assert not any(name.startswith(("position_kl/", "rewards_tdpo/")) for name in step_metrics(trainer))


# Which model is the reference


def test_new_lora_adapter(make_trainer, tiny_model_dir, lora_config):
    """Oracle: float64 full logits with the adapter, and without it for the reference, under both prompts."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"peft_config": lora_config})
    perturb(trainer.model, scale=0.2)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_existing_adapter_is_its_own_reference(make_trainer, tiny_model_dir, lora_config):
    """Oracle: float64 full logits. A `PeftModel` is compared with itself at the start, under both prompts."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), lora_config)
    perturb(model, scale=0.2, seed=2)
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model=model)
    batch = first_batch(trainer)
    assert train_step(trainer, batch).item() == LN_2

    perturb(trainer.model, scale=0.2)
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    ref = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config, adapter="ref")
    expected = paper_losses(policy, ref, batch).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def other_reference(tiny_model_dir):
    """A reference that is not the policy's start."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    return ref_model


def test_given_reference_model(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits. A `ref_model` other than the policy's start is used as it is, under both prompts."""
    ref_model = other_reference(tiny_model_dir)
    weights = {name: weight.clone() for name, weight in ref_model.state_dict().items()}
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"ref_model": ref_model})
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir, weights)
    assert loss.item() == pytest.approx(paper_losses(policy, ref, batch).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig], ids=["prompt-tuning", "prefix-tuning"])
def test_prompt_learning(make_trainer, tiny_model_dir, kind):
    """
    Oracle: float64 full logits of the same `PeftModel`, and of its base model for the reference. The learned prompt stands
    before the augmented one too, which therefore shares no cache.
    """
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"peft_config": peft_config})
    perturb(trainer.model, scale=1.0)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64), peft_config)
    model.load_state_dict(trainer.model.state_dict())
    model = model.double()
    virtual_tokens = 3 if kind is PromptTuningConfig else 0  # prefixes are in the cache, and have no logits

    def policy(batch):
        # PEFT gives prefixes with a cache, which `use_cache=False` would not take
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, virtual_tokens:-1]

    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch).mean()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_gradients_close(trainer.model, gradients)


# Precomputed log-probabilities of the reference


class PrecomputingTrainer(SelfRefineDPOTrainer):
    """Keeps the numbers of pairs for which the reference is computed ahead."""

    batch_sizes: list

    def compute_ref_log_probs(self, model, inputs):
        self.__dict__.setdefault("batch_sizes", []).append(len(inputs["input_ids"]) // 2)
        return super().compute_ref_log_probs(model, inputs)


REFERENCES = ["full", "lora", "adapter", "prompt-tuning", "ref_model"]


@pytest.fixture
def stored_pairs(conversational_pairs, tmp_path):
    """The same rows on disk: the cache of log-probabilities lies beside them. That of rows in memory is read by nobody."""
    conversational_pairs.save_to_disk(tmp_path / "pairs")
    return load_from_disk(tmp_path / "pairs")


@pytest.fixture
def make_with_reference(make_trainer, tiny_model_dir, lora_config):
    """Returns a function that builds a trainer with one of REFERENCES."""

    def make(reference: str, trainer_class=SelfRefineDPOTrainer, trainer=None, **options):
        trainer, model = dict(trainer or {}), None
        if reference == "lora":
            trainer["peft_config"] = lora_config
        elif reference == "adapter":
            base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
            torch.manual_seed(0)  # LoRA's A
            model = get_peft_model(base, lora_config)
            perturb(model, scale=0.2, seed=2)
        elif reference == "prompt-tuning":
            trainer["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        elif reference == "ref_model":
            trainer["ref_model"] = other_reference(tiny_model_dir)
        return make_trainer(trainer_class, SelfRefineDPOConfig, model=model, trainer=trainer, **options)

    return make


@pytest.mark.parametrize("reference", REFERENCES)
def test_precomputed_reference_is_the_same(make_with_reference, reference):
    """Limit: the same loss, gradients and metrics as with the reference computed at each step."""
    losses, trainers = [], []
    for precompute in (True, False):
        trainer = make_with_reference(reference, precompute_ref_log_probs=precompute)
        perturb(trainer.model, scale=0.2 if reference in ("lora", "adapter") else 0.05)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    assert abs(losses[0].item() - LN_2) > 1e-4
    each_step = {name: p.grad for name, p in trainers[1].model.named_parameters() if p.requires_grad}
    assert_gradients_close(trainers[0].model, each_step, tolerance=1e-5)
    metrics = [step_metrics(trainer) for trainer in trainers]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)

    columns = {"ref_chosen_logps", "ref_rejected_logps", "ref_augmented_chosen_logps", "ref_augmented_rejected_logps"}
    assert columns <= set(trainers[0].train_dataset.column_names)
    assert not columns & set(trainers[1].train_dataset.column_names)
    if reference != "ref_model":
        assert trainers[0].ref_model is None  # nothing but the policy is kept


def test_precomputed_columns_match_the_paper(make_with_reference, tiny_model_dir):
    """Oracle: float64 full logits, of each row by itself; the plain columns are `DPOTrainer`'s."""
    trainer = make_with_reference("full", precompute_ref_log_probs=True)
    ref = FullLogits(tiny_model_dir)
    trainer._set_signature_columns_if_needed()
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        for sequences, prefix in [(batch, "ref_"), (augmented_sequences(batch), "ref_augmented_")]:
            labels, mask = labels_and_mask(sequences)
            log_probs = ref(sequences).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            expected = (log_probs * mask).sum(dim=1).tolist()
            cached = [row[f"{prefix}{side}_logps"] for side in ("chosen", "rejected")]
            assert cached == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reference", ["full", "lora"])
def test_training_with_a_precomputed_reference(make_with_reference, reference):
    """Limit: the training loop, which removes unused columns, gives the losses of a run without the cache."""
    losses = []
    for precompute in (True, False):
        trainer = make_with_reference(
            reference, RecordingTrainer, precompute_ref_log_probs=precompute, max_steps=3, learning_rate=1e-2
        )
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(LN_2, rel=1e-6)
    assert losses[0][2] < 0.99 * LN_2


@pytest.mark.parametrize("reference", ["full", "lora", "ref_model"])
def test_evaluation_with_a_precomputed_reference(make_with_reference, conversational_pairs, reference):
    """Limit: the results of a run without the cache, for named datasets and, where the reference is kept, a new one."""
    named = {"some": conversational_pairs.select(range(3)), "others": conversational_pairs.select(range(3, 8))}
    results = []
    for precompute in (True, False):
        trainer = make_with_reference(reference, precompute_ref_log_probs=precompute, trainer={"eval_dataset": named})
        perturb(trainer.model, scale=0.2 if reference == "lora" else 0.05)
        results.append(trainer.evaluate())
        if reference != "full":
            results[-1] |= trainer.evaluate(conversational_pairs.select([5, 2]), metric_key_prefix="new")
            results[-1] |= trainer.evaluate({"both": conversational_pairs.select([5, 2])}, metric_key_prefix="new")

    def without_clock(metrics):
        clocks = ("_runtime", "_time", "_per_second")
        return {name: value for name, value in metrics.items() if not name.endswith(clocks)}

    cached, each_step = map(without_clock, results)
    assert {"eval_some_loss", "eval_others_loss", "eval_refinement/margin"} <= cached.keys()
    assert ("new_both_loss" in cached) == (reference != "full")
    assert cached == pytest.approx(each_step, rel=1e-5, abs=1e-5)
    assert abs(cached["eval_some_loss"] - LN_2) > 1e-4


def test_evaluation_of_one_dataset_with_a_precomputed_reference(make_with_reference, conversational_pairs):
    """Limit: an `eval_dataset` that is not named, with the reference in batches of their own size."""
    results = []
    for options in ({"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5}, {}):
        trainer = make_with_reference("full", trainer={"eval_dataset": conversational_pairs}, **options)
        perturb(trainer.model)
        results.append(trainer.evaluate())
    for name in ("eval_loss", "eval_refinement/margin", "eval_refinement/margin_std", "eval_refinement/share"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)


def test_precompute_ref_batch_size_is_honoured(make_with_reference):
    """Eight rows in batches of three, once under the plain and once under the augmented prompts."""
    trainer = make_with_reference(
        "full", PrecomputingTrainer, precompute_ref_log_probs=True, precompute_ref_batch_size=3
    )
    assert trainer.batch_sizes == [3, 3, 2] * 2


@pytest.mark.parametrize(
    "changes",
    [{"refinement_prompt": "You are brief ."}, {"refinement_prompt_role": "system"}, {"max_length": 12}],
    ids=lambda changes: next(iter(changes)),
)
def test_precomputed_reference_is_not_stale(make_with_reference, stored_pairs, changes):
    """
    Limit: a cache made for another refinement prompt, role or length is not taken for this one's. A second run with the same
    options does read it.
    """
    options = {"precompute_ref_log_probs": True, "refinement_prompt": "Be useful .", "dataset": stored_pairs}
    first, second = (make_with_reference("ref_model", PrecomputingTrainer, **options) for _ in range(2))
    assert first.batch_sizes == [4] * 4
    assert "batch_sizes" not in vars(second)
    assert second.train_dataset[:] == first.train_dataset[:]

    losses = []
    for precompute in (True, False):
        trainer = make_with_reference(
            "ref_model", PrecomputingTrainer, **{**options, **changes, "precompute_ref_log_probs": precompute}
        )
        losses.append(train_step(trainer, first_batch(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(train_step(first, first_batch(first)).item(), rel=1e-5)


# Shared prompts


SMALL = {**TINY, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
GPT2_SIZES = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
WINDOW = {"sliding_window": 8, "head_dim": 8}  # shorter than each augmented prompt
# Class and config of a tiny model, and whether chosen and rejected share the computation of their prompt
ARCHITECTURES = {
    "llama": ("Llama", {}, True),
    "qwen3": ("Qwen3", {"head_dim": 8}, True),
    "mistral-window": ("Mistral", WINDOW, True),
    "gemma2": ("Gemma2", {**WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}, True),
    "gemma3": (
        "Gemma3",
        {**WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        True,
    ),
    "gpt2": ("GPT2", GPT2_SIZES, True),
    "gpt-neox": ("GPTNeoX", {}, True),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, True),
    "falcon-alibi": ("Falcon", {"alibi": True, "multi_query": True}, True),  # its positions are made from the mask
    # Windows that its own attention counts in the cache's slots, padding included
    "gpt-neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        None,
    ),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 2}, False),  # no `position_ids`
    "mamba": ("Mamba", {"state_size": 4}, False),
    "falcon-h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
        False,
    ),
    # Its convolutions keep a state, though transformers does not call it stateful
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_auto_adjust_ff_dim": False},
        False,
    ),
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


@pytest.fixture
def make_tiny(tiny_model_dir, tmp_path):
    """Returns a function that saves one of ARCHITECTURES, for the tiny Llama's tokenizer, and returns its directory."""

    def make(architecture: str):
        name, options, _ = ARCHITECTURES[architecture]
        config_class, model_class = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
        vocab_size = len(AutoTokenizer.from_pretrained(tiny_model_dir))
        config = getattr(transformers, config_class)(vocab_size=vocab_size, **{**SMALL, **options})
        torch.manual_seed(0)
        path = tmp_path / architecture
        getattr(transformers, model_class)(config).save_pretrained(path)
        return path

    return make


def response_logps(model: FullLogits, sequences: dict) -> torch.Tensor:
    """The float64 log-probabilities of whole sequences' responses, `(2B,)`."""
    labels, mask = labels_and_mask(sequences)
    log_probs = model(sequences).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (log_probs * mask).sum(dim=1)


@torch.no_grad()
def augmented_logps(trainer, batch: dict) -> torch.Tensor:
    """The trainer's log-probabilities of the responses under the augmented prompts, `(2B,)`."""
    return torch.cat(trainer._augmented_logps(trainer.model, batch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prompts_match_whole_sequences(make_trainer, make_tiny, architecture):
    """
    Oracle: float64 full logits of whole sequences, for the log-probabilities under the augmented prompts, one by one, and
    for the loss. So does a trainer that computes each sequence by itself.
    """
    path = make_tiny(architecture)
    trainers = [
        make_trainer(cls, SelfRefineDPOConfig, model=str(path), refinement_weight=1.0, router_aux_loss_coef=0.0)
        for cls in (SelfRefineDPOTrainer, WholeSequenceTrainer)
    ]
    shares = ARCHITECTURES[architecture][2]
    assert shares in (None, trainers[0]._shares_prompts)
    perturb(trainers[0].model)
    policy, ref = FullLogits(path, trainers[0].model.state_dict()), FullLogits(path)
    batch = first_batch(trainers[0])
    assert batch["augmented_prefix_ids"].size(1) > 8
    assert not batch["augmented_prompt_mask"].all()  # the prompts are of uneven lengths
    with torch.no_grad():
        expected = response_logps(policy, augmented_sequences(batch)).float()
        expected_loss = paper_losses(policy, ref, batch, refinement_weight=1.0).mean()
        assert abs(expected_loss - paper_losses(policy, ref, batch, refinement_weight=0.0).mean()) > 1e-4

    for trainer in trainers[: 2 if shares is not False else 1]:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
        torch.testing.assert_close(augmented_logps(trainer, batch), expected, atol=1e-4, rtol=1e-5)
        assert train_step(trainer, batch).item() == pytest.approx(expected_loss.item(), rel=1e-5)


def test_fallback_is_not_the_shared_path(make_trainer):
    """`WholeSequenceTrainer` computes whole sequences, so the comparison above is not of one thing with itself."""
    calls = {}
    for trainer_class in (SelfRefineDPOTrainer, WholeSequenceTrainer):
        trainer = make_trainer(trainer_class, SelfRefineDPOConfig)
        batch = first_batch(trainer)
        calls[trainer_class] = embedded_shapes(
            trainer, lambda trainer=trainer, batch=batch: augmented_logps(trainer, batch)
        )
    longest = augmented_sequences(batch)["input_ids"].size(1)
    assert len(calls[SelfRefineDPOTrainer]) == 3
    ((rows, length),) = calls[WholeSequenceTrainer]
    assert (rows, length >= longest) == (8, True)


def embedded_shapes(trainer, step) -> list[tuple[int, int]]:
    """The shapes of the ids that the policy embeds during `step()`."""
    shapes = []
    embedding = trainer.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    step()
    handle.remove()
    return shapes


# Prompts, and the lengths of chosen and rejected: what a batch can look like
LAYOUTS = {
    "uneven": ([[7, 8, 9, 10], [7, 8, 11], [7, 8, 9, 12, 13, 14, 15, 16, 17]], [(3, 5), (2, 1), (4, 12)]),
    "one-pair": ([[7, 8, 9, 10, 11]], [(3, 4)]),
    "nothing-in-common": ([[7, 8], [9, 10, 11], [12]], [(3, 1), (2, 2), (1, 4)]),
    "the-same-prompt": ([[7, 8, 9, 10]] * 3, [(3, 1), (2, 2), (1, 4)]),
    "a-prompt-in-a-prompt": ([[7, 8, 9], [7, 8, 9, 10, 11]], [(3, 1), (2, 2)]),
    "one-token-responses": ([[7, 8, 9, 10], [7, 11]], [(1, 1), (1, 1)]),
    "prompts-of-one-token": ([[7], [7]], [(2, 1), (1, 3)]),
}


@pytest.mark.parametrize("pad_to_multiple_of", [None, 8], ids=["", "multiples-of-8"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gpt2"])
def test_shapes_of_a_batch(make_trainer, make_tiny, architecture, pad_to_multiple_of):
    """
    Oracle: float64 full logits of whole sequences. And each augmented prompt is computed once: in a batch of B pairs, L
    tokens in common once, B times the rest and 2B times the responses but for their last token; with a window B times the
    whole prompts.
    """
    path = make_tiny(architecture)
    trainer = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, model=str(path), pad_to_multiple_of=pad_to_multiple_of
    )
    policy = FullLogits(path)
    generator = torch.Generator().manual_seed(0)
    for name, (prompts, lengths) in LAYOUTS.items():
        rows = []
        for prompt, (chosen, rejected) in zip(prompts, lengths, strict=True):
            responses = torch.randint(7, 60, (chosen + rejected,), generator=generator).tolist()
            rows.append(
                {
                    "prompt_ids": [5, 6],
                    "augmented_prompt_ids": prompt,
                    "chosen_ids": responses[:chosen],
                    "rejected_ids": responses[chosen:],
                }
            )
        batch = trainer.data_collator(rows)
        sequences = augmented_sequences(batch)
        for i, row in enumerate(rows):
            for j, side in ((i, "chosen_ids"), (i + len(rows), "rejected_ids")):
                ids = sequences["input_ids"][j][sequences["attention_mask"][j].bool()].tolist()
                assert ids == row["augmented_prompt_ids"] + row[side], name

        actual = []
        shapes = embedded_shapes(
            trainer, lambda batch=batch, actual=actual: actual.append(augmented_logps(trainer, batch))
        )
        with torch.no_grad():
            torch.testing.assert_close(
                actual[0].double(),
                response_logps(policy, sequences),
                atol=1e-4,
                rtol=1e-5,
                msg=f"{name}: {{}}".format,
            )
        pairs, length = batch["augmented_prompt_ids"].shape
        prefix, responses = batch["augmented_prefix_ids"].size(1), batch["completion_ids"].size(1)
        expected = [(1, prefix), (pairs, length), (2 * pairs, responses - 1)]
        if architecture == "mistral-window":
            expected[:2] = [(pairs, prefix + length)]
        assert shapes == [shape for shape in expected if shape[1] > 0], name


def test_positions_of_a_step(make_trainer):
    """
    One step of eight pairs embeds the plain sequences, as DPO does, and of the augmented ones the common start once, each
    prompt's rest once and each response once: less than a third of what whole sequences would be.
    """
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, per_device_train_batch_size=8)
    batch = first_batch(trainer)
    shapes = embedded_shapes(trainer, lambda: train_step(trainer, batch))
    plain = tuple(batch["input_ids"].shape)
    assert sorted(shapes)[-1] == plain
    shapes.remove(plain)
    augmented = sum(rows * length for rows, length in shapes)
    assert augmented < augmented_sequences(batch)["input_ids"].numel() / 3


def test_collator_by_hand():
    """Two pairs, by hand: the common start once, prompts padded on the left, responses cut where the plain ones are."""
    rows = [
        {
            "prompt_ids": [1, 2],
            "augmented_prompt_ids": [9, 9, 1, 2],
            "chosen_ids": [3, 4, 5],
            "rejected_ids": [6],
            "ref_chosen_logps": -1.0,
            "ref_rejected_logps": -2.0,
            "ref_augmented_chosen_logps": -3.0,
            "ref_augmented_rejected_logps": -4.0,
        },
        {
            "prompt_ids": [7],
            "augmented_prompt_ids": [9, 9, 7],
            "chosen_ids": [8],
            "rejected_ids": [3, 3],
            "ref_chosen_logps": -5.0,
            "ref_rejected_logps": -6.0,
            "ref_augmented_chosen_logps": -7.0,
            "ref_augmented_rejected_logps": -8.0,
        },
    ]
    batch = DataCollatorForSelfRefinement(pad_token_id=0, max_length=4)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [7, 8, 0, 0], [1, 2, 6, 0], [7, 3, 3, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]],
        "ref_chosen_logps": [-1.0, -5.0],
        "ref_rejected_logps": [-2.0, -6.0],
        "augmented_prefix_ids": [[9, 9]],
        "augmented_prompt_ids": [[1, 2], [0, 7]],
        "augmented_prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[3, 4], [8, 0], [6, 0], [3, 3]],
        "completion_attention_mask": [[1, 1], [1, 0], [1, 0], [1, 1]],
        "ref_augmented_chosen_logps": [-3.0, -7.0],
        "ref_augmented_rejected_logps": [-4.0, -8.0],
    }


# No gradient through the augmented forward, and no trace of it


@pytest.mark.parametrize(
    "checkpointing",
    [None, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["", "checkpointing", "reentrant"],
)
@pytest.mark.parametrize("trainer_class", [SelfRefineDPOTrainer, WholeSequenceTrainer], ids=["shared", "whole"])
def test_no_gradient_through_the_augmented_forward(make_trainer, trainer_class, checkpointing):
    """
    The words that only the refinement prompt has are seen by the augmented forward alone: their embeddings move Delta and
    get a gradient of exactly 0. And nothing of that forward is kept for a backward.
    """
    trainer = make_trainer(
        trainer_class,
        SelfRefineDPOConfig,
        refinement_weight=1.0,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    embedding = trainer.model.get_input_embeddings()
    plain = set(batch["input_ids"].unique().tolist())
    probe = sorted(set(augmented_sequences(batch)["input_ids"].unique().tolist()) - plain)
    assert trainer.processing_class.convert_tokens_to_ids("usefulness") in probe

    graphs = []
    handle = embedding.register_forward_hook(
        lambda module, args, output: graphs.append((set(args[0].unique().tolist()) <= plain, output.requires_grad))
    )
    loss = train_step(trainer, batch)
    handle.remove()
    assert all(has_graph == (args_are_plain and has_graph) for args_are_plain, has_graph in graphs)
    assert sum(has_graph for _, has_graph in graphs) == 1  # the plain forward
    assert not embedding.weight.grad[probe].any()
    assert embedding.weight.grad.any()
    assert not any(x.requires_grad for x in trainer._augmented_logratios)

    embedding.weight.data[probe] += 0.5
    assert abs(train_step(trainer, batch).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("trainer_class", [SelfRefineDPOTrainer, WholeSequenceTrainer], ids=["shared", "whole"])
@pytest.mark.parametrize("variant", [None, "tdpo2"])
def test_a_step_leaves_the_model_as_it_was(make_trainer, variant, trainer_class):
    """Training mode, dropout, checkpointing, the active adapter and what is trained: the same before and after a step."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = make_trainer(
        trainer_class,
        SelfRefineDPOConfig,
        variant=variant,
        gradient_checkpointing=True,
        disable_dropout=False,
        trainer={"peft_config": peft_config},
    )

    def state():
        model = trainer.model
        modules = list(model.named_modules())
        return {
            "training": {name: module.training for name, module in modules},
            "dropout": {name: module.p for name, module in modules if isinstance(module, torch.nn.Dropout)},
            "checkpointing": {
                name: module.gradient_checkpointing
                for name, module in modules
                if isinstance(module, GradientCheckpointingLayer)
            },
            "active": model.active_adapters,
            "disabled": [module.disable_adapters for _, module in modules if "_disable_adapters" in vars(module)],
            "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        }

    batch = first_batch(trainer)
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    before = state()
    assert 0.1 in before["dropout"].values()
    assert len(before["checkpointing"]) == 2
    assert all(before["checkpointing"].values())
    assert all(before["training"].values())
    assert before["trained"]
    trainer.compute_loss(trainer.model, batch).backward()
    assert state() == before
    assert trainer.model.is_gradient_checkpointing
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


# The augmented prompt


def check_augmented_batch(trainer, batch: dict, inserted: str) -> None:
    """The same completion tokens after both prompts; the augmented prompt is the plain one with `inserted` put in."""
    inserted_ids = trainer.processing_class(inserted, add_special_tokens=False)["input_ids"]
    sequences = augmented_sequences(batch)
    for row in range(len(batch["input_ids"])):
        (plain, completion), (augmented, augmented_completion) = (split(x, row) for x in (batch, sequences))
        assert len(completion) > 0
        assert augmented_completion == completion
        assert is_sublist(inserted_ids, augmented)
        start = next(i for i in range(len(augmented)) if augmented[i : i + len(inserted_ids)] == inserted_ids)
        assert augmented[:start] + augmented[start + len(inserted_ids) :] == plain


def split(batch: dict, row: int) -> tuple[list[int], list[int]]:
    """A row's prompt and completion, without padding."""
    ids, attention_mask, completion_mask = (
        batch[name][row] for name in ("input_ids", "attention_mask", "completion_mask")
    )
    prompt = attention_mask.bool() & ~completion_mask.bool()
    return ids[prompt].tolist(), ids[completion_mask.bool()].tolist()


def augmented_text(trainer, batch: dict) -> str:
    """The first row's augmented sequence."""
    return trainer.processing_class.decode(augmented_sequences(batch)["input_ids"][0])


def test_default_prompt_is_the_papers(tmp_path):
    config = SelfRefineDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.refinement_prompt == PAPERS_PROMPT
    assert (config.refinement_prompt_role, config.refinement_weight, config.beta) == ("user", 0.3, 0.1)
    assert config.ipo_length_normalization is True
    assert (config.variant, config.alpha) == (None, 0.5)


@pytest.mark.parametrize("max_length", [1024, 20, 12, 10], ids=str)
def test_augmented_prompt_of_messages(make_trainer, max_length):
    """`p + x` in the first user message. Truncation follows the plain sample, so both keep the same completion."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, max_length=max_length)
    batch = first_batch(trainer)
    assert batch["input_ids"].size(1) <= max_length
    assert (batch["input_ids"].size(1) == max_length) == (max_length < 1024)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


@pytest.mark.parametrize("max_length", [1024, 9], ids=str)
def test_augmented_prompt_of_plain_text(make_trainer, plain_text_pairs, max_length):
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=plain_text_pairs, max_length=max_length)
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)
    assert augmented_text(trainer, batch).startswith("Please generate")


@pytest.mark.parametrize("data", ["messages", "text"])
def test_empty_refinement_prompt(make_trainer, conversational_pairs, plain_text_pairs, data):
    """With p empty the augmented sequences are the plain ones, and Delta is DPO's margin."""
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=conversational_pairs if data == "messages" else plain_text_pairs,
        refinement_prompt="",
    )
    batch = first_batch(trainer)
    sequences = augmented_sequences(batch)
    assert all(torch.equal(sequences[name], batch[name]) for name in sequences)
    perturb(trainer.model)
    train_step(trainer, batch)
    metrics = step_metrics(trainer)
    assert metrics["refinement/margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-5)


def test_augmented_prompt_of_an_implicit_prompt(make_trainer, conversational_pairs):
    """A dataset without a `prompt` column: TRL extracts the common start, and p goes into its first user message."""
    dataset = conversational_pairs.map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=dataset)
    check_augmented_batch(trainer, first_batch(trainer), PAPERS_PROMPT)


def test_augmented_prompt_in_the_first_of_several_turns(make_trainer):
    messages = [
        {"role": "system", "content": "You are brief"},
        {"role": "user", "content": "what runs ?"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "why ?"},
    ]
    dataset = Dataset.from_list(
        [
            {
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": "because"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
        ]
        * 4
    )
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=dataset, refinement_prompt="Be useful .")
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, "Be useful .")
    start = "<system> You are brief </s> <user> Be useful . what runs ? </s> <assistant> the cat </s>"
    assert augmented_text(trainer, batch).startswith(start)


@pytest.mark.parametrize("with_system", [False, True], ids=["", "with-system"])
def test_augmented_prompt_as_the_system_message(make_trainer, conversational_pairs, with_system):
    """`refinement_prompt_role="system"`: p goes before the system message, or becomes it."""
    system = [{"role": "system", "content": "You are brief"}] if with_system else []
    dataset = conversational_pairs.map(lambda row: {"prompt": system + row["prompt"]})
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=dataset,
        refinement_prompt="Be useful .",
        refinement_prompt_role="system",
        max_length=16,
    )
    batch = first_batch(trainer)
    inserted = "Be useful ." if with_system else "<system> Be useful . </s>"
    check_augmented_batch(trainer, batch, inserted)
    start = "<system> Be useful . You are brief </s> <user>" if with_system else "<system> Be useful . </s> <user>"
    assert augmented_text(trainer, batch).startswith(start)


@pytest.mark.parametrize("as_json", [False, True], ids=["list", "json"])
def test_augmented_prompt_with_tools(make_trainer, conversational_pairs, as_json):
    """Tools are rendered into both prompts; like TRL, from a list or from its JSON text."""
    tools = [{"type": "function", "function": {"name": "light"}}]
    rows = [row | {"tools": json.dumps(tools) if as_json else tools} for row in conversational_pairs]
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=Dataset.from_list(rows))
    batch = first_batch(trainer)
    assert trainer.processing_class.decode(batch["input_ids"][0]).startswith("<tool> light <user> what")
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


MESSAGES = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
WITHOUT_SYSTEM = "{% if messages[0]['role'] != 'system' %}"
# Chat templates that render more than the messages
TEMPLATES = {
    "default-system": WITHOUT_SYSTEM + "<system> You are brief </s> {% endif %}" + CHAT_TEMPLATE,
    # A thought before each answer, unless the system message says how to answer; the same before and in a response
    "thoughts": (
        "{% for message in messages %}<{{ message['role'] }}> "
        "{% if message['role'] == 'assistant' %}" + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
        "{{ message['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> " + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
    ),
    # In the prompt only, so that DPOTrainer leaves it out
    "prompt-only": MESSAGES + "{% if add_generation_prompt %}<assistant> long {% endif %}",
    "prompt-only-without-system": (
        MESSAGES + "{% if add_generation_prompt %}<assistant> " + WITHOUT_SYSTEM + "long {% endif %}{% endif %}"
    ),
    "prompt-only-with-system": (
        MESSAGES + "{% if add_generation_prompt %}<assistant> "
        "{% if messages[0]['role'] == 'system' %}long {% endif %}{% endif %}"
    ),
}


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_augmented_prompt_under_other_templates(make_trainer, conversational_pairs, template, role):
    """
    Oracle: `DPOTrainer` on a dataset whose prompts are augmented. Its prompt tokens are ours; the completion tokens are
    those of the plain prompts.
    """
    rows = [row | {"chat_template_kwargs": {"chat_template": TEMPLATES[template]}} for row in conversational_pairs]
    ours = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        dataset=Dataset.from_list(rows),
        refinement_prompt="Be useful .",
        refinement_prompt_role=role,
    )
    augmented = [row | {"prompt": augment_prompt(row["prompt"], "Be useful .", role)} for row in rows]
    plain, stock = (
        make_trainer(DPOTrainer, DPOConfig, dataset=Dataset.from_list(data)).train_dataset
        for data in (rows, augmented)
    )
    decode = ours.processing_class.batch_decode
    assert decode(ours.train_dataset["augmented_prompt_ids"][:]) == decode(stock["prompt_ids"][:])
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours.train_dataset[name][:] == plain[name][:]
    batch = first_batch(ours)
    sequences = augmented_sequences(batch)
    for row in range(8):
        assert split(sequences, row)[1] == split(batch, row)[1]


@pytest.mark.parametrize(("role", "content"), [("user", [{"type": "text", "text": "why ?"}]), ("assistant", "no")])
def test_prompt_without_a_user_text_is_refused(role, content):
    with pytest.raises(ValueError, match="refinement prompt"):
        augment_prompt([{"role": role, "content": content}], "Be useful .")


def test_augment_prompt_leaves_the_rows_as_they_are():
    messages = [{"role": "user", "content": "why ?"}]
    assert augment_prompt(messages, "Be useful .")[0]["content"] == "Be useful . why ?"
    assert messages == [{"role": "user", "content": "why ?"}]


@pytest.mark.parametrize(("max_length", "dropped"), [(1024, 0), (9, 4), (8, 7)], ids=str)
def test_dropped_rows_are_counted(make_trainer, conversational_pairs, caplog, max_length, dropped):
    """Prompts of 6, 8, 8, 8 and four times 9 tokens; those that fill `max_length` alone are dropped, in training and evaluation data alike."""
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        max_length=max_length,
        trainer={"eval_dataset": {"other": conversational_pairs}},
    )
    assert len(trainer.train_dataset) == len(trainer.eval_dataset["other"]) == 8 - dropped
    messages = [record.getMessage() for record in caplog.records if "were dropped" in record.getMessage()]
    expected = [f"{dropped} of 8 rows of the {name} dataset were dropped" for name in ("train", "other")]
    assert [message.split(":")[0].removeprefix("[RANK 0] ") for message in messages] == (expected if dropped else [])
    check_augmented_batch(trainer, trainer.data_collator(list(trainer.train_dataset)), PAPERS_PROMPT)


def test_dropping_all_rows_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_length=6"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, max_length=6)


def test_streaming_dataset(make_trainer, conversational_pairs):
    """An `IterableDataset` gives the batches of the same rows in memory."""
    in_memory = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig)
    streaming = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=conversational_pairs.to_iterable_dataset(), max_steps=1
    )
    rows = list(streaming.train_dataset)
    assert [row["augmented_prompt_ids"] for row in rows] == in_memory.train_dataset["augmented_prompt_ids"][:]
    streaming.train()
    assert streaming.state.log_history[0]["loss"] == LN_2


# Options


def test_plain_dpo_config_is_accepted(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits, Sr-DPO with lambda 0.3 and the paper's prompt."""
    trainer = make_trainer(SelfRefineDPOTrainer, DPOConfig)
    perturb(trainer.model)
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sync_ref_model_is_honoured(make_trainer):
    """Limit: a reference that becomes the policy after every step gives ln 2 and Delta 0 at every step."""
    trainer = make_trainer(
        RecordingTrainer,
        SelfRefineDPOConfig,
        learning_rate=1e-2,
        max_steps=3,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    trainer.train()
    assert trainer.losses == [LN_2] * 3
    assert [log["refinement/margin"] for log in trainer.state.log_history[:3]] == [0.0] * 3


def test_pad_to_multiple_of_is_honoured(make_trainer):
    """Limit: padding changes no number."""
    losses = []
    for pad_to_multiple_of in (None, 16):
        trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, pad_to_multiple_of=pad_to_multiple_of)
        perturb(trainer.model)
        batch = first_batch(trainer)
        losses.append(train_step(trainer, batch).item())
    padded = ("input_ids", "augmented_prompt_ids", "completion_ids")
    assert all(batch[name].size(1) % 16 == 0 for name in padded)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [("refinement_weight", -0.1), ("refinement_prompt_role", "assistant"), ("variant", "tdpo3"), ("alpha", -0.1)],
)
def test_config_refuses_bad_values(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        SelfRefineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{option: value})


def test_every_dpo_option_is_accounted_for():
    """The three tables above are `DPOConfig`'s own fields, each once."""
    own = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    tables = [*HONOURED, *REFUSED, *WITHOUT_EFFECT]
    assert set(tables) == own
    assert len(tables) == len(set(tables))


REFUSED_CASES = [
    *((option, {option: value}) for option, value in REFUSED.items()),
    # Where no loss reads it
    *(
        ("label_smoothing", {"label_smoothing": 0.1, "loss_type": loss_type})
        for loss_type in ("sigmoid", "ipo", "hinge", "discopop", "sigmoid_norm", ["sigmoid", "sft"])
    ),
]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("config_class", [SelfRefineDPOConfig, DPOConfig])
@pytest.mark.parametrize(("option", "options"), REFUSED_CASES, ids=str)
def test_refused_option(make_trainer, option, options, config_class):
    """The error names the option, and comes before the model is loaded: the path leads nowhere."""
    with pytest.raises(ValueError, match=f"`{option}="):
        make_trainer(SelfRefineDPOTrainer, config_class, model="/no/such/model", **options)


@pytest.mark.parametrize("loss_type", [*([other] for other in OTHER_LOSS_TYPES), ["sft"], ["ipo", "aot"]], ids=str)
def test_refused_loss_type(make_trainer, loss_type):
    with pytest.raises(ValueError, match="loss_type"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model="/no/such/model", loss_type=loss_type)


def test_exo_needs_label_smoothing(make_trainer):
    """As in DPOTrainer: without it EXO's loss is infinite."""
    with pytest.raises(ValueError, match="[Ll]abel smoothing"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, loss_type="exo_pair")


def test_system_role_needs_messages(make_trainer, plain_text_pairs):
    with pytest.raises(ValueError, match="refinement_prompt_role"):
        make_trainer(
            SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=plain_text_pairs, refinement_prompt_role="system"
        )


def test_collator_without_the_augmented_prompt_is_refused(make_trainer):
    """TRL's own collator would drop `augmented_prompt_ids`, and with it Delta: an error, not DPO."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig)
    batch = {key: value for key, value in first_batch(trainer).items() if not key.startswith("augmented_")}
    with pytest.raises(ValueError, match="augmented_"):
        train_step(trainer, batch)
