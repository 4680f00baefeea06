"""
The base class, for those who write a trainer of their own: the example of `docs/custom_losses.md`, and shifts and weights with each loss of
TRL, against the losses' equations in float64 from full logits.
"""

import pytest
import torch
from tests.conftest import (
    FullLogits,
    assert_gradients_close,
    first_batch,
    make_conversational_pairs,
    perturb,
    step_metrics,
    train_step,
)
from tests.oracles import losses as oracle
from tests.test_readme import blocks
from tests.trainers.methods import Method, Paper
from tests.trainers.test_losses import LOSSES
from trl import DPOConfig, DPOTrainer

from trl_ext import ShiftedDPOTrainer
from trl_ext.trainers.shifted_dpo_trainer import WITHOUT_WEIGHTS


MARGINS, WEIGHTS = [0.5, -1.0, 2.0, 0.0], [1.0, 0.0, 2.5, 0.5]


class MarginTrainer(ShiftedDPOTrainer):
    """The chosen response is to win by a margin, half of it each."""

    columns = ("margin",)

    def logratio_shifts(self, pairs, term):
        return -pairs.inputs["margin"] / (2 * self.beta), pairs.inputs["margin"] / (2 * self.beta)

    def pair_metrics(self, pairs):
        return {"margin": pairs.inputs["margin"]}


class WeightedMarginTrainer(MarginTrainer):
    columns = ("margin", "weight")

    def pair_weights(self, pairs, term):
        return pairs.inputs["weight"]


class LearnedShiftTrainer(ShiftedDPOTrainer):
    """A shift with a gradient: each log-ratio twice."""

    def logratio_shifts(self, pairs, term):
        return tuple(pairs.logps - pairs.ref_logps)


@pytest.fixture
def rows():
    return make_conversational_pairs().select(range(4)).add_column("margin", MARGINS).add_column("weight", WEIGHTS)


def step(make_trainer, trainer_class, rows, **options):
    trainer = make_trainer(trainer_class, DPOConfig, dataset=rows, beta=0.3, **options)
    perturb(trainer.model)
    batch = first_batch(trainer)
    return trainer, batch, train_step(trainer, batch)


def paper_of(trainer, tiny_model_dir, batch) -> Paper:
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    return Paper(Method(DPOTrainer, DPOConfig), policy, FullLogits(tiny_model_dir), batch, beta=0.3)


@pytest.mark.parametrize("trainer_class", [WeightedMarginTrainer, LearnedShiftTrainer])
@pytest.mark.parametrize("loss", LOSSES)
def test_shift_and_weights(make_trainer, tiny_model_dir, rows, loss, trainer_class):
    if trainer_class is WeightedMarginTrainer and loss in WITHOUT_WEIGHTS:
        with pytest.raises(ValueError, match=f"`loss_type='{loss}'` is not supported by WeightedMarginTrainer"):
            make_trainer(trainer_class, DPOConfig, model="/no/such/model", dataset=rows, **LOSSES[loss])
        trainer_class = MarginTrainer
    trainer, batch, actual = step(make_trainer, trainer_class, rows, **LOSSES[loss])
    paper = paper_of(trainer, tiny_model_dir, batch)
    w, l = paper.logratios  # noqa: E741
    if trainer_class is LearnedShiftTrainer:
        w, l = 2 * w, 2 * l  # noqa: E741
    else:
        w, l = w - torch.tensor(MARGINS) / 0.6, l + torch.tensor(MARGINS) / 0.6  # noqa: E741
    losses = oracle.losses(
        loss,
        *(w, l),
        lengths=paper.lengths,
        ref_margins=paper.ref_logps[0] - paper.ref_logps[1],
        beta=0.3,
        epsilon=LOSSES[loss].get("label_smoothing", 0.0),
        tau=LOSSES[loss].get("discopop_tau", 0.05),
    )
    if trainer_class is WeightedMarginTrainer:
        losses = losses * torch.tensor(WEIGHTS)
    losses.mean().backward()
    assert actual.item() == pytest.approx(losses.mean().item(), rel=2e-5)
    assert_gradients_close(trainer.model, paper.policy.gradients(), tolerance=2e-4)
    metrics, expected = step_metrics(trainer), paper.metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if trainer_class is not LearnedShiftTrainer:
        assert metrics["margin"] == pytest.approx(sum(MARGINS) / 4)


