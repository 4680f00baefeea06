"""
`SelfRefineDPOTrainer` on a tiny Llama, against the float64 transcription of the paper from full logits
(`tests/oracles/self_refine.py`) and, where the two must coincide, against `trl.DPOTrainer`.
"""

import json
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from tests.conftest import (
    FullLogits,
    assert_gradients_close,
    first_batch,
    labels_and_mask,
    perturb,
    step_metrics,
    train_step,
)
from tests.oracles import self_refine as oracle
from tests.oracles.tdpo import logratio, sft_loss_from_logits
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer


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
    "loss_type",  # "sigmoid", "ipo" and "sft"; others are refused, see OTHER_LOSS_TYPES
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
    "trust_remote_code",
}
REFUSED = {
    "f_divergence_type": "js_divergence",
    "label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "precompute_ref_log_probs": True,
    "truncation_mode": "keep_end",
    "use_weighting": True,
}
# Read only together with a refused option
WITHOUT_EFFECT = {
    "discopop_tau": "loss_type",
    "f_alpha_divergence_coef": "f_divergence_type",
    "precompute_ref_batch_size": "precompute_ref_log_probs",
}
OTHER_LOSS_TYPES = [
    *(
        "hinge",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
    ),
    *("discopop", "sigmoid_norm"),
]

# The three losses: loss_type, ipo_length_normalization
LOSSES = {"sr-dpo": ("sigmoid", True), "sr-ipo-paper": ("ipo", False), "sr-ipo-trl": ("ipo", True)}


