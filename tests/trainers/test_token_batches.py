"""`max_batch_tokens`: the parts of a batch add up to the batch itself, which is the oracle. How it is parted is worked out by hand."""

import pytest
import torch
from tests.conftest import assert_gradients_close, first_batch, perturb, step_metrics, train_step

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers.squared_refinement import SquaredRefinementTDPOTrainer
from trl_ext.trainers.token_batches import fill, pair_tokens


def test_parts_by_hand():
    """The first of two devices has 9, 5, 4, 1 and 1 tokens, the second 7, 7, 2, 2 and 1; none may have more than 10 in a part."""
    tokens = torch.tensor([[9, 5, 4, 1, 1], [7, 7, 2, 2, 1]])
    assert fill(tokens, 10) == [1, 2, 2]
    assert fill(tokens[:1], 10) == [1, 3, 1]
    assert fill(tokens, 1) == [1] * 5  # a pair is never parted
    assert fill(tokens, 100) == [5]


def test_tokens_of_pairs_by_hand():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 4, 3], [8, 9, 0, 0]])
    mask = (ids > 0).long()
    assert pair_tokens(ids, mask, share_prompt=False).tolist() == [7, 4]
    assert pair_tokens(ids, mask, share_prompt=True).tolist() == [5, 2]


CASES = {
    "tdpo": (TDPOTrainer, TDPOConfig, {"variant": "tdpo1"}),
    "tdpo, shared": (TDPOTrainer, TDPOConfig, {"share_prompt": True, "loss_type": ["sigmoid", "ipo"]}),
    "tdpo, precomputed": (TDPOTrainer, TDPOConfig, {"precompute_ref_log_probs": True}),
    "sr-dpo": (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"share_prompt": True, "gradient_checkpointing": True}),
    "sr-dpo, precomputed": (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"precompute_ref_log_probs": True}),
    "squared refinement": (SquaredRefinementTDPOTrainer, TDPOConfig, {"variant": "tdpo2"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_whole_batchs(make_trainer, conversational_pairs, case):
    trainer_class, config_class, options = CASES[case]
    arguments = {"objective_alpha": 0.7} if case == "squared refinement" else {}
    dataset = conversational_pairs.add_column("turn", [0, 1, 1, 0, 0, 1, 0, 1])
    found = {}
    for max_batch_tokens in (60, None):
        trainer = make_trainer(
            trainer_class,
            config_class,
            dataset=dataset,
            per_device_train_batch_size=8,
            padding_free=True,
            max_batch_tokens=max_batch_tokens,
            trainer=arguments,
            **options,
        )
        perturb(trainer.model)
        batch = first_batch(trainer)
        trainer.create_optimizer()
        calls, step = [], trainer._compute_loss
        trainer._compute_loss = lambda model, inputs, *pos, calls=calls, step=step: (
            calls.append(inputs["input_ids"].size(0) // 2) or step(model, inputs, *pos)
        )
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, batch)
        found[max_batch_tokens] = loss.item(), trainer.model, step_metrics(trainer)
        if max_batch_tokens is None:
            assert calls == [8]
        else:
            assert sum(calls) == 8 and len(set(calls)) > 1  # parts of uneven numbers of pairs
            tokens = pair_tokens(batch["input_ids"], batch["attention_mask"], trainer.share_prompt)
            assert len(calls) < 2 * tokens.sum().item() / 60 + 1  # any two parts that follow each other have more
            metrics = found[60][2]
            assert (metrics.pop("batch/pairs"), metrics.pop("batch/tokens")) == (
                8 / len(calls),
                tokens.sum().item() / len(calls),
            )
    assert found[60][0] == pytest.approx(found[None][0], rel=1e-5)
    gradients = {name: p.grad for name, p in found[None][1].named_parameters()}
    assert_gradients_close(found[60][1], gradients, tolerance=1e-5)
    # Means over pairs are the batch's; those over tokens, and deviations, are means over parts
    means = {"rewards/margins", "rewards/accuracies", "logps/chosen", "position_kl/chosen", "refinement/margin"}
    for name in means & found[None][2].keys():
        assert found[60][2][name] == pytest.approx(found[None][2][name], rel=1e-4)


def test_training(make_trainer):
    """The same parameters after some steps with and without parts, and with gradients that are accumulated."""
    models = []
    for max_batch_tokens in (50, None):
        trainer = make_trainer(
            TDPOTrainer,
            TDPOConfig,
            padding_free=True,
            max_batch_tokens=max_batch_tokens,
            gradient_accumulation_steps=2,
            max_steps=3,
            learning_rate=1e-2,
            optim="sgd",
        )
        trainer.train()
        models.append(dict(trainer.model.named_parameters()))
        logged = [log["batch/pairs"] for log in trainer.state.log_history if "batch/pairs" in log]
        assert len(logged) == (3 if max_batch_tokens else 0) and all(1 <= pairs < 4 for pairs in logged)
    torch.testing.assert_close(*models, rtol=1e-5, atol=1e-6)


REFUSED = {
    "0": ({"max_batch_tokens": 0}, "at least 1"),
    "padding": ({"padding_free": False}, "Set `padding_free=True` too"),
    "sft": ({"loss_type": ["sigmoid", "sft"]}, r"\['sft'\]`: "),
    "aot": ({"loss_type": ["aot"]}, r"\['aot'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(make_trainer, case):
    options, message = REFUSED[case]
    options = {"padding_free": True, "max_batch_tokens": 60, **options}
    with pytest.raises(ValueError, match=message):
        make_trainer(TDPOTrainer, TDPOConfig, dataset=None, **options)


def test_an_auxiliary_loss_is_refused(make_trainer, tiny_moe_dir):
    options = {"model": str(tiny_moe_dir), "padding_free": True, "max_batch_tokens": 60}
    with pytest.raises(ValueError, match="Set `router_aux_loss_coef=0`"):
        make_trainer(TDPOTrainer, TDPOConfig, router_aux_loss_coef=0.1, **options)
    trainer = make_trainer(TDPOTrainer, TDPOConfig, router_aux_loss_coef=0.0, **options)
    assert torch.isfinite(train_step(trainer, first_batch(trainer)))
