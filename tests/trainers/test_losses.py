"""
Every method with every loss of TRL that it takes, on a tiny Llama, against the papers' equations in float64 from full logits
(`tests/trainers/methods.py`): loss, every parameter's gradient, and the metrics. And the limits in which the methods are `trl.DPOTrainer`.
"""

import pytest
import torch
from tests.conftest import FullLogits, assert_gradients_close, first_batch, perturb, step_metrics, train_step
from tests.trainers.methods import LIMITS, LN_2, METHODS, TDPO1, TRAINERS, Method, Paper
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, ShiftedDPOTrainer
from trl_ext.trainers.tdpo_trainer import LOSS_TYPES


# Each loss of TRL with the options that it reads
LOSSES = {name: {"loss_type": name} for name in LOSS_TYPES} | {
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.3},
}
# Several at once: sums beside means, a term that is not of pairs, one that sorts
LISTS = {
    "sft": {"loss_type": ["sigmoid", "sft"]},
    "sft weighted": {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.2, 0.7]},
    "sums and means": {"loss_type": ["ipo", "sigmoid", "sigmoid_norm", "sft"], "loss_weights": [0.5, 1.0, 2.0, 0.1]},
    "smoothed": {"loss_type": ["exo_pair", "hinge", "aot"], "label_smoothing": 0.2},
}
PAPERS_IPO = {"loss_type": "ipo", "ipo_length_normalization": False}
# Shifts are added up whatever the loss: both at once take the losses of sums, of means, and several together
FEW = [LOSSES["sigmoid"], LOSSES["ipo"], LISTS["sums and means"]]
CASES = [
    *((method, options) for method in ("tdpo1", "tdpo2", "sr") for options in (*LOSSES.values(), *LISTS.values())),
    *((method, options) for method in ("sr-tdpo1", "sr-tdpo2") for options in FEW),
    *((method, PAPERS_IPO) for method in METHODS if METHODS[method].refines),
]


def case_id(value) -> str:
    if isinstance(value, str):
        return value
    types = value["loss_type"] if isinstance(value["loss_type"], list) else [value["loss_type"]]
    return (
        "+".join(types) + ("-sums" if value is PAPERS_IPO else "") + ("-weighted" if "loss_weights" in value else "")
    )


@pytest.fixture
def make_step(make_trainer, tiny_model_dir):
    """
    Returns a function that makes a step of a method with moved weights, and what the papers say of it: the trainer, the loss and
    [`Paper`], whose policy has the trainer's weights.
    """

    def make(method: Method, batch=None, beta=0.3, peft_config=None, **options):
        trainer = make_trainer(
            method.trainer,
            method.config,
            beta=beta,
            trainer={"peft_config": peft_config},
            **{**method.options, **options},
        )
        perturb(trainer.model, scale=0.05 if peft_config is None else 0.2)
        batch = first_batch(trainer) if batch is None else batch(trainer)
        loss = train_step(trainer, batch)
        policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), peft_config)
        return trainer, loss, Paper(method, policy, FullLogits(tiny_model_dir), batch, beta)

    return make


