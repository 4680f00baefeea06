"""
The trainers as replacements of `trl.DPOTrainer`: the datasets, references, models, adapters, memory savers and options that the parent takes.
Oracles: the papers in float64 from full logits (`tests/trainers/methods.py`), `DPOTrainer` itself if the two must coincide, and runs that
must coincide; what the parent refuses must be refused in its words.
"""

import json
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tests.conftest import FullLogits, assert_gradients_close, first_batch, perturb, step_metrics, train_step
from tests.invariant import record
from tests.trainers.methods import (
    LIMITS,
    LN_2,
    METHODS,
    SR,
    TDPO2,
    TRAINERS,
    Method,
    Paper,
    augmented_sequences,
    response_logps,
    step_losses,
)
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig


DPO = Method(DPOTrainer, DPOConfig)
each_trainer = pytest.mark.parametrize("method", TRAINERS.values(), ids=TRAINERS)
# A KL, a refinement, and both at once
SHIFTS = {name: METHODS[name] for name in ("tdpo2", "sr", "sr-tdpo1")}
each_method = pytest.mark.parametrize("method", SHIFTS.values(), ids=SHIFTS)
each_limit = pytest.mark.parametrize("method", LIMITS.values(), ids=LIMITS)
full_and_lora = pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])


@pytest.fixture
def make(make_trainer):
    """Returns a function that builds the trainer of a method; `trainer_class` may be a subclass of its own."""

    def make(method: Method, *, trainer_class=None, **options):
        return make_trainer(trainer_class or method.trainer, method.config, **{**method.options, **options})

    return make


def without_clock(metrics: dict) -> dict:
    return {name: x for name, x in metrics.items() if not name.endswith(("_runtime", "_per_second", "_time"))}


def trained_gradients(trainer) -> dict:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_matches(trainer, paper: Paper, loss: torch.Tensor, tolerance: float = 1e-4, rel: float = 1e-5) -> None:
    expected = paper.loss()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=rel)
    assert_gradients_close(trainer.model, paper.policy.gradients(), tolerance=tolerance)


# Datasets


@each_limit
def test_streaming_training_set(make, conversational_pairs, method):
    """
    The losses of a map-style dataset read in order, bit for bit, over more than one epoch, and those of `DPOTrainer` on the same
    stream. In the reverse order they are others, so the order is seen in them.
    """
    options = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2}

    def losses(dataset, method=method, **more):
        return step_losses(make(method, dataset=dataset, **options, **more))

    streamed = losses(conversational_pairs.to_iterable_dataset())
    assert len(streamed) == 6 and streamed[0] == pytest.approx(LN_2)
    assert streamed == losses(conversational_pairs, train_sampling_strategy="sequential")
    backwards = conversational_pairs.select(range(7, -1, -1)).to_iterable_dataset()
    assert losses(backwards)[1:] != pytest.approx(streamed[1:], abs=1e-2)
    assert streamed == pytest.approx(losses(conversational_pairs.to_iterable_dataset(), DPO), rel=1e-4)


@each_trainer
def test_streaming_evaluation_set(make, conversational_pairs, method):
    """The metrics of the same rows in memory."""
    results = []
    for dataset in (conversational_pairs, conversational_pairs.to_iterable_dataset()):
        trainer = make(method, trainer={"eval_dataset": dataset})
        perturb(trainer.model)
        results.append(without_clock(trainer.evaluate()))
    assert results[0] == results[1]
    assert abs(results[0]["eval_loss"] - LN_2) > 1e-3


@pytest.mark.parametrize("given", ["to the constructor", "to evaluate"])
@each_trainer
def test_evaluation_sets_by_name(make, tiny_model_dir, conversational_pairs, method, given):
    """The papers' loss of each dataset, and `DPOTrainer`'s names with ours beside them."""
    datasets = {"first": conversational_pairs.select(range(4)), "last": conversational_pairs.select(range(4, 8))}
    results = []
    for one in (method, DPO):
        at_construction = {"eval_dataset": datasets} if given == "to the constructor" else None
        trainer = make(one, trainer=at_construction)
        perturb(trainer.model)
        results.append(trainer.evaluate() if at_construction else trainer.evaluate(datasets))
    added = {name.removeprefix("eval_").split("/")[0] for name in results[0].keys() - results[1].keys()}
    assert added == ({"refinement"} if method.refines else {"position_kl", "rewards_tdpo"})
    assert results[1].keys() < results[0].keys()
    policy, ref = FullLogits(tiny_model_dir, trainer.model.state_dict()), FullLogits(tiny_model_dir)
    for name, dataset in datasets.items():
        batch = first_batch(make(method, dataset=dataset))
        expected = Paper(method, policy, ref, batch).loss().item()
        assert results[0][f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)


