"""
`TDPOTrainer` on a tiny Llama, against the float64 transcription of the paper from full logits
(`tests/oracles/tdpo.py`) and, where the two must coincide, against `trl.DPOTrainer`.
"""

import math
from dataclasses import fields

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tests.conftest import (
    FullLogits,
    assert_gradients_close,
    first_batch,
    labels_and_mask,
    make_conversational_pairs,
    perturb,
    step_metrics,
    train_step,
)
from tests.oracles import tdpo as oracle
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer


VARIANTS = ["tdpo1", "tdpo2"]
LN_2 = torch.tensor(2.0).log().item()  # in fp32, as the loss

# What the trainer does with each option that DPOConfig adds to TrainingArguments. A field that is new in TRL fails
# `test_every_dpo_option_is_accounted_for` until it is put in one of these.
HONOURED = {
    "activation_offloading",
    "beta",
    "dataset_num_proc",
    "disable_dropout",
    "loss_type",  # "sigmoid" and "sft"; others are refused, see OTHER_LOSS_TYPES
    "loss_weights",
    "max_length",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",  # disabled with a warning in TRL 1.16, for every preference trainer
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "router_aux_loss_coef",
    "sync_ref_model",
    "truncation_mode",
    "trust_remote_code",
}
REFUSED = {
    "f_divergence_type": "js_divergence",
    "label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "precompute_ref_log_probs": True,
    "use_weighting": True,
}
# Read only together with a refused option
WITHOUT_EFFECT = {
    "discopop_tau": "loss_type",
    "f_alpha_divergence_coef": "f_divergence_type",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
}
OTHER_LOSS_TYPES = [
    *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
    *("apo_down", "discopop", "sigmoid_norm"),
]


class RecordingTDPOTrainer(TDPOTrainer):
    """Keeps the loss and the batch of each training step, as the training loop (with its autocast) computes it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def paper_losses(policy: FullLogits, ref: FullLogits, batch: dict, **loss_kwargs) -> torch.Tensor:
    """TDPO's losses, `(B,)`, of a collated batch."""
    labels, mask = labels_and_mask(batch)
    return oracle.tdpo_loss_from_logits(policy(batch), ref(batch), labels, mask, **loss_kwargs)


