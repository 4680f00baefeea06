"""
The trainers with the squared refinement loss on a tiny Llama, against the float64 transcription of the objective from full logits
(`tests/oracles/aries.py`) and, for its direct part, that of each trainer's own paper.
"""

import pytest
import torch
from datasets import Dataset
from tests.conftest import (
    PAIRS,
    FullLogits,
    assert_gradients_close,
    first_batch,
    labels_and_mask,
    perturb,
    step_metrics,
    train_step,
)
from tests.oracles import aries as oracle
from tests.oracles.losses import losses
from tests.oracles.self_refine import refinement_margin_from_logits, self_refine_loss_from_logits
from tests.oracles.tdpo import logratio, sft_loss_from_logits, tdpo_loss_from_logits
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, TDPOConfig
from trl_ext.trainers.self_refine_dpo_trainer import augment_prompt
from trl_ext.trainers.squared_refinement import (
    SquaredRefinementDPOTrainer,
    SquaredRefinementSelfRefineDPOTrainer,
    SquaredRefinementTDPOTrainer,
)


BETA, ALPHA = 0.3, 0.7

TDPO = {"alpha": 0.6}
SELF_REFINE = {"refinement_weight": 0.5, "refinement_prompt": "Be useful . Query :"}
# Trainer, config and options; what is left of the objective is the oracle's, in `direct_losses`
TRAINERS = {
    "dpo": (SquaredRefinementDPOTrainer, DPOConfig, {}),
    "ipo": (SquaredRefinementDPOTrainer, DPOConfig, {"loss_type": "ipo"}),
    "tdpo1": (SquaredRefinementTDPOTrainer, TDPOConfig, {"variant": "tdpo1", **TDPO}),
    "tdpo2": (SquaredRefinementTDPOTrainer, TDPOConfig, {"variant": "tdpo2", **TDPO}),
    "sr-dpo": (SquaredRefinementSelfRefineDPOTrainer, SelfRefineDPOConfig, SELF_REFINE),
}


def rows(pairs: int = 3, direct: int = 2) -> Dataset:
    """The rows of each pair: `direct` times the question, and a refinement of the rejected and of the chosen draft."""
    found = []
    for question, chosen, rejected in PAIRS[:pairs]:
        prompts = [(question, 0)] * direct + [(f"{question} {draft} Be brief !", 1) for draft in (rejected, chosen)]
        for prompt, turn in prompts:
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            found.append({key: [{"role": roles[key], "content": text}] for key, text in row.items()} | {"turn": turn})
    return Dataset.from_list(found)


def part(batch: dict, first: int, step: int) -> dict:
    """Every `step`-th pair of a collated batch, from the `first` one."""
    pairs = batch["input_ids"].size(0) // 2
    chosen = torch.arange(first, pairs, step)
    index = torch.cat([chosen, chosen + pairs])
    return {key: batch[key][index] for key in ("input_ids", "attention_mask", "completion_mask")}


def read(policy: FullLogits, ref: FullLogits, batch: dict) -> dict:
    labels, mask = labels_and_mask(batch)
    return {"policy_logits": policy(batch), "ref_logits": ref(batch), "labels": labels, "mask": mask}


def direct_losses(name: str, make_trainer, policy: FullLogits, ref: FullLogits, batch: dict, rows: Dataset):
    """DPO's, TDPO's or Sr-DPO's losses, `(B,)`, of the direct part of a batch; `rows` are the same pairs."""
    if name == "ipo":  # TRL's, of means
        lengths, sides = labels_and_mask(batch)[1].sum(dim=1).view(2, -1), read(policy, ref, batch)
        ref_margins = torch.zeros(lengths.size(1))  # which IPO does not look at
        return losses("ipo", *logratio(**sides).view(2, -1), lengths=lengths, ref_margins=ref_margins, beta=BETA)
    if name != "sr-dpo":
        variant = {"dpo": "tdpo2"}.get(name, name)
        alpha = 0.0 if name == "dpo" else 0.6  # TDPO2 at α = 0 is DPO
        return tdpo_loss_from_logits(**read(policy, ref, batch), beta=BETA, alpha=alpha, variant=variant)
    augmented = rows.map(lambda row: {"prompt": augment_prompt(row["prompt"], SELF_REFINE["refinement_prompt"])})
    stock = make_trainer(DPOTrainer, DPOConfig, dataset=augmented, per_device_train_batch_size=len(rows))
    delta = refinement_margin_from_logits(**read(policy, ref, first_batch(stock)), beta=BETA)
    return self_refine_loss_from_logits(
        **read(policy, ref, batch), delta=delta, beta=BETA, refinement_weight=0.5, loss_type="sigmoid"
    )


def make_squared(make_trainer, name: str, dataset: Dataset, **options):
    trainer_class, config_class, own = TRAINERS[name]
    options = {"beta": BETA, "per_device_train_batch_size": len(dataset), **own, **options}
    return make_trainer(trainer_class, config_class, dataset=dataset, trainer={"objective_alpha": ALPHA}, **options)