class RecordingTrainer(SelfRefineDPOTrainer):
    """Keeps the loss of each training step, as the training loop (with its autocast) computes it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def paper_margin(policy: FullLogits, ref: FullLogits, batch: dict, **kwargs) -> torch.Tensor:
    """Delta_pi, `(B,)`, of a collated batch, with a graph."""
    labels, mask = labels_and_mask(batch, "augmented_")
    return oracle.refinement_margin_from_logits(
        policy(batch, "augmented_"), ref(batch, "augmented_"), labels, mask, **kwargs
    )


def paper_losses(
    policy: FullLogits, ref: FullLogits, batch: dict, loss: str = "sr-dpo", *, beta=0.1, refinement_weight=0.3
) -> torch.Tensor:
    """Sr-DPO's or Sr-IPO's losses, `(B,)`, of a collated batch. Delta is held constant by the oracle."""
    loss_type, ipo_length_normalization = LOSSES[loss]
    length_normalized = loss_type == "ipo" and ipo_length_normalization
    return oracle.self_refine_loss_from_logits(
        policy(batch),
        ref(batch),
        *labels_and_mask(batch),
        paper_margin(policy, ref, batch, beta=beta, length_normalized=length_normalized),
        beta=beta,
        refinement_weight=refinement_weight,
        loss_type=loss_type,
        length_normalized=length_normalized,
    )


def prompt_of(ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor) -> list[int]:
    return ids[attention_mask.bool() & ~completion_mask.bool()].tolist()


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
    loss_type, ipo_length_normalization = LOSSES[loss]
    trainer = make_trainer(
        SelfRefineDPOTrainer,
        SelfRefineDPOConfig,
        loss_type=loss_type,
        ipo_length_normalization=ipo_length_normalization,
        beta=0.3,
        refinement_weight=0.5,
        gradient_checkpointing=gradient_checkpointing,
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    actual = train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    expected = paper_losses(policy, ref, batch, loss, beta=0.3, refinement_weight=0.5).mean()
    expected.backward()
    without_delta = paper_losses(policy, ref, batch, loss, beta=0.3, refinement_weight=0.0).mean()
    assert abs(expected.item() - without_delta.item()) > 1e-3  # Delta matters here
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_metrics_match_the_paper(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits, for the paper's three numbers and DPO's rewards."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, beta=0.3)
    perturb(trainer.model)
    batch = first_batch(trainer)
    train_step(trainer, batch)

    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    delta = paper_margin(policy, ref, batch, beta=0.3)
    chosen_logratios, rejected_logratios = logratio(policy(batch), ref(batch), *labels_and_mask(batch)).chunk(2)
    assert 0 < (delta > 0).sum() < len(delta)  # the accuracy is neither 0 nor 1
    expected = {
        "refinement/margin": delta,
        "refinement/accuracies": (delta > 0).double(),
        "refinement/marginal": chosen_logratios - rejected_logratios,
        "rewards/chosen": 0.3 * chosen_logratios,
        "rewards/rejected": 0.3 * rejected_logratios,
        "rewards/margins": 0.3 * (chosen_logratios - rejected_logratios),
        "rewards/accuracies": (chosen_logratios > rejected_logratios).double(),
    }
    metrics = step_metrics(trainer)
    assert {name: metrics[name] for name in expected} == {
        name: pytest.approx(values.mean().item(), rel=1e-4, abs=1e-6) for name, values in expected.items()
    }


@pytest.mark.parametrize("loss_weights", [None, [0.7, 0.2]])
def test_sft_term(make_trainer, tiny_model_dir, loss_weights):
    """Oracle: the weighted sum of Sr-DPO and TRL's SFT term under the plain prompt."""
    trainer = make_trainer(
        SelfRefineDPOTrainer, SelfRefineDPOConfig, loss_type=["sigmoid", "sft"], loss_weights=loss_weights
    )
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    weight, sft_weight = loss_weights or (1.0, 1.0)
    expected = weight * paper_losses(policy, FullLogits(tiny_model_dir), batch).mean()
    expected = expected + sft_weight * sft_loss_from_logits(policy(batch), *labels_and_mask(batch))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_evaluation_matches_the_paper(make_trainer, tiny_model_dir, conversational_pairs):
    """Oracle: float64 full logits, averaged over two batches of four; for a dataset given to `evaluate`, too."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"eval_dataset": conversational_pairs})
    perturb(trainer.model)
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    losses, deltas = [], []
    for batch in trainer.get_eval_dataloader():
        losses += paper_losses(policy, ref, batch).tolist()
        deltas += paper_margin(policy, ref, batch, beta=0.1).tolist()
    assert len(losses) == 8
    for results in (trainer.evaluate(), trainer.evaluate(conversational_pairs)):
        assert results["eval_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)
        assert results["eval_refinement/margin"] == pytest.approx(sum(deltas) / 8, rel=1e-4)


# Limits


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_refinement_weight_zero_is_dpo_bit_for_bit(make_trainer, lora_config, loss_type, adapter):
    """
    Limit: lambda 0 gives `trl.DPOTrainer`'s loss and gradients, every bit; "ipo" is TRL's normalised one. Its metrics, too,
    but for the last bit: TRL divides some of them in Python.
    """
    options = {"loss_type": loss_type, "trainer": {"peft_config": lora_config} if adapter else None}
    ours = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, refinement_weight=0.0, **options)
    stock = make_trainer(DPOTrainer, DPOConfig, **options)
    losses = []
    for trainer in (ours, stock):
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
    assert torch.equal(*losses)
    stock_parameters = dict(stock.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, stock_parameters[name].grad), name
    metrics, stock_metrics = step_metrics(ours), step_metrics(stock)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-6)


def test_refinement_weight_zero_is_dpo_with_experts(make_trainer, tiny_moe_dir):
    """Limit: the same on a Mixtral, whose load-balancing loss is that of the plain prompts alone."""
    losses, aux_losses = [], []
    for trainer_class, config_class, options in [
        (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_weight": 0.0}),
        (DPOTrainer, DPOConfig, {}),
    ]:
        trainer = make_trainer(
            trainer_class, config_class, model=str(tiny_moe_dir), router_aux_loss_coef=0.5, **options
        )
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)).item())
        aux_losses.append(step_metrics(trainer)["aux_loss"])
    assert losses[0] == losses[1] > 1
    assert aux_losses[0] == aux_losses[1]


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
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(LN_2, rel=1e-3)


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


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
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
        "refinement/accuracies": 0.0,
        "refinement/marginal": 0.0,
    }
    assert log["grad_norm"] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_training_reduces_the_loss(make_trainer, loss):
    """Eight pairs seen in full at each step: a few steps lower the loss and raise the marginal."""
    loss_type, ipo_length_normalization = LOSSES[loss]
    trainer = make_trainer(
        RecordingTrainer,
        SelfRefineDPOConfig,
        loss_type=loss_type,
        ipo_length_normalization=ipo_length_normalization,
        learning_rate=1e-3 if loss == "sr-ipo-paper" else 5e-3,  # its gradients are a response's length larger
        max_steps=6,
        per_device_train_batch_size=8,
        seed=0,
    )
    trainer.train()
    assert all(after < before for before, after in zip(trainer.losses, trainer.losses[1:], strict=False))
    assert trainer.state.log_history[0]["refinement/marginal"] == 0
    assert trainer.state.log_history[5]["refinement/marginal"] > 0


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


def test_given_reference_model(make_trainer, tiny_model_dir):
    """Oracle: float64 full logits. A `ref_model` other than the policy's start is used as it is, under both prompts."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    weights = {name: weight.clone() for name, weight in ref_model.state_dict().items()}
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, trainer={"ref_model": ref_model})
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir, weights)
    assert loss.item() == pytest.approx(paper_losses(policy, ref, batch).mean().item(), rel=1e-5)