# Against the paper


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_match_the_paper(make_trainer, tiny_model_dir, variant, gradient_checkpointing):
    """Oracle: float64 full logits of the same weights, on a collated batch; every parameter's gradient."""
    trainer = make_trainer(
        TDPOTrainer,
        TDPOConfig,
        variant=variant,
        alpha=0.7,
        beta=0.3,
        gradient_checkpointing=gradient_checkpointing,
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    assert len(set(batch["completion_mask"].sum(dim=1).tolist())) > 3  # ragged

    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.3, alpha=0.7, variant=variant).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_match_the_paper(make_trainer, tiny_model_dir, variant):
    """Oracle: float64 full logits. `position_kl/*` are sequence sums in nats, `rewards_tdpo/*` the paper's rewards."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, variant=variant, beta=0.3)
    perturb(trainer.model)
    batch = first_batch(trainer)
    train_step(trainer, batch)

    labels, mask = labels_and_mask(batch)
    policy_logits = FullLogits(tiny_model_dir, trainer.model.state_dict())(batch).detach()
    ref_logits = FullLogits(tiny_model_dir)(batch).detach()
    chosen_kl, rejected_kl = oracle.sequence_kl(policy_logits, ref_logits, mask).chunk(2)
    chosen_rewards, rejected_rewards = oracle.tdpo_rewards_from_logits(
        policy_logits, ref_logits, labels, mask, beta=0.3
    )
    chosen_logratios, rejected_logratios = oracle.logratio(policy_logits, ref_logits, labels, mask).chunk(2)
    expected = {
        "position_kl/chosen": chosen_kl,
        "position_kl/rejected": rejected_kl,
        "position_kl/margin": chosen_kl - rejected_kl,
        "rewards_tdpo/chosen": chosen_rewards,
        "rewards_tdpo/rejected": rejected_rewards,
        "rewards/chosen": 0.3 * chosen_logratios,
        "rewards/rejected": 0.3 * rejected_logratios,
        "rewards/margins": 0.3 * (chosen_logratios - rejected_logratios),
        "rewards/accuracies": (chosen_logratios > rejected_logratios).double(),
    }
    metrics = step_metrics(trainer)
    assert {name: metrics[name] for name in expected} == {
        name: pytest.approx(values.mean().item(), rel=1e-4, abs=1e-6) for name, values in expected.items()
    }


@pytest.mark.parametrize("loss_weights", [None, [0.7, 0.2]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sft_term(make_trainer, tiny_model_dir, variant, loss_weights):
    """Oracle: the weighted sum of TDPO and TRL's SFT term, the mean over all chosen tokens of the batch."""
    trainer = make_trainer(
        TDPOTrainer, TDPOConfig, variant=variant, loss_type=["sigmoid", "sft"], loss_weights=loss_weights
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    tdpo = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.1, alpha=0.5, variant=variant).mean()
    sft = oracle.sft_loss_from_logits(policy(batch), *labels_and_mask(batch))
    weight_tdpo, weight_sft = loss_weights or (1.0, 1.0)
    expected = weight_tdpo * tdpo + weight_sft * sft
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut_rows", [[0, 5], list(range(8))], ids=["some", "all"])
def test_completions_that_were_cut_away(make_trainer, tiny_model_dir, variant, cut_rows):
    """
    Oracle: float64 full logits. A row without completion tokens sums to 0; with all rows cut, the loss is ln 2 and every
    gradient 0, rather than an error in the backward.
    """
    trainer = make_trainer(TDPOTrainer, TDPOConfig, variant=variant)
    perturb(trainer.model)
    batch = first_batch(trainer)
    batch["completion_mask"][cut_rows] = 0
    loss = train_step(trainer, batch)

    if len(cut_rows) == 8:
        assert loss.item() == LN_2
        assert not any(parameter.grad.any() for parameter in trainer.model.parameters())
        return
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.1, alpha=0.5, variant=variant).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_evaluation_matches_the_paper(make_trainer, tiny_model_dir, conversational_pairs):
    """Oracle: float64 full logits, averaged over two batches of four; what is logged has the prefix `eval_`."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"eval_dataset": conversational_pairs})
    perturb(trainer.model)
    results = trainer.evaluate()

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    losses, kls = [], []
    for batch in trainer.get_eval_dataloader():
        losses += paper_losses(policy, ref, batch, beta=0.1, alpha=0.5, variant="tdpo2").tolist()
        kls += oracle.sequence_kl(policy(batch), ref(batch), labels_and_mask(batch)[1]).chunk(2)[0].tolist()
    assert len(losses) == 8
    assert results["eval_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert results["eval_position_kl/chosen"] == pytest.approx(sum(kls) / 8, rel=1e-4)


def test_logits_are_recomputed_for_compute_metrics(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits. `return_outputs=True` gives them, with the deprecation warning of TRL."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig)
    batch = first_batch(trainer)
    with pytest.warns(FutureWarning, match="return_outputs"):
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    real = batch["attention_mask"][:, :-1].bool()
    torch.testing.assert_close(
        outputs.logits[:, :-1][real].double(), FullLogits(tiny_model_dir)(batch)[real], atol=1e-4, rtol=1e-4
    )


# Limits


def test_alpha_zero_is_dpo(make_trainer):
    """Limit: TDPO2 with alpha 0 gives `trl.DPOTrainer`'s loss, gradients and metrics on the same batch."""
    trainers = [make_trainer(TDPOTrainer, TDPOConfig, alpha=0.0), make_trainer(DPOTrainer, DPOConfig)]
    losses = []
    for trainer in trainers:
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in trainers[1].model.named_parameters()}
    assert_gradients_close(trainers[0].model, stock_gradients, tolerance=1e-5)
    metrics, stock_metrics = (step_metrics(trainer) for trainer in trainers)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-5, abs=1e-6)