@each_trainer
def test_dropped_and_cut_rows_are_counted(make, conversational_pairs, caplog, method):
    """Prompts of 6, 8, 8, 8 and four times 9 tokens: at 9 four rows are dropped, and at 6 all, which is an error."""
    trainer = make(method, max_length=9, trainer={"eval_dataset": {"other": conversational_pairs}})
    assert len(trainer.train_dataset) == len(trainer.eval_dataset["other"]) == 4
    for name in ("train", "other"):
        assert (
            f"Left out: 4 of 8 rows of the {name} dataset have a prompt that alone fills `max_length`" in caplog.text
        )
        assert f"4 of 4 rows of the {name} dataset are longer than `max_length=9`" in caplog.text
    with pytest.raises(ValueError, match="8 of 8 rows .* fills `max_length` .*nothing is left"):
        make(method, max_length=6)


# References and adapters


def other_reference(tiny_model_dir):
    """A reference that is not the policy's start."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    return ref_model


def trained_adapter(tiny_model_dir, lora_config):
    torch.manual_seed(0)  # LoRA's A
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(base, lora_config)
    perturb(model, scale=0.2, seed=2)
    return model


REFERENCES = ["full", "lora", "adapter", "ref_model", "ref_model and lora", "ref_model and adapter", "trained head"]


@pytest.fixture
def make_with_reference(make, tiny_model_dir, lora_config):
    """Returns a function that builds a trainer with one of REFERENCES, and another that reads it with the papers' eyes."""

    def make_it(method: Method, reference: str, trainer=None, **options):
        trainer, model = dict(trainer or {}), None
        if reference == "trained head":
            lora_config.modules_to_save = ["lm_head"]
        if "ref_model" in reference:
            trainer["ref_model"] = other_reference(tiny_model_dir)
        if "adapter" in reference:
            model = trained_adapter(tiny_model_dir, lora_config)
        elif "lora" in reference or reference == "trained head":
            trainer["peft_config"] = lora_config
        if reference == "prompt-tuning":
            trainer["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return make(method, model=model, trainer=trainer, **options)

    def read(trainer, method: Method, reference: str, batch: dict) -> Paper:
        weights = {name: x.clone() for name, x in trainer.model.state_dict().items()}
        peft_config = None if reference in ("full", "ref_model") else lora_config
        if "ref_model" in reference:
            ref = FullLogits(tiny_model_dir, other_reference(tiny_model_dir).state_dict())
        elif reference == "adapter":
            ref = FullLogits(tiny_model_dir, weights, lora_config, adapter="ref")
        else:
            ref = FullLogits(tiny_model_dir)
        return Paper(method, FullLogits(tiny_model_dir, weights, peft_config), ref, batch)

    make_it.read = read
    return make_it


@pytest.mark.parametrize("reference", REFERENCES)
@each_trainer
def test_which_model_is_the_reference(make_with_reference, method, reference):
    """
    Its log-probabilities are the papers': a given model's as it is, the base model's for a new adapter, an adapter's own start ("ref") if it
    was trained before, the original head beside a trained one. Only the policy learns.
    """
    trainer = make_with_reference(method, reference)
    if reference == "ref_model and adapter":
        assert set(trainer.model.peft_config) == {"default"}
    batch = first_batch(trainer)
    if "ref_model" not in reference:
        assert train_step(trainer, batch).item() == LN_2
    perturb(trainer.model, scale=0.05 if reference in ("full", "ref_model") else 0.2)
    loss = train_step(trainer, batch)
    assert_matches(trainer, make_with_reference.read(trainer, method, reference, batch), loss)
    if trainer.ref_model is not None:
        assert all(parameter.grad is None for parameter in trainer.ref_model.parameters())


@each_trainer
def test_sync_ref_model(make, method):
    """A reference that becomes the policy after every step (mix-up 1) gives ln 2 at every step, although the policy moves."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make(method, learning_rate=1e-2, max_steps=3, **options)
    before = trainer.model.lm_head.weight.detach().clone()
    assert step_losses(trainer) == [LN_2] * 3
    assert (trainer.model.lm_head.weight - before).abs().max() > 1e-3


ADAPTERS = {
    "dora": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], use_dora=True),
    "embeddings": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]),
    "some tokens": LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=list(range(20, 40))
    ),
    "saved embeddings": LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


def peft_paper(trainer, method: Method, batch: dict, virtual_tokens: int = 0) -> Paper:
    """The papers on the full logits of the PEFT model itself, with its adapter and without."""

    def logits(batch):
        return trainer.model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits

    def ref(batch):
        with torch.no_grad(), trainer.model.disable_adapter():
            return logits(batch)[:, :-1]

    return Paper(method, lambda batch: logits(batch)[:, virtual_tokens:-1], ref, batch)


@pytest.mark.parametrize("adapter", ADAPTERS)
@each_trainer
def test_kind_of_adapter(make, method, adapter):
    trainer = make(method, trainer={"peft_config": ADAPTERS[adapter]})
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    gradients = trained_gradients(trainer)
    trainer.model.zero_grad()
    expected = peft_paper(trainer, method, batch).loss()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, gradients)


@pytest.mark.parametrize("refinement_weight", [0.5, 0.0])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig], ids=["prompt", "prefix"])
def test_prompt_learning(make, kind, refinement_weight):
    """The learned prompt stands before the augmented one too, which therefore shares no cache. TDPO refuses it."""
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    method = Method(*(SR.trainer, SR.config), {"refinement_weight": refinement_weight})
    trainer = make(method, trainer={"peft_config": peft_config})
    perturb(trainer.model, scale=1.0)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    gradients = trained_gradients(trainer)
    trainer.model.zero_grad()
    # Prefixes are in the cache, and have no logits
    paper = peft_paper(trainer, method, batch, virtual_tokens=3 if kind is PromptTuningConfig else 0)
    expected = paper.loss()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, gradients)


@each_trainer
def test_an_adapter_that_was_loaded_frozen(make, tiny_model_dir, lora_config, tmp_path, conversational_pairs, method):
    """
    PEFT freezes what it loads: no parameter would be in the optimizer, and the loss would stay at ln 2. Such a model is evaluated, and its
    training refused; with `is_trainable=True` the adapter moves.
    """

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def trainer(**loading):
        model = PeftModel.from_pretrained(base(), tmp_path / "adapter", **loading)
        return make(method, model=model, max_steps=1, trainer={"eval_dataset": conversational_pairs.select(range(4))})

    get_peft_model(base(), lora_config).save_pretrained(tmp_path / "adapter")
    assert trainer().evaluate()["eval_loss"] == pytest.approx(LN_2)
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(..., is_trainable=True\)"):
        trainer().train()
    trained = trainer(is_trainable=True)
    before = {name: p.clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    trained.train()
    assert any(not torch.equal(p, before[name]) for name, p in trained.model.named_parameters() if name in before)


@pytest.mark.parametrize(
    ("adapter_dtype", "tolerance"),
    [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)],
    ids=["bf16 adapter", "fp32 adapter"],
)
@each_trainer
def test_nf4_base(make, tiny_model_dir, lora_config, method, adapter_dtype, tolerance):
    """
    The dequantized base with the same adapter. DPOTrainer puts a quantized model's adapter in bf16, whose 8 bits the tolerance allows
    for; with the same adapter in fp32 nothing is left to allow for.
    """
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = make(method, trainer={"peft_config": lora_config, "quantization_config": quantization})
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.bfloat16 for parameter in trainable)
    perturb(trainer.model)
    for parameter in trainable:
        parameter.data = parameter.data.to(adapter_dtype)
    batch = first_batch(trainer)
    trainer.evaluate(trainer.train_dataset)  # bitsandbytes must not repack the base, and so cut the gradients
    loss = train_step(trainer, batch)

    adapter = {name: weight for name, weight in trainer.model.state_dict().items() if "lora_" in name}
    base, quantized = {}, 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            is_nf4 = parameter.dtype == torch.uint8
            quantized += is_nf4
            base[name] = dequantize_4bit(parameter.data, parameter.quant_state) if is_nf4 else parameter.data
    assert quantized == 14  # seven projections in each of two layers
    policy = FullLogits(tiny_model_dir, {**base, **adapter}, lora_config)
    ref_weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight for name, weight in base.items()
    }
    paper = Paper(method, policy, FullLogits(tiny_model_dir, ref_weights), batch)
    assert_matches(trainer, paper, loss, tolerance=tolerance, rel=tolerance / 10)


def test_lora_on_experts_is_saved(make, tiny_moe_dir, tmp_path):
    """`target_parameters`, without `target_modules`: the card of the first checkpoint names them, and stops no training."""
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[], target_parameters=experts)
    for method in TRAINERS.values():
        trainer = make(
            method, model=str(tiny_moe_dir), max_steps=1, save_strategy="steps", trainer={"peft_config": lora}
        )
        trainer.train()
        assert "- mlp.experts.down_proj" in (tmp_path / "README.md").read_text()
        assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()


def test_a_card_stops_no_training(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_ext.trainers.model_card.model_settings", lambda *_: {}["no such key"])
    trainer = make(TDPO2, max_steps=1, save_strategy="steps")
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists() and (tmp_path / "README.md").exists()
    assert "has no recipe: KeyError" in caplog.text


@each_method
def test_resume(make, tiny_model_dir, lora_config, tmp_path, method):
    """Three steps and three more from the checkpoint give the losses and weights of six; a trained adapter beside its "ref" copy."""
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    options |= {"train_sampling_strategy": "sequential", "max_steps": 6}
    runs = []
    for resumed in (False, True):
        model = trained_adapter(tiny_model_dir, lora_config)
        trainer = make(method, model=model, output_dir=str(tmp_path / "run"), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if resumed else None)
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs.append((losses, [p.clone() for p in trainer.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)
    assert runs[0][0][5] < 0.95 * LN_2


# Precomputed references


@pytest.fixture
def stored_pairs(conversational_pairs, tmp_path):
    """The same rows on disk: the cache of the reference lies beside them. That of rows in memory is read by nobody."""
    conversational_pairs.save_to_disk(tmp_path / "pairs")
    return load_from_disk(tmp_path / "pairs")


@pytest.mark.parametrize("reference", ["full", "lora", "adapter", "prompt-tuning", "ref_model", "trained head"])
@each_method
def test_precomputed_reference_is_the_same(make_with_reference, method, reference):
    """The loss, gradients and metrics as with the reference computed at each step; nothing but the policy is kept."""
    if reference == "prompt-tuning" and method.variant is not None:
        pytest.skip("TDPO refuses it")
    losses, trainers = [], []
    for precompute in (True, False):
        trainer = make_with_reference(method, reference, precompute_ref_log_probs=precompute)
        perturb(trainer.model, scale=0.05 if reference in ("full", "ref_model", "prompt-tuning") else 0.2)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    assert_gradients_close(trainers[0].model, trained_gradients(trainers[1]), tolerance=1e-5)
    metrics = [step_metrics(trainer) for trainer in trainers]
    assert abs(metrics[0]["rewards/margins"]) > 1e-3
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)
    if reference != "ref_model":
        assert trainers[0].ref_model is None


@pytest.mark.parametrize("reference", ["full", "ref_model"])
@each_trainer
def test_training_and_evaluation_with_a_precomputed_reference(
    make_with_reference, conversational_pairs, method, reference
):
    """The training loop, which removes unused columns and moves the policy, and evaluations, give the numbers of a run without."""
    named = {"some": conversational_pairs.select(range(3)), "others": conversational_pairs.select(range(3, 8))}
    results = []
    for precompute in (True, False):
        options = {"precompute_ref_log_probs": precompute, "max_steps": 3, "learning_rate": 1e-2}
        trainer = make_with_reference(method, reference, trainer={"eval_dataset": named}, **options)
        losses = step_losses(trainer)
        results.append(without_clock(trainer.evaluate()) | {"losses": losses})
        if reference != "full":  # whose reference is gone
            results[-1] |= without_clock(
                trainer.evaluate(conversational_pairs.select([5, 2]), metric_key_prefix="new")
            )
    cached, each_step = results
    assert cached.pop("losses") == pytest.approx(each_step.pop("losses"), rel=1e-4)
    assert cached == pytest.approx(each_step, rel=1e-3, abs=1e-4)
    assert cached["eval_some_loss"] < 0.99 * LN_2 and ("new_loss" in cached) == (reference != "full")


@pytest.mark.parametrize(
    "changes", [{}, {"max_length": 12}, {"reference": "full"}], ids=["", "max_length", "reference"]
)
@each_method
def test_precomputed_reference_is_read_again_and_never_stale(
    make_with_reference, stored_pairs, monkeypatch, method, changes
):
    """A second run with the same options reads the cache and computes nothing but a head; another reference or length is not taken for it."""
    calls = []
    for name in ("_reference_states", "compute_ref_log_probs"):
        inner = getattr(method.trainer, name)
        monkeypatch.setattr(
            method.trainer, name, lambda self, *pos, inner=inner: calls.append(pos) or inner(self, *pos)
        )
    options = {"precompute_ref_log_probs": True, "dataset": stored_pairs}
    make_with_reference(method, "ref_model", **options)
    first = len(calls)
    make_with_reference(
        method,
        changes.get("reference", "ref_model"),
        **options,
        **{k: v for k, v in changes.items() if k != "reference"},
    )
    again, heads = len(calls) - first, int(method.variant is not None)
    assert again == (first if changes else heads)


def test_precomputed_columns_match_the_paper(make, tiny_model_dir):
    """Oracle: float64 full logits, of each row by itself."""
    trainer = make(SR, precompute_ref_log_probs=True)
    for row in trainer.train_dataset:
        paper = Paper(SR, FullLogits(tiny_model_dir), FullLogits(tiny_model_dir), trainer.data_collator([row]))
        augmented = response_logps(paper.ref, augmented_sequences(paper.batch))
        for prefix, expected in [("ref", paper.ref_logps), ("ref_augmented", augmented)]:
            found = [row[f"{prefix}_{side}_logps"] for side in ("chosen", "rejected")]
            assert found == pytest.approx(expected.flatten().tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_kept_states_know_their_truncation(make, stored_pairs):
    """With "keep_end" no row is dropped, so that nothing of the dataset says at which length it was cut."""
    losses = []
    for max_length, precompute in [(10, True), (12, True), (12, False)]:
        options = {"max_length": max_length, "truncation_mode": "keep_end", "precompute_ref_log_probs": precompute}
        trainer = make(TDPO2, dataset=stored_pairs, **options)
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)).item())
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_a_disk_that_is_too_small_is_said_before(make, monkeypatch):
    from trl_ext.trainers import reference_states

    monkeypatch.setattr(reference_states.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(
        OSError, match="keeps the reference's states of each response token, .* GB left. Set HF_DATASETS_CACHE"
    ):
        make(TDPO2, precompute_ref_log_probs=True)


# Savers of memory


class PackedAway(saved_tensors_hooks):
    """
    What activation offloading is to autograd: each tensor saved for the backward is carried to another place, and a new
    tensor with its contents comes back. Here the place is other memory. Strides stay, as offloading keeps them: on some processors
    the product with a matrix rounds otherwise than that with the transpose of its transpose.
    """

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.shapes.append(tuple(tensor.shape))
            return copy(tensor.detach())

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone(memory_format=torch.preserve_format)

        super().__init__(pack, copy)


@full_and_lora
@each_method
def test_saved_tensors_may_be_carried_away(make, lora_config, method, adapter):
    """
    In the context in which TRL enters `activation_offloading`'s hooks, loss and gradients are bitwise those without, and what the head keeps
    for the backward (N completion positions) goes through the hooks.
    """
    steps = []
    for hooks in (None, PackedAway()):
        trainer = make(method, trainer={"peft_config": lora_config} if adapter else None)
        perturb(trainer.model)
        if hooks is not None:
            trainer.maybe_activation_offload_context = hooks
        batch = first_batch(trainer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
        loss = trainer.training_step(trainer.model, dict(batch))
        steps.append((loss, trained_gradients(trainer)))
    positions = int(batch["completion_mask"][:, 1:].sum())
    vocabulary, width = trainer.model.get_output_embeddings().weight.shape
    assert (positions, width) in hooks.shapes
    assert ((positions, vocabulary) in hooks.shapes) == (not adapter)  # a trained head keeps its gradient tile
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the parent accepts it with an accelerator")
def test_activation_offloading_without_accelerator(make):
    """TRL moves activations off an accelerator; without one its context fails, and so does ours, in the same way."""
    errors = set()
    for method in (*TRAINERS.values(), DPO):
        with pytest.raises(AttributeError) as error:
            make(method, activation_offloading=True)
        errors.add(str(error.value))
    assert len(errors) == 1


@pytest.mark.gpu
@full_and_lora
@each_trainer
def test_activation_offloading(make, lora_config, method, adapter):
    """TRL's own hooks, which move what is larger than 1024 bytes; the policy moves, too."""
    losses = []
    for offloading in (False, True):
        options = {"use_cpu": False, "activation_offloading": offloading, "learning_rate": 1e-2, "max_steps": 2}
        losses.append(step_losses(make(method, trainer={"peft_config": lora_config} if adapter else None, **options)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("adapter", "use_reentrant"), [(False, False), (True, True)], ids=["full", "lora-reentrant"])
@each_trainer
def test_gradient_checkpointing(make, lora_config, method, use_reentrant, adapter):
    """
    Loss and gradients of the step without. The layers run once more for the backward, under the policy with gradient only: the reference and
    what has no gradient run them once.
    """
    results, calls = [], []
    for checkpointing in (False, True):
        trainer = make(
            method,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if checkpointing else None,
            max_steps=1,
            trainer={"peft_config": lora_config} if adapter else None,
        )
        # The training loop switches the checkpointing on; what is compared is the step after it
        losses = step_losses(trainer)
        perturb(trainer.model)
        model = trainer.model.get_base_model() if adapter else trainer.model
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        model.model.layers[0].register_forward_pre_hook(count)
        loss = train_step(trainer, first_batch(trainer))
        results.append((losses, loss, trained_gradients(trainer)))
    assert calls[1] == calls[0] + 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


# Architectures


# The head of each: what the full logits have that `h Wᵀ` has not
ARCHITECTURES = {
    "gpt2: tied": ("gpt2", {"tie_word_embeddings": True, "n_positions": 256}),
    "gpt_neox: embed_out": ("gpt_neox", {}),
    "phi: bias": ("phi", {}),
    "gemma2: tied, soft cap": (
        "gemma2",
        {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    ),
    "cohere: tied, scale": ("cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "granite: divisor": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.25}),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3: untied": ("qwen3", {"head_dim": 16}),
    "llama: tied": ("llama", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_trainer
def test_architecture(make, make_model_dir, architecture, method):
    """Loss, metrics, mean logits and every gradient of the model in transformers."""
    model_type, options = ARCHITECTURES[architecture]
    path = make_model_dir(model_type, num_hidden_layers=1, **options)
    trainer = make(method, model=path)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    policy, ref = FullLogits(path, trainer.model.state_dict()), FullLogits(path)
    paper = Paper(method, policy, ref, batch)
    assert_matches(trainer, paper, loss, tolerance=1e-3)
    metrics = step_metrics(trainer)
    expected = paper.metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    chosen_logits = policy(batch).mean(dim=-1)[:4][batch["completion_mask"][:4, 1:].bool()]
    assert metrics["logits/chosen"] == pytest.approx(chosen_logits.mean().item(), abs=1e-5)


# The training loop


@pytest.mark.parametrize("method", [*TRAINERS.values(), DPO], ids=[*TRAINERS, "dpo"])
def test_gradient_accumulation(make, conversational_pairs, method):
    """
    Eight batches of one pair are one batch of eight: the same losses, gradient norms and weights after five steps over
    two shuffled epochs. The loss is a mean over pairs, so it is the mean of the pairs' own losses however they are batched.

    Adam divides each weight's update by its gradient's size, rounding and all, hence the tolerance: half a percent of an
    update. The difference seen is 2e-7.
    """
    dataset = concatenate_datasets([conversational_pairs] * 3).shuffle(seed=0)
    results = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = make(method, dataset=dataset, learning_rate=1e-3, max_steps=5, **sizes)
        trainer.train()
        results.append((trainer.state.log_history[:5], trainer.model.state_dict()))
    (logs, weights), (accumulated_logs, accumulated_weights) = results
    assert logs[-1]["loss"] < logs[0]["loss"]
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        expected = [log[name] for log in logs]
        assert [log[name] for log in accumulated_logs] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(accumulated_weights, weights, rtol=0, atol=5e-6)


@full_and_lora
@each_method
def test_logits_for_compute_metrics(make, tiny_model_dir, lora_config, method, adapter):
    """`return_outputs=True` recomputes them once, with the deprecation warning of TRL."""
    trainer = make(method, loss_type=["sigmoid", "ipo"], trainer={"peft_config": lora_config if adapter else None})
    batch = first_batch(trainer)
    with pytest.warns(FutureWarning, match="return_outputs") as warnings:
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert len([warning for warning in warnings if "return_outputs" in str(warning.message)]) == 1
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, batch))
    real = batch["attention_mask"][:, :-1].bool()
    expected = FullLogits(tiny_model_dir)(batch)[real]
    torch.testing.assert_close(outputs.logits[:, :-1][real].double(), expected, atol=1e-4, rtol=1e-4)


@each_trainer
def test_tokens_are_counted_once(make, method):
    """`num_tokens` is that of the batches, however many losses are added up, and not that of evaluations."""
    trainer = make(method, loss_type=["sigmoid", "ipo", "sft"], max_steps=2, train_sampling_strategy="sequential")
    expected = sum(int(trainer.data_collator([row])["attention_mask"].sum()) for row in trainer.train_dataset)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert trainer.state.log_history[1]["num_tokens"] == expected == trainer._total_train_tokens


def differing(steps: list[dict], recorded: list[dict]) -> list[tuple[int, str]]:
    """The step and name of the metrics that are not within 1e-4 (1e-5 around 0) of what was recorded."""
    return [
        (i, name)
        for i, (step, expected) in enumerate(zip(steps, recorded, strict=True))
        for name in expected
        if step[name] != pytest.approx(expected[name], rel=1e-4, abs=1e-5)
    ]


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_recorded_trajectory(tiny_model_dir, variant):
    """
    Losses, gradient norms, KLs and rewards of eight steps, as recorded in `tests/invariant/tdpo.json`, in which 1% of
    beta or alpha is seen. Another CPU or version of torch rounds otherwise, which the tolerance allows for.
    """
    run = json.loads(record.FILE.read_text(encoding="utf-8"))[variant]
    assert run["settings"] == record.SETTINGS[variant]
    assert differing(record.trajectory(tiny_model_dir, **run["settings"]), run["steps"]) == []
    for name in ("beta", "alpha") if variant == "tdpo2" else ("beta",):  # TDPO1 has no alpha
        changed = run["settings"] | {name: 1.01 * run["settings"][name]}
        assert differing(record.trajectory(tiny_model_dir, **changed), run["steps"]), name


# Options


# What the trainers do with each option that DPOConfig adds to TrainingArguments. A field that is new in TRL fails
# `test_every_dpo_option_is_accounted_for` until it is put in one of these.
HONOURED = {
    *(
        "activation_offloading",
        "beta",
        "dataset_num_proc",
        "disable_dropout",
        "discopop_tau",
        "loss_type",
        "loss_weights",
    ),
    *("label_smoothing", "max_length", "model_init_kwargs", "pad_to_multiple_of", "pad_token", "trust_remote_code"),
    *("precompute_ref_batch_size", "precompute_ref_log_probs", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("router_aux_loss_coef", "sync_ref_model", "truncation_mode"),
    "padding_free",
    "use_weighting",  # by Sr-DPO without a variant and without packing
}
REFUSED = {"f_divergence_type": "js_divergence", "ld_alpha": 0.5}
WITHOUT_EFFECT = {"f_alpha_divergence_coef": "f_divergence_type"}  # read only together with a refused option

REFUSED_OF_ALL = [
    *(({option: value}, f"`{option}=") for option, value in REFUSED.items()),
    *(
        ({"label_smoothing": 0.1, "loss_type": loss_type}, "`label_smoothing=")
        for loss_type in ("sigmoid", ["ipo", "sft"])
    ),
    ({"loss_type": ["sft"]}, "has no preference loss"),
    *(({"train_sampling_strategy": by}, "`train_sampling_strategy=") for by in ("group_by_length", "batch_rebalance")),
    ({"loss_type": ["sigmoid", "sigmoyd"]}, "`loss_type='sigmoyd'`"),
]
PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
REFUSED_OF_TDPO = [
    ({"use_weighting": True}, "`use_weighting="),
    ({"trainer": {"peft_config": PROMPT_TUNING}}, "prompt-learning"),
]


def test_every_dpo_option_is_accounted_for():
    own = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    tables = [*HONOURED, *REFUSED, *WITHOUT_EFFECT]
    assert set(tables) == own and len(tables) == len(set(tables))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *((method, *case) for method in METHODS for case in REFUSED_OF_ALL),
        *((method, *case) for method in METHODS if METHODS[method].variant for case in REFUSED_OF_TDPO),
        *((method, {"use_weighting": True, "share_prompt": True}, "`use_weighting=") for method in METHODS),
    ],
    ids=str,
)
def test_refused_option(make, method, options, message):
    """The error names the option, and comes before the model is loaded: the path leads nowhere. A plain DPOConfig as well."""
    method = METHODS[method]
    with pytest.raises(ValueError, match=message):
        make(method, model="/no/such/model", **options)
    plain = Method(method.trainer, DPOConfig)
    if "share_prompt" not in options and plain.variant == method.variant:
        with pytest.raises(ValueError, match=message):
            make(plain, model="/no/such/model", **options)


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.variant], ids=str)
def test_a_prompt_learning_peft_model_is_refused(make, tiny_model_dir, method):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), PROMPT_TUNING)
    with pytest.raises(ValueError, match="prompt-learning"):
        make(method, model=model)