@pytest.mark.parametrize(("method", "options"), CASES, ids=case_id)
def test_loss_gradients_and_metrics_match_the_papers(make_step, method, options):
    """The batch is ragged, either side the longer one, and the shift matters in it: without it the loss is another."""
    trainer, loss, paper = make_step(METHODS[method], **options)
    assert len(set(paper.lengths.flatten().tolist())) > 3
    expected = paper.loss(**options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    assert_gradients_close(trainer.model, paper.policy.gradients(), tolerance=2e-4)
    unshifted = Paper(Method(DPOTrainer, DPOConfig), paper.policy, paper.ref, paper.batch, paper.beta)
    assert abs(unshifted.loss(**options).item() - expected.item()) > 1e-4
    metrics, expected_metrics = step_metrics(trainer), paper.metrics()
    assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_through_an_adapter(make_step, lora_config, method):
    """Oracle as above, for LoRA, whose frozen head takes another path than a trained one; with `"sft"` beside the loss."""
    options = LISTS["sft weighted"]
    trainer, loss, paper = make_step(METHODS[method], peft_config=lora_config, **options)
    expected = paper.loss(**options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, paper.policy.gradients())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut_rows", [[0, 5], list(range(8))], ids=["some", "all"])
def test_completions_that_were_cut_away(make_step, method, cut_rows):
    """
    A row without completion tokens sums to 0; with all rows cut, TDPO's loss is ln 2 and every gradient 0, rather than an error in the
    backward.
    """

    def cut(trainer):
        batch = first_batch(trainer)
        batch["completion_mask"][cut_rows] = 0
        return batch

    trainer, loss, paper = make_step(METHODS[method], batch=cut)
    assert loss.item() == pytest.approx(paper.loss().item(), rel=1e-5)
    if len(cut_rows) == 8:
        assert METHODS[method].refines or loss.item() == LN_2
        assert not any(parameter.grad.any() for parameter in trainer.model.parameters())
    else:
        paper.loss().backward()
        assert_gradients_close(trainer.model, paper.policy.gradients())


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_matches_the_papers(make_trainer, tiny_model_dir, conversational_pairs, method):
    """Averages over two batches of four, with the prefix `eval_`; for a dataset given to `evaluate`, too."""
    method = METHODS[method]
    trainer = make_trainer(
        method.trainer, method.config, trainer={"eval_dataset": conversational_pairs}, **method.options
    )
    perturb(trainer.model)
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    papers = [Paper(method, policy, ref, batch) for batch in trainer.get_eval_dataloader()]
    batches = [paper.metrics() | {"loss": paper.loss().item()} for paper in papers]
    assert len(batches) == 2
    expected = {f"eval_{name}": sum(batch[name] for batch in batches) / 2 for name in batches[0]}
    for results in (trainer.evaluate(), trainer.evaluate(conversational_pairs)):
        assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


# Limits


def stepped(make_trainer, method: Method, **options) -> tuple:
    """A trainer with moved weights after a step, and its loss."""
    trainer = make_trainer(method.trainer, method.config, **{**options, **method.options})
    perturb(trainer.model)
    return trainer, train_step(trainer, first_batch(trainer))


@pytest.mark.parametrize(
    ("options", "adapter"),
    [*((options, False) for options in (*LOSSES.values(), *LISTS.values())), *((options, True) for options in FEW)],
    ids=lambda value: case_id(value) if isinstance(value, dict) else ("full", "lora")[value],
)
def test_lambda_zero_is_dpo_bit_for_bit(make_trainer, lora_config, options, adapter):
    """
    λ = 0 gives `trl.DPOTrainer`'s loss, gradients and metrics, every bit; so does the base class without a shift. The gradients of
    several losses are added up in another order, which is the last bit.
    """
    options = {"trainer": {"peft_config": lora_config if adapter else None}, **options}
    stock, stock_loss = stepped(make_trainer, Method(DPOTrainer, DPOConfig), **options)
    for method in (LIMITS["sr"], Method(ShiftedDPOTrainer, DPOConfig)):
        ours, loss = stepped(make_trainer, method, **options)
        torch.testing.assert_close(loss, stock_loss, rtol=0 if isinstance(options["loss_type"], str) else 1e-6, atol=0)
        stock_gradients = {name: p.grad for name, p in stock.model.named_parameters() if p.requires_grad}
        if isinstance(options["loss_type"], str):
            gradients = {name: p.grad for name, p in ours.model.named_parameters() if p.requires_grad}
            torch.testing.assert_close(gradients, stock_gradients, rtol=0, atol=0)
            assert all(gradient.any() for gradient in gradients.values())
        else:
            assert_gradients_close(ours.model, stock_gradients, tolerance=2e-6)
        metrics, stock_metrics = step_metrics(ours), step_metrics(stock)
        assert {name: metrics[name] for name in stock_metrics} == stock_metrics


@pytest.mark.parametrize("model", ["full", "lora", "experts"])
@pytest.mark.parametrize("options", [LOSSES["sigmoid"], LISTS["sums and means"]], ids=case_id)
@pytest.mark.parametrize("limit", ["alpha 0", "vanishing lambda"])
def test_the_limit_is_dpo_with_this_packages_head(make_trainer, tiny_moe_dir, lora_config, limit, options, model):
    """
    α = 0, and λ = 1e-9, for which the log-probabilities come from this package's head: DPO to rounding, loss, gradients and metrics, the
    auxiliary loss of experts among them, which is more than 0.
    """
    arguments = {
        "full": {},
        "lora": {"trainer": {"peft_config": lora_config}},
        "experts": {"model": str(tiny_moe_dir), "router_aux_loss_coef": 0.5},
    }[model]
    vanishing = Method(SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 1e-9})
    method = {"alpha 0": LIMITS["tdpo"], "vanishing lambda": vanishing}[limit]
    ours, loss = stepped(make_trainer, method, **arguments, **options)
    stock, stock_loss = stepped(make_trainer, Method(DPOTrainer, DPOConfig), **arguments, **options)
    torch.testing.assert_close(loss, stock_loss, atol=1e-6, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in stock.model.named_parameters() if p.requires_grad}
    assert_gradients_close(ours.model, stock_gradients, tolerance=1e-4)
    metrics, stock_metrics = step_metrics(ours), step_metrics(stock)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-5, abs=1e-6)
    assert ("aux_loss" in metrics) == (model == "experts") and metrics.get("aux_loss", 1) >= 1


@pytest.mark.parametrize(("adapter", "bf16"), [(False, True), (True, False)], ids=["full-bf16", "lora-fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_policy_equal_to_reference_is_ln_2(make_trainer, lora_config, method, bf16, adapter):
    """At the start the loss is exactly ln 2 and every KL, margin and reward 0, in the training loop, under autocast too."""
    method = METHODS[method]
    peft_config = {"peft_config": lora_config if adapter else None}
    trainer = make_trainer(
        method.trainer, method.config, bf16=bf16, max_steps=1, trainer=peft_config, **method.options
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == LN_2
    own = ("position_kl/", "rewards", "refinement/")
    assert {value for name, value in log.items() if name.startswith(own)} == {0.0}
    assert log["grad_norm"] > 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("method", TRAINERS)
def test_training_reduces_the_loss(make_trainer, method, loss_type):
    """Eight pairs seen in full at each step: a few steps lower the loss."""
    method, sizes = TRAINERS[method], {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    trainer = make_trainer(method.trainer, method.config, loss_type=loss_type, **sizes, **method.options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(after < before for before, after in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("method", TRAINERS)
def test_plain_dpo_config_takes_the_papers_defaults(make_step, method):
    """TDPO2 with α = 0.5, Sr-DPO with λ = 0.3, and β = 0.1."""
    plain = Method(TRAINERS[method].trainer, DPOConfig)
    _, loss, paper = make_step(plain, beta=0.1)
    assert loss.item() == pytest.approx(paper.loss().item(), rel=1e-5)


def test_weights_of_pairs_and_sft_are_not_mixed_up(make_step):
    """TDPO1's gradient of `"sft"` is the log-probability's own, without the KL that the other term has."""
    trainer, _, paper = make_step(TDPO1, loss_type=["sigmoid", "sft"], loss_weights=[0.0, 1.0])
    paper.loss(loss_type=["sft"]).backward()
    assert_gradients_close(trainer.model, paper.policy.gradients())