def test_alpha_zero_is_dpo_with_experts(make_trainer, tiny_moe_dir):
    """Limit: the same on a Mixtral, whose load-balancing loss is added with `router_aux_loss_coef`."""
    trainers = [
        make_trainer(cls, config_cls, model=str(tiny_moe_dir), router_aux_loss_coef=0.5, **options)
        for cls, config_cls, options in [(TDPOTrainer, TDPOConfig, {"alpha": 0.0}), (DPOTrainer, DPOConfig, {})]
    ]
    losses = []
    for trainer in trainers:
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
    assert losses[1] > 1  # ln 2 and half of an auxiliary loss of at least 1
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in trainers[1].model.named_parameters()}
    assert_gradients_close(trainers[0].model, stock_gradients, tolerance=1e-4)
    metrics, stock_metrics = (step_metrics(trainer) for trainer in trainers)
    assert metrics["aux_loss"] == pytest.approx(stock_metrics["aux_loss"], rel=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_equal_to_reference_is_ln_2(make_trainer, lora_config, variant, bf16, adapter):
    """Limit: at the start the loss is exactly ln 2 and every KL exactly 0, in the training loop, under autocast too."""
    trainer = make_trainer(
        RecordingTDPOTrainer,
        TDPOConfig,
        variant=variant,
        bf16=bf16,
        max_steps=1,
        trainer={"peft_config": lora_config} if adapter else None,
    )
    trainer.train()
    assert trainer.losses == [LN_2]
    log = trainer.state.log_history[0]
    assert {name: log[name] for name in log if name.startswith(("position_kl/", "rewards"))} == {
        "position_kl/chosen": 0.0,
        "position_kl/rejected": 0.0,
        "position_kl/margin": 0.0,
        "rewards_tdpo/chosen": 0.0,
        "rewards_tdpo/rejected": 0.0,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.0,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.0,
    }
    assert log["grad_norm"] > 0


def test_sync_ref_model_is_honoured(make_trainer):
    """
    Limit: a reference that becomes the policy after every step (mix-up 1) gives ln 2 at every step, although the policy
    moves.
    """
    trainer = make_trainer(
        RecordingTDPOTrainer,
        TDPOConfig,
        learning_rate=1e-2,
        max_steps=3,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.losses == [LN_2] * 3
    assert (trainer.model.lm_head.weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reduces_the_loss(make_trainer, variant):
    """Eight pairs seen in full at each step: a few steps lower the loss, raise the margin and move the policy away."""
    trainer = make_trainer(
        RecordingTDPOTrainer,
        TDPOConfig,
        variant=variant,
        learning_rate=5e-3,
        max_steps=6,
        per_device_train_batch_size=8,
        seed=0,
    )
    trainer.train()
    assert trainer.losses[0] == LN_2
    assert all(after < before for before, after in zip(trainer.losses, trainer.losses[1:], strict=False))
    last = trainer.state.log_history[5]
    assert last["rewards/margins"] > 0
    assert last["position_kl/chosen"] > 0
    assert last["position_kl/rejected"] > 0


# Which model is the reference


def test_new_lora_adapter(make_trainer, tiny_model_dir, lora_config):
    """Oracle: float64 full logits with the adapter, and without it for the reference; only the adapter learns."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"peft_config": lora_config})
    assert trainer.ref_model is None
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.1, alpha=0.5, variant="tdpo2").mean()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_existing_adapter_is_its_own_reference(make_trainer, tiny_model_dir, lora_config):
    """
    Oracle: float64 full logits. A `PeftModel` that was trained before is compared with itself at the start, the "ref"
    adapter, not with its base model.
    """
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), lora_config)
    perturb(model, scale=0.2, seed=2)
    trainer = make_trainer(TDPOTrainer, TDPOConfig, model=model)
    batch = first_batch(trainer)
    assert train_step(trainer, batch).item() == LN_2

    perturb(trainer.model, scale=0.2)
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    ref = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config, adapter="ref")
    options = {"beta": 0.1, "alpha": 0.5, "variant": "tdpo2"}
    expected = paper_losses(policy, ref, batch, **options).mean()
    expected.backward()
    against_base = paper_losses(policy, FullLogits(tiny_model_dir), batch, **options).mean()
    assert abs(expected.item() - against_base.item()) > 1e-3  # the two references can be told apart
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_trained_head_beside_an_adapter(make_trainer, tiny_model_dir, lora_config):
    """
    Oracle: float64 full logits. With `modules_to_save=["lm_head"]` the policy's head is a trained copy, and the
    reference's is the original.
    """
    lora_config.modules_to_save = ["lm_head"]
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"peft_config": lora_config})
    batch = first_batch(trainer)
    assert train_step(trainer, batch).item() == LN_2
    perturb(trainer.model)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.1, alpha=0.5, variant="tdpo2").mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_given_reference_model(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits. A `ref_model` other than the policy's start is used as it is, and does not learn."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    weights = {name: weight.clone() for name, weight in ref_model.state_dict().items()}
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"ref_model": ref_model})
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    expected = paper_losses(
        policy, FullLogits(tiny_model_dir, weights), batch, beta=0.1, alpha=0.5, variant="tdpo2"
    ).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())
    assert all(parameter.grad is None for parameter in ref_model.parameters())


# Options


def test_plain_dpo_config_trains_tdpo_with_the_papers_defaults(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits, TDPO2 with alpha 0.5 and beta 0.1."""
    trainer = make_trainer(TDPOTrainer, DPOConfig)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    expected = paper_losses(policy, FullLogits(tiny_model_dir), batch, beta=0.1, alpha=0.5, variant="tdpo2").mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_config_defaults_are_the_papers(tmp_path):
    """PAPERS.md §1: TDPO2, alpha 0.5, beta 0.1."""
    config = TDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (config.variant, config.alpha, config.beta, config.loss_type) == ("tdpo2", 0.5, 0.1, ["sigmoid"])


@pytest.mark.parametrize(("option", "value"), [("variant", "tdpo3"), ("alpha", -0.1)])
def test_config_refuses_bad_values(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        TDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{option: value})


def test_every_dpo_option_is_accounted_for():
    """The three tables above are `DPOConfig`'s own fields, each once."""
    own = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    tables = [*HONOURED, *REFUSED, *WITHOUT_EFFECT]
    assert set(tables) == own
    assert len(tables) == len(set(tables))


@pytest.mark.parametrize("config_class", [TDPOConfig, DPOConfig])
@pytest.mark.parametrize("option", REFUSED)
def test_refused_option(make_trainer, option, config_class):
    """The error names the option, and comes before the model is loaded: the path leads nowhere."""
    with pytest.raises(ValueError, match=option):
        make_trainer(TDPOTrainer, config_class, model="/no/such/model", **{option: REFUSED[option]})


@pytest.mark.parametrize("loss_type", [*([other] for other in OTHER_LOSS_TYPES), ["sft"], ["sigmoid", "ipo"]], ids=str)
def test_refused_loss_type(make_trainer, loss_type):
    with pytest.raises(ValueError, match="loss_type"):
        make_trainer(TDPOTrainer, TDPOConfig, model="/no/such/model", loss_type=loss_type)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_prompt_learning_is_refused(make_trainer, tiny_model_dir, wrapped):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="[Pp]rompt-learning"):
        if wrapped:
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), peft_config)
            make_trainer(TDPOTrainer, TDPOConfig, model=model)
        else:
            make_trainer(TDPOTrainer, TDPOConfig, model="/no/such/model", trainer={"peft_config": peft_config})


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(TDPOTrainer, TDPOConfig), (SelfRefineDPOTrainer, SelfRefineDPOConfig)]
)
def test_an_adapter_that_was_loaded_frozen(
    make_trainer, tiny_model_dir, lora_config, tmp_path, trainer_class, config_class
):
    """
    PEFT freezes what it loads: no parameter would be in the optimizer, and the loss would stay at ln 2. Such a model is evaluated, and its
    training refused; with `is_trainable=True` the adapter moves.
    """

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def trainer(**loading):
        model = PeftModel.from_pretrained(base(), tmp_path / "adapter", **loading)
        evaluation = {"eval_dataset": conversational_pairs.select(range(4))}
        return make_trainer(trainer_class, config_class, model=model, max_steps=1, trainer=evaluation)

    conversational_pairs = make_conversational_pairs()
    get_peft_model(base(), lora_config).save_pretrained(tmp_path / "adapter")
    assert trainer().evaluate()["eval_loss"] == pytest.approx(LN_2)
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(..., is_trainable=True\)"):
        trainer().train()
    trained = trainer(is_trainable=True)
    before = {name: p.clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    trained.train()
    assert any(not torch.equal(p, before[name]) for name, p in trained.model.named_parameters() if name in before)


def test_reference_with_another_vocabulary_is_refused(make_trainer, tiny_model_dir):
    """A KL between distributions over different vocabularies is not defined, and must not be a broadcast."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ref_model.resize_token_embeddings(ref_model.config.vocab_size + 3)
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"ref_model": ref_model})
    with pytest.raises(ValueError, match="vocabular"):
        train_step(trainer, first_batch(trainer))


def test_ln_2_in_fp32():
    """The constant of this file: fp32's nearest number to ln 2."""
    assert LN_2 == pytest.approx(math.log(2), rel=1e-7)