@pytest.mark.parametrize("sft_weight", [None, 0.2], ids=["", "sft"])
@pytest.mark.parametrize("name", TRAINERS)
def test_loss_and_gradients_match_the_objective(make_trainer, tiny_model_dir, name, sft_weight):
    """
    Three pairs in one batch, their direct rows twice: (1 − α) mean L_direct + α mean L_refine, whatever the repetition, and
    the gradient of every parameter. TRL's SFT term over all rows is added with its weight.
    """
    preference = TRAINERS[name][2].get("loss_type", "sigmoid")
    sft = {} if sft_weight is None else {"loss_type": [preference, "sft"], "loss_weights": [0.5, sft_weight]}
    dataset = rows()
    trainer = make_squared(make_trainer, name, dataset, **sft)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    direct = direct_losses(
        name, make_trainer, policy, ref, part(batch, 0, 4), dataset.select(range(0, len(dataset), 4))
    )
    refinement = oracle.refinement_loss_from_logits(
        read(policy, ref, part(batch, 2, 4)), read(policy, ref, part(batch, 3, 4)), beta=BETA
    )
    expected = oracle.total(direct, refinement, alpha=ALPHA)
    if sft_weight is not None:
        expected = 0.5 * expected + sft_weight * sft_loss_from_logits(policy(batch), *labels_and_mask(batch))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())

    metrics = step_metrics(trainer)
    assert metrics["objective/direct"] == pytest.approx(direct.mean().item(), rel=1e-4)
    assert metrics["objective/refinement"] == pytest.approx(refinement.mean().item() / 2, rel=1e-4)  # per square


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_batches_of_one_row_average_to_the_objective(make_trainer, name):
    """Batches with rows of one kind only: the mean over the epoch's batches is the loss of all rows in one."""
    dataset = rows(pairs=2, direct=1)
    trainer = make_squared(make_trainer, name, dataset)
    perturb(trainer.model)
    whole = train_step(trainer, first_batch(trainer))
    trainer._set_signature_columns_if_needed()
    losses = []
    for i in range(len(dataset)):
        row = {key: value for key, value in trainer.train_dataset[i].items() if key in trainer._signature_columns}
        losses.append(train_step(trainer, trainer.data_collator([row])))
        assert ("objective/direct" in step_metrics(trainer)) == (dataset[i]["turn"] == 0)
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_weights_are_those_of_the_rows_that_trl_leaves(make_trainer):
    """`max_length` takes the two longest refinement prompts: 2 of 6 refinement rows are left out, and 3 + 4 rows weigh."""
    dataset = rows(direct=1)
    lengths = sorted(len(ids) for ids in make_squared(make_trainer, "dpo", dataset).train_dataset["prompt_ids"])
    trainer = make_squared(make_trainer, "dpo", dataset, max_length=lengths[-2])
    assert len(trainer.train_dataset) == 7
    assert trainer._row_weights == pytest.approx((0.3 * 7 / 3, 2 * 0.7 * 7 / 4))


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "ipo"])
def test_a_training_starts_at_ln_2_and_a_quarter(make_trainer, name):
    """
    Through the training loop, with its columns and its collator. Policy = reference: ln 2 for each direct row, (1/2)² for each
    refinement row, and 0.3 · ln 2 + 0.7 · 2 · 0.25 together. The first batch is the first pair's four rows, half of them direct,
    as in the dataset.
    """
    trainer = make_squared(
        make_trainer, name, rows(), per_device_train_batch_size=4, max_steps=2, train_sampling_strategy="sequential"
    )
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    ln_2 = torch.tensor(2.0).log().item()
    assert first["objective/direct"] == pytest.approx(ln_2, abs=1e-5)
    assert first["objective/refinement"] == pytest.approx(0.25, abs=1e-5)
    assert first["loss"] == pytest.approx(0.3 * ln_2 + 0.7 * 0.5, abs=1e-4)
    assert {"objective/direct", "objective/refinement"} <= second.keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"loss_type": "aot"}, "`loss_type='aot'` is not supported by SquaredRefinementDPOTrainer"),
        ("dpo", {"loss_type": "hinge"}, "`loss_type='hinge'` is not supported by SquaredRefinementDPOTrainer"),
        ("dpo", {"use_weighting": True}, "the rows have weights"),
        ("dpo", {"ld_alpha": 0.5}, "`ld_alpha=0.5` is not supported"),
        ("sr-dpo", {"loss_type": ["sigmoid", "ipo"]}, "several preference losses"),
    ],
)
def test_options_without_a_meaning_are_refused(make_trainer, name, options, message):
    with pytest.raises(ValueError, match=message):
        make_squared(make_trainer, name, rows(), **options)


def test_a_dataset_without_refinement_rows_is_refused(make_trainer):
    with pytest.raises(ValueError, match="there are 6 direct and 0 refinement rows"):
        make_squared(make_trainer, "dpo", rows().filter(lambda row: row["turn"] == 0))