# The augmented prompt


def check_augmented_batch(trainer, batch: dict, inserted: str) -> None:
    """The same completion tokens after both prompts; the augmented prompt is the plain one with `inserted` put in."""
    inserted_ids = trainer.processing_class(inserted, add_special_tokens=False)["input_ids"]
    for row in range(len(batch["input_ids"])):
        plain, augmented = (
            [batch[prefix + key][row] for key in ("input_ids", "attention_mask", "completion_mask")]
            for prefix in ("", "augmented_")
        )
        completion = plain[0][plain[2].bool()].tolist()
        assert len(completion) > 0
        assert augmented[0][augmented[2].bool()].tolist() == completion
        plain_prompt, augmented_prompt = prompt_of(*plain), prompt_of(*augmented)
        assert is_sublist(inserted_ids, augmented_prompt)
        start = next(
            i for i in range(len(augmented_prompt)) if augmented_prompt[i : i + len(inserted_ids)] == inserted_ids
        )
        assert augmented_prompt[:start] + augmented_prompt[start + len(inserted_ids) :] == plain_prompt


def test_default_prompt_is_the_papers(tmp_path):
    config = SelfRefineDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.refinement_prompt == PAPERS_PROMPT
    assert (config.refinement_prompt_role, config.refinement_weight, config.beta) == ("user", 0.3, 0.1)
    assert config.ipo_length_normalization is True


@pytest.mark.parametrize("max_length", [1024, 12], ids=["", "truncated"])
def test_augmented_prompt_of_messages(make_trainer, max_length):
    """`p + x` in the first user message. Truncation follows the plain sample, so both keep the same completion."""
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, max_length=max_length)
    batch = first_batch(trainer)
    assert batch["input_ids"].size(1) <= max_length
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


def test_augmented_prompt_of_plain_text(make_trainer, plain_text_pairs):
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=plain_text_pairs)
    batch = first_batch(trainer)
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)
    assert prompt_of(*(batch["augmented_" + k][0] for k in ("input_ids", "attention_mask", "completion_mask")))[
        0
    ] == trainer.processing_class.convert_tokens_to_ids("Please")


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
    text = trainer.processing_class.decode(batch["augmented_input_ids"][0])
    assert text.startswith("<system> You are brief </s> <user> Be useful . what runs ? </s> <assistant> the cat </s>")


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
    )
    batch = first_batch(trainer)
    inserted = "Be useful ." if with_system else "<system> Be useful . </s>"
    check_augmented_batch(trainer, batch, inserted)
    start = "<system> Be useful . You are brief </s> <user>" if with_system else "<system> Be useful . </s> <user>"
    assert trainer.processing_class.decode(batch["augmented_input_ids"][0]).startswith(start)


@pytest.mark.parametrize("as_json", [False, True], ids=["list", "json"])
def test_augmented_prompt_with_tools(make_trainer, conversational_pairs, as_json):
    """Tools are rendered into both prompts; like TRL, from a list or from its JSON text."""
    tools = [{"type": "function", "function": {"name": "light"}}]
    rows = [row | {"tools": json.dumps(tools) if as_json else tools} for row in conversational_pairs]
    trainer = make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, dataset=Dataset.from_list(rows))
    batch = first_batch(trainer)
    assert trainer.processing_class.decode(batch["input_ids"][0]).startswith("<tool> light <user> what")
    check_augmented_batch(trainer, batch, PAPERS_PROMPT)


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


@pytest.mark.parametrize(("option", "value"), [("refinement_weight", -0.1), ("refinement_prompt_role", "assistant")])
def test_config_refuses_bad_values(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        SelfRefineDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{option: value})


def test_every_dpo_option_is_accounted_for():
    """The three tables above are `DPOConfig`'s own fields, each once."""
    own = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    tables = [*HONOURED, *REFUSED, *WITHOUT_EFFECT]
    assert set(tables) == own
    assert len(tables) == len(set(tables))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("config_class", [SelfRefineDPOConfig, DPOConfig])
@pytest.mark.parametrize("option", REFUSED)
def test_refused_option(make_trainer, option, config_class):
    """The error names the option, and comes before the model is loaded: the path leads nowhere."""
    with pytest.raises(ValueError, match=option):
        make_trainer(SelfRefineDPOTrainer, config_class, model="/no/such/model", **{option: REFUSED[option]})


@pytest.mark.parametrize("loss_type", [*([other] for other in OTHER_LOSS_TYPES), ["sft"], ["ipo", "hinge"]], ids=str)
def test_refused_loss_type(make_trainer, loss_type):
    with pytest.raises(ValueError, match="loss_type"):
        make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, model="/no/such/model", loss_type=loss_type)


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