def arguments_of_refusal(case: str, tiny_model_dir, pairs, lora_config) -> dict:
    """What to construct a trainer with, that `DPOTrainer` refuses."""

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    one_model = load()
    with_images = [{**row, "images": ["sky.png"]} for row in pairs]
    return {
        "reference by path": lambda: {"trainer": {"ref_model": str(tiny_model_dir)}},
        "reference is the policy": lambda: {"model": one_model, "trainer": {"ref_model": one_model}},
        "sync_ref_model with an adapter": lambda: {"sync_ref_model": True, "trainer": {"peft_config": lora_config}},
        "sync_ref_model with an adapter and a reference": lambda: {
            "sync_ref_model": True,
            "trainer": {"peft_config": lora_config, "ref_model": one_model},
        },
        "sync_ref_model with precomputation": lambda: {"sync_ref_model": True, "precompute_ref_log_probs": True},
        "two adapters": lambda: {
            "model": get_peft_model(one_model, lora_config),
            "trainer": {"peft_config": lora_config},
        },
        "adapter on the head": lambda: {
            "trainer": {"peft_config": LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")}
        },
        "quantization of an instance": lambda: {
            "model": one_model,
            "trainer": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        },
        "router loss without router": lambda: {"router_aux_loss_coef": 0.1},
        "list as a dataset": lambda: {"dataset": list(pairs)},
        "no dataset": lambda: {"dataset": None},
        "images without a processor": lambda: {"dataset": Dataset.from_list(with_images)},
        "EXO without smoothing": lambda: {"loss_type": "exo_pair"},
        "precomputation of a stream": lambda: {
            "dataset": pairs.to_iterable_dataset(),
            "precompute_ref_log_probs": True,
            "max_steps": 1,
        },
    }[case]()


@pytest.mark.parametrize(
    "case",
    [
        *("reference by path", "reference is the policy", "sync_ref_model with an adapter"),
        *("sync_ref_model with an adapter and a reference", "sync_ref_model with precomputation", "two adapters"),
        *("adapter on the head", "quantization of an instance", "router loss without router", "list as a dataset"),
        *("no dataset", "images without a processor", "EXO without smoothing", "precomputation of a stream"),
    ],
)
def test_refused_as_dpo_refuses(make, tiny_model_dir, conversational_pairs, lora_config, case):
    """`DPOTrainer`'s error, of the same type and in the same words but for the class."""
    errors = set()
    for method in (*TRAINERS.values(), METHODS["sr-tdpo2"], DPO):
        arguments = arguments_of_refusal(case, tiny_model_dir, conversational_pairs, lora_config)
        with pytest.raises((ValueError, TypeError, AttributeError, NotImplementedError)) as error:
            make(method, **arguments)
        errors.add((error.type, str(error.value).replace(method.trainer.__name__, "DPOTrainer")))
    assert len(errors) == 1


def test_reference_with_another_vocabulary_is_refused(make, tiny_model_dir):
    """A KL between distributions over different vocabularies is not defined, and must not be a broadcast."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ref_model.resize_token_embeddings(ref_model.config.vocab_size + 3)
    trainer = make(TDPO2, trainer={"ref_model": ref_model})
    with pytest.raises(ValueError, match="vocabular"):
        train_step(trainer, first_batch(trainer))


def test_wpo_weighs_the_shifted_loss(make, tiny_model_dir):
    """`use_weighting`: Sr-DPO's loss of each pair times WPO's weights (Eq. 2), from the plain prompts."""
    trainer = make(SR, use_weighting=True)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    paper = Paper(SR, policy, FullLogits(tiny_model_dir), batch)
    with torch.no_grad():
        mask = batch["completion_mask"][:, 1:]
        log_squares = (2 * policy(batch).log_softmax(dim=-1)).logsumexp(dim=-1)
        weights = ((paper.logps - (log_squares * mask).sum(dim=1).view(2, -1)) / paper.lengths).exp().prod(dim=0)
    w, l = paper.shifted("sigmoid")  # noqa: E741
    expected = (weights * -torch.nn.functional.logsigmoid(0.1 * (w - l))).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


@each_trainer
def test_pad_to_multiple_of(make, method):
    """Padding changes no number."""
    losses = []
    for pad_to_multiple_of in (None, 16):
        trainer = make(method, pad_to_multiple_of=pad_to_multiple_of)
        perturb(trainer.model)
        batch = first_batch(trainer)
        losses.append(train_step(trainer, batch).item())
    assert all(batch[name].size(1) % 16 == 0 for name in batch if name.endswith("_ids") and "prefix" not in name)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@each_trainer
def test_truncation(make, tiny_model_dir, method, truncation_mode):
    """What truncation leaves of the responses is what the papers see; Sr-DPO puts the same tokens behind the augmented prompt."""
    trainer = make(method, max_length=12, truncation_mode=truncation_mode)
    perturb(trainer.model)
    batch = first_batch(trainer)
    assert batch["input_ids"].size(1) == 12
    loss = train_step(trainer, batch)
    policy = FullLogits(tiny_model_dir, trainer.model.state_dict())
    assert_matches(trainer, Paper(method, policy, FullLogits(tiny_model_dir), batch), loss)


def test_config_defaults_are_the_papers(tmp_path):
    """PAPERS.md: TDPO2, α = 0.5, β = 0.1; λ = 0.3 lies in the middle of the paper's range."""
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    tdpo, sr = TDPOConfig(**arguments), SelfRefineDPOConfig(**arguments)
    assert (tdpo.variant, tdpo.alpha, tdpo.beta, tdpo.loss_type) == ("tdpo2", 0.5, 0.1, ["sigmoid"])
    assert (sr.refinement_weight, sr.refinement_prompt_role, sr.beta, sr.variant, sr.alpha) == (
        0.3,
        "user",
        0.1,
        None,
        0.5,
    )
    assert sr.ipo_length_normalization is True


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        *(
            (config, *case)
            for config in (TDPOConfig, SelfRefineDPOConfig)
            for case in [("variant", "tdpo3"), ("alpha", -0.1)]
        ),
        (SelfRefineDPOConfig, "refinement_weight", -0.1),
        (SelfRefineDPOConfig, "refinement_prompt_role", "assistant"),
    ],
)
def test_config_refuses_bad_values(tmp_path, config, option, value):
    with pytest.raises(ValueError, match=option):
        config(str(tmp_path), use_cpu=True, bf16=False, **{option: value})


@each_trainer
def test_tags(make, method):
    """A model that is found among those trained with DPO is found here."""
    assert {"trl", "trl-ext", "dpo"} <= set(make(method).model.model_tags)


def test_the_base_of_both_needs_no_variant(make):
    trainer = make(Method(SelfRefineDPOTrainer, DPOConfig))
    train_step(trainer, first_batch(trainer))
    assert not any(name.startswith(("position_kl/", "rewards_tdpo/")) for name in step_metrics(trainer))