def test_every_option_of_dpo_is_the_parents(make_trainer, rows):
    """Without a shift it is `DPOTrainer` with its options that change log-ratios, every bit."""
    for options in [
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": "sft"},
    ]:
        results = []
        for trainer_class in (ShiftedDPOTrainer, DPOTrainer):
            trainer, _, loss = step(make_trainer, trainer_class, rows, **options)
            results.append((loss, step_metrics(trainer), {n: p.grad for n, p in trainer.model.named_parameters()}))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_vanishing_shift_keeps_the_parents_options(make_trainer, rows):
    """WPO's weights and LD-DPO's log-ratios beside a shift: of a margin of 0, those of `DPOTrainer`."""
    zero = rows.remove_columns("margin").add_column("margin", [0.0] * 4)
    for options in [{"ld_alpha": 0.5}, {"use_weighting": True}, {"ld_alpha": 0.5, "loss_type": ["ipo", "sft"]}]:
        losses = [step(make_trainer, cls, zero, **options)[2] for cls in (MarginTrainer, DPOTrainer)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_refused(make_trainer, rows):
    with pytest.raises(
        ValueError,
        match="MarginTrainer reads `margin` of each row, and the first row of `train_dataset` has only prompt",
    ):
        make_trainer(MarginTrainer, DPOConfig, model="/no/such/model", dataset=rows.remove_columns("margin"))
    with pytest.raises(ValueError, match="`loss_type='aot'` with `ld_alpha=0.5`"):
        make_trainer(MarginTrainer, DPOConfig, model="/no/such/model", dataset=rows, loss_type="aot", ld_alpha=0.5)


def test_the_model_sees_no_column(make_trainer, rows):
    """Some models take any argument, and pass it on."""
    trainer = make_trainer(WeightedMarginTrainer, DPOConfig, dataset=rows, precompute_ref_log_probs=True)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    batch = first_batch(trainer)
    train_step(trainer, batch)
    trainer.compute_ref_log_probs(trainer.model, batch)
    expected = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}
    assert seen == [expected, expected] and {"margin", "weight"} <= batch.keys()


def test_a_collator_of_ones_own(make_trainer, rows):
    """It is called as it is, and what it makes of a column stays; rows without it are named."""

    class Doubling:
        def __init__(self, collator):
            self.collator = collator

        def __call__(self, examples):
            return {**self.collator(examples), "margin": torch.tensor([2 * row["margin"] for row in examples])}

    inner = make_trainer(DPOTrainer, DPOConfig).data_collator
    trainer = make_trainer(MarginTrainer, DPOConfig, dataset=rows, trainer={"data_collator": Doubling(inner)})
    assert first_batch(trainer)["margin"].tolist() == [2 * margin for margin in MARGINS]
    row = {name: value for name, value in trainer.train_dataset[0].items() if name != "margin"}
    plain = make_trainer(MarginTrainer, DPOConfig, dataset=rows)
    with pytest.raises(ValueError, match="A row has no `margin`"):
        plain.data_collator([row])


def test_precomputation_and_the_loop(make_trainer, rows):
    """The column reaches the loss through the training loop, an evaluation and a precomputed reference: the same losses."""
    results = []
    for precompute in (True, False):
        options = {"precompute_ref_log_probs": precompute, "max_steps": 3, "learning_rate": 1e-2}
        trainer = make_trainer(MarginTrainer, DPOConfig, dataset=rows, trainer={"eval_dataset": rows}, **options)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    margins = torch.tensor(MARGINS, dtype=torch.float64)
    assert results[0][0] == pytest.approx(oracle.dpo(-margins).mean().item(), rel=1e-5)  # log-ratios are 0


def test_the_example_of_the_docs_trains(tiny_model_dir, tmp_path, monkeypatch):
    """The program of `docs/custom_losses.md` as it is written, on a small model and rows: its first loss is that of the margins alone."""
    from pathlib import Path

    import datasets
    import transformers

    program = blocks((Path(__file__).parents[2] / "docs/custom_losses.md").read_text(encoding="utf-8"), "python")[0]
    assert len(program.strip().splitlines()) <= 20
    scored = make_conversational_pairs().add_column("score_chosen", [2.0] * 8).add_column("score_rejected", [1.0] * 8)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: scored)
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    program = program.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model"))
    settings = 'use_cpu=True, bf16=False, report_to="none", max_steps=2, logging_steps=1, '
    scope: dict = {}
    exec(program.replace("DPOConfig(", f"DPOConfig({settings}"), scope)
    log = scope["trainer"].state.log_history
    assert log[0]["loss"] == pytest.approx(oracle.dpo(torch.tensor(-1.0)).item(), rel=1e-4)
    assert log[0]["margin"] == 1.0
