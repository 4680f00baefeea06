"""
`padding_free=True` and `share_prompt=True` against the same trainer without them: one thing computed in two ways, so the oracle is the
padded step, whose own oracles are in the other files. How pairs are packed is compared with layouts drawn by hand.
"""

import os

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tests.conftest import assert_gradients_close, first_batch, perturb, step_metrics, train_step
from tests.trainers.conftest import SIZES
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)
from trl import DPOConfig

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers.packed_pairs import (
    EXACT_MODEL_TYPES,
    PackedPairs,
    RunMask,
    attention_by_padded_runs,
    attention_by_runs,
    padded_runs,
    why_not_packed,
)
from trl_ext.trainers.squared_refinement import SquaredRefinementTDPOTrainer


CONFIGS = {TDPOTrainer: TDPOConfig, SelfRefineDPOTrainer: SelfRefineDPOConfig}
PADDING_FREE, SHARED = {"padding_free": True}, {"share_prompt": True}
PACKINGS = {"padding_free": PADDING_FREE, "both": {**PADDING_FREE, **SHARED}}
EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# What a tiny model of each architecture has beside SIZES; options that it does not have do not harm
MODEL_TYPES = {
    "cohere": {},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "granite": {},
    "llama": {},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": EXPERTS,
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}


@pytest.fixture
def make_both(make_trainer):
    """
    Returns a function that builds a trainer that packs and one that pads, whose policies have moved in the same way.
    `packing` are the options that make the difference, `arguments()` what each needs of its own.
    """

    def make(trainer_class=TDPOTrainer, config_class=None, *, packing=SHARED, arguments=dict, scale=0.05, **options):
        trainers = []
        for packing_options in (packing, {}):
            torch.manual_seed(0)  # LoRA's A
            trainer = make_trainer(
                trainer_class,
                config_class or CONFIGS[trainer_class],
                **{**options, **arguments()},
                **packing_options,
            )
            perturb(trainer.model, scale)
            trainers.append(trainer)
        return trainers

    return make


def assert_same_step(
    shared, unshared, *, rel: float = 1e-5, gradients: float = 1e-5, batch: dict | None = None
) -> None:
    """Loss, every metric and every gradient of a training step; `gradients` is relative to the largest entry of each."""
    batch = first_batch(unshared) if batch is None else batch
    loss, expected = train_step(shared, dict(batch)), train_step(unshared, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=rel)
    metrics = step_metrics(unshared)
    assert abs(metrics["rewards/margins"]) > 1e-3  # the policy is another one than the reference
    assert step_metrics(shared) == pytest.approx(metrics, rel=10 * rel, abs=10 * rel)
    assert_gradients_close(
        shared.model,
        {name: p.grad for name, p in unshared.model.named_parameters() if p.requires_grad},
        tolerance=gradients,
    )


# How a pair is packed


def drawn(packed: PackedPairs) -> dict[str, str]:
    """The sequence as text, a column for each token."""
    return {
        "ids": " ".join(map(str, packed.input_ids[0].tolist())),
        "positions": " ".join(map(str, packed.position_ids[0].tolist())),
    }


def seen_by_each(packed: PackedPairs, attention: str, **options) -> list[str]:
    """What each token sees, as rows of text: the mask itself, or for the products of runs what comes back of one-hot values."""
    sizes = {**SIZES, "vocab_size": 50, "sliding_window": None}
    model = MistralForCausalLM(MistralConfig(**{**sizes, **options}, attn_implementation=attention))
    mask = packed.model_inputs(model.model)["attention_mask"]
    if isinstance(mask, RunMask):
        length = packed.input_ids.size(1)
        zeros, module = torch.zeros(1, 1, length, length), torch.nn.Identity()  # all that is seen has the same weight
        seen = attention_by_runs(module, zeros, zeros, torch.eye(length)[None, None], mask)[0][0, :, 0] > 0
    else:
        seen = mask[0, 0] == 0
    return ["".join("x" if visible else "." for visible in row) for row in seen.tolist()]


def test_pairs_by_hand():
    """Prompts of 3 and 1 tokens, answers of 2 and 3, and of 2 and 1 that begin with the same token."""
    input_ids = torch.tensor([[5, 6, 7, 10, 11, 0], [8, 20, 21, 0, 0, 0], [5, 6, 7, 12, 13, 14], [8, 20, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    packed = PackedPairs.from_batch(input_ids, mask, share_prompt=True)
    assert drawn(packed) == {"ids": "5 6 7 10 11 12 13 14 8 20 21", "positions": "0 1 2 3 4 3 4 5 0 1 2"}
    assert packed.lengths == [(3, 2, 3), (2, 1, 0)] and packed.prefix == packed.padding == 0
    assert packed.places[mask.bool()].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 0, 1, 2, 5, 6, 7, 8, 9]
    unshared = PackedPairs.from_batch(input_ids, mask, share_prompt=False)
    assert drawn(unshared)["ids"] == "5 6 7 10 11 5 6 7 12 13 14 8 20 21 8 20"
    assert drawn(unshared)["positions"] == "0 1 2 3 4 0 1 2 3 4 5 0 1 2 0 1"
    assert unshared.lengths == [(0, 5, 6), (0, 3, 2)]
    columns = torch.arange(6).expand(4, -1)
    for batch in (packed, unshared):  # any token of the batch is found again
        torch.testing.assert_close(batch.take(batch.input_ids, mask.bool()), input_ids[mask.bool()])
        torch.testing.assert_close(batch.take(batch.position_ids, mask.bool()), columns[mask.bool()])


def test_left_padding_and_nothing_shared_by_hand():
    input_ids = torch.tensor([[0, 5, 6], [5, 6, 7], [0, 5, 8], [9, 6, 7]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    packed = PackedPairs.from_batch(input_ids, mask, share_prompt=True)
    assert drawn(packed) == {"ids": "5 6 8 5 6 7 9 6 7", "positions": "1 2 2 0 1 2 0 1 2"}
    assert packed.lengths == [(1, 1, 1), (0, 3, 3)]
    torch.testing.assert_close(packed.take(packed.input_ids, mask.bool()), input_ids[mask.bool()])


def prefixed_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs that all begin with the same 17 tokens; prompts of 19 and 17 tokens, answers of 1, 2, 2 and 3."""
    begin = [*range(3, 20)]
    rows = [[*begin, 30, 31, 32], [*begin, 40, 41], [*begin, 30, 31, 33, 34], [*begin, 42, 43, 44]]
    mask = torch.tensor([[1] * len(row) + [0] * (21 - len(row)) for row in rows])
    return torch.tensor([row + [0] * (21 - len(row)) for row in rows]), mask


def test_prefix_of_all_pairs_by_hand():
    input_ids, mask = prefixed_batch()
    packed = PackedPairs.from_batch(input_ids, mask, share_prompt=True)
    assert drawn(packed) == {
        "ids": " ".join(map(str, [*range(3, 20), 30, 31, 32, 33, 34, 40, 41, 42, 43, 44])),
        "positions": " ".join(map(str, [*range(17), 17, 18, 19, 19, 20, 17, 18, 17, 18, 19])),
    }
    assert packed.prefix == 17 and packed.lengths == [(2, 1, 2), (0, 2, 3)]
    torch.testing.assert_close(packed.take(packed.input_ids, mask.bool()), input_ids[mask.bool()])
    # A begin that is shorter is not worth a mask for each run, and one pair has it once anyhow
    short = PackedPairs.from_batch(input_ids[:, 2:], mask[:, 2:], share_prompt=True)
    assert short.prefix == 0 and short.lengths == [(17, 1, 2), (15, 2, 3)]
    assert PackedPairs.from_batch(input_ids[::2], mask[::2], share_prompt=True).prefix == 0


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_pair_of_the_same_answer(share_prompt):
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.long)
    packed = PackedPairs.from_batch(ids, mask, share_prompt=share_prompt)
    assert packed.lengths == [(3, 0, 0) if share_prompt else (0, 3, 3)]
    torch.testing.assert_close(packed.take(packed.input_ids, mask.bool()), ids.flatten())


def test_sequences_of_a_multiple_of():
    ids, mask = torch.tensor([[5, 6, 0, 0], [5, 7, 8, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    for multiple, length in ((None, 4), (4, 4), (8, 8)):
        packed = PackedPairs.from_batch(ids, mask, share_prompt=True, pad_to_multiple_of=multiple)
        assert packed.input_ids.size(1) == length and packed.padding == length - 4


@pytest.mark.parametrize("attention", ["packed_sdpa", "eager"])
def test_mask_by_hand(attention, monkeypatch):
    """Rows see columns: the answers what they share and themselves, never each other or another pair."""
    monkeypatch.setattr("trl_ext.trainers.packed_pairs.LEAST_PREFIX", 2)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 10, 0], [5, 6, 7, 9], [5, 6, 11, 12]])
    mask = (ids > 0).long()
    packed = PackedPairs.from_batch(ids, mask, share_prompt=True, pad_to_multiple_of=4)
    assert packed.prefix == 2 and packed.lengths == [(1, 1, 1), (0, 1, 2)] and packed.padding == 0
    expected = ["x.......", "xx......", "xxx.....", "xxxx....", "xxx.x...", "xx...x..", "xx....x.", "xx....xx"]
    assert seen_by_each(packed, attention) == expected
    unshared = PackedPairs.from_batch(ids[::2], mask[::2], share_prompt=False)
    expected = ["x.......", "xx......", "xxx.....", "xxxx....", "....x...", "....xx..", "....xxx.", "....xxxx"]
    assert seen_by_each(unshared, attention) == expected


@pytest.mark.parametrize("attention", ["packed_sdpa", "eager"])
def test_sliding_window_by_hand(attention):
    """A window of two counts the tokens of the pair, not those that stand between."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    packed = PackedPairs.from_batch(ids, (ids > 0).long(), share_prompt=True)
    expected = ["x....", "xx...", ".xx..", "..xx.", ".x..x"]
    assert seen_by_each(packed, attention, sliding_window=2) == expected


# Exact


def test_every_architecture_is_tested():
    assert MODEL_TYPES.keys() == EXACT_MODEL_TYPES


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [*((model_type, "both") for model_type in MODEL_TYPES), ("llama", "padding_free"), ("mixtral", "padding_free")],
)
def test_architecture(make_both, make_model_dir, model_type, packing):
    """
    Experts' routing is discrete, so two roundings may differ by more there; here they do not. Without a shared prompt, tokens see less of
    what the model computes beside them.
    """
    path = make_model_dir(model_type, **MODEL_TYPES[model_type])
    packed, padded = make_both(packing=PACKINGS[packing], model=path, variant="tdpo1", beta=0.3)
    assert_same_step(packed, padded)
    assert ("aux_loss" in step_metrics(packed)) == ("num_experts" in MODEL_TYPES[model_type])


# Windows shorter than the pairs, on all layers or on some
WINDOWS = {
    **dict.fromkeys(("mistral", "mixtral", "phi3", "starcoder2"), {}),
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    "qwen3_moe": {"use_sliding_window": True},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize(
    ("model_type", "packing"), [*((model_type, "both") for model_type in WINDOWS), ("mistral", "padding_free")]
)
def test_sliding_windows(make_both, make_model_dir, model_type, packing):
    options = {**MODEL_TYPES[model_type], "sliding_window": 8, **WINDOWS[model_type]}
    packed, padded = make_both(
        packing=PACKINGS[packing], model=make_model_dir(model_type, **options), variant="tdpo1", beta=0.3
    )
    assert any(DynamicCache(config=packed.model.config).is_sliding)
    batch = first_batch(padded)
    assert batch["attention_mask"].sum(dim=1).min() > 8
    assert_same_step(packed, padded, batch=batch)


@pytest.fixture
def make_adapter(tiny_model_dir, lora_config):
    """Returns a function that makes the arguments of a trainer with one of WEIGHTS."""

    def make(weights: str) -> dict:
        if weights == "existing adapter":
            base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
            model = get_peft_model(base, lora_config)
            perturb(model, scale=0.2, seed=2)
            return {"model": model}
        if weights == "reference model":
            ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
            perturb(ref_model, seed=3)
            return {"trainer": {"ref_model": ref_model}}
        arguments = {"peft_config": lora_config} if weights in ("lora", "qlora") else {}
        if weights == "qlora":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        return {"trainer": arguments}

    return make


WEIGHTS = ["full", "lora", "qlora", "existing adapter", "reference model"]


CHECKPOINTING = {"": None, "checkpointing": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
CASES = [
    *((TDPOTrainer, weights, "checkpointing") for weights in WEIGHTS),
    *((TDPOTrainer, weights, checkpointing) for weights in ("full", "lora") for checkpointing in ("", "reentrant")),
    *((SelfRefineDPOTrainer, weights, "checkpointing") for weights in WEIGHTS),
]
CASES = [
    *((*case, "both") for case in CASES),
    *((TDPOTrainer, weights, "checkpointing", "padding_free") for weights in ("full", "lora", "qlora")),
]


@pytest.mark.parametrize(("trainer_class", "weights", "checkpointing", "packing"), CASES)
def test_weights(make_both, make_adapter, trainer_class, weights, checkpointing, packing):
    if weights == "qlora":
        pytest.importorskip("bitsandbytes")
    shared, unshared = make_both(
        trainer_class,
        packing=PACKINGS[packing],
        arguments=lambda: make_adapter(weights),
        scale=0.2,
        gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing],
    )
    if weights == "qlora":  # DPOTrainer puts its adapter in bf16, whose 8 bits would be all that is compared
        for trainer in (shared, unshared):
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            assert any(parameter.dtype == torch.uint8 for parameter in trainer.model.parameters())
    assert_same_step(shared, unshared)


LOSSES = {
    "tdpo1": (TDPOTrainer, {"variant": "tdpo1"}),
    "tdpo2": (TDPOTrainer, {"variant": "tdpo2", "alpha": 0.7}),
    "tdpo1 and sft": (TDPOTrainer, {"variant": "tdpo1", "loss_type": ["sigmoid", "sft"]}),
    "sr-dpo": (SelfRefineDPOTrainer, {"refinement_weight": 0.5}),
    "sr-dpo, λ = 0": (SelfRefineDPOTrainer, {"refinement_weight": 0.0}),
    "sr-ipo": (SelfRefineDPOTrainer, {"loss_type": ["ipo"]}),
    "sr-dpo, tdpo2": (SelfRefineDPOTrainer, {"variant": "tdpo2"}),
    "sr-dpo, precomputed": (SelfRefineDPOTrainer, {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss(make_both, loss):
    trainer_class, options = LOSSES[loss]
    assert_same_step(*make_both(trainer_class, **options))


def test_squared_refinement(make_both, conversational_pairs):
    """The trainers of ARIES, whose weight of the KL is another one for each row."""
    dataset = conversational_pairs.add_column("turn", [0, 1] * 4)
    assert_same_step(
        *make_both(
            SquaredRefinementTDPOTrainer,
            TDPOConfig,
            variant="tdpo1",
            dataset=dataset,
            arguments=lambda: {"trainer": {"objective_alpha": 0.7}},
        )
    )


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},  # other ends of the prompt for chosen and rejected
        {"pad_to_multiple_of": 8},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 8},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
    ],
    ids=["truncated", "keep_end", "multiple of 8", "one pair", "eight pairs", "eager attention"],
)
@pytest.mark.parametrize("packing", PACKINGS)
def test_shapes_of_a_batch(make_both, options, packing):
    shared, unshared = make_both(packing=PACKINGS[packing], **options)
    attention = options.get("model_init_kwargs", {}).get("attn_implementation", "packed_sdpa")
    assert shared.model.config._attn_implementation == attention
    batch = first_batch(unshared)
    lengths = batch["attention_mask"].sum(dim=1)
    if "max_length" in options:
        assert (lengths == 12).sum() >= 2
    assert_same_step(shared, unshared, batch=batch)


@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_evaluation(make_both, conversational_pairs, trainer_class):
    shared, unshared = make_both(trainer_class, trainer={"eval_dataset": conversational_pairs})
    found, expected = shared.evaluate(), unshared.evaluate()
    clocks = {name for name in expected if name.endswith(("runtime", "per_second"))}
    assert {name: found[name] for name in found.keys() - clocks} == pytest.approx(
        {name: expected[name] for name in expected.keys() - clocks}, rel=1e-4, abs=1e-4
    )


def test_training(make_both):
    """The training loop: the same losses, gradient norms and metrics, step by step."""
    logs = []
    for trainer in make_both(max_steps=4, learning_rate=1e-3, gradient_checkpointing=True):
        trainer.train()
        logs.append(
            [
                {k: v for k, v in log.items() if "runtime" not in k and "second" not in k}
                for log in trainer.state.log_history
            ]
        )
    for found, expected in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_autocast(make_both):
    """bf16 autocast: two roundings of the same numbers, to its 8 bits. They are not the same to the last bit."""
    shared, unshared = make_both(bf16=True, scale=0.2)
    batch = first_batch(unshared)
    losses = []
    for trainer in (shared, unshared):
        with trainer.accelerator.autocast():
            losses.append(train_step(trainer, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    metrics, expected = step_metrics(shared), step_metrics(unshared)
    for name in ("logps/chosen", "logps/rejected", "position_kl/chosen", "entropy"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-2)


@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_policy_equal_to_reference_is_exactly_so(make_trainer, trainer_class):
    """Both are packed: one forward, not two roundings of it."""
    trainer = make_trainer(trainer_class, CONFIGS[trainer_class], share_prompt=True)
    train_step(trainer, first_batch(trainer))
    metrics = step_metrics(trainer)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_logits_for_compute_metrics(make_both, lora_config, adapter):
    """They are the batch's, in its layout."""
    shared, unshared = make_both(arguments=lambda: {"trainer": {"peft_config": lora_config if adapter else None}})
    batch, logits = first_batch(unshared), []
    for trainer in (shared, unshared):
        with pytest.warns(FutureWarning, match="return_outputs"):
            _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        logits.append(outputs.logits)
    torch.testing.assert_close(*logits)


def test_the_model_afterwards(make_trainer, tiny_model_dir, tmp_path):
    """It generates as before, from padded prompts, and its files do not say how it was trained."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, padding_free=True)
    inputs = {
        "input_ids": torch.tensor([[0, 0, 9, 10], [11, 12, 13, 14]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(trainer.model.eval().generate(**inputs, **options), untouched.generate(**inputs, **options))
    trainer.save_model(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


# What is computed


def positions_computed(trainer, batch: dict) -> list[tuple[int, ...]]:
    """The shapes of what goes through the policy's first and the reference's first layer in a step."""
    shapes = []
    for model in filter(None, (trainer.model, trainer.ref_model)):
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    train_step(trainer, dict(batch))
    return shapes


def test_tokens_computed(make_both):
    """
    P + R + R' tokens of a pair, or P + R and P + R' of its sequences, and not twice the longer one, for the policy and for the reference:
    here of prompts of 6 tokens and answers of 12 and 13, and the same prompt with answers of 2 and 13. Hooks count them where they
    enter the layers.
    """
    answer = " because the sky is blue and the sea is green ."
    row = {"prompt": "why is the sky blue ?", "chosen": answer, "rejected": f" no{answer}"}
    rows = Dataset.from_list([row, {**row, "chosen": " because"}])
    options = {"dataset": rows, "per_device_train_batch_size": 2}
    shared, padded = make_both(packing=SHARED, **options)
    packed, _ = make_both(packing=PADDING_FREE, **options)
    batch = first_batch(padded)
    assert (batch["attention_mask"] - batch["completion_mask"]).sum(dim=1).tolist() == [6] * 4
    assert batch["completion_mask"].sum(dim=1).tolist() == [12, 2, 13, 13]
    assert positions_computed(shared, batch) == [(1, 2 * 6 + 12 + 13 + 2 + 13)] * 2
    assert positions_computed(packed, batch) == [(1, 4 * 6 + 12 + 13 + 2 + 13)] * 2
    assert positions_computed(padded, batch) == [(4, 6 + 13)] * 2


def test_prefix_of_all_pairs(make_both):
    """Of 27 tokens, a system prompt's, computed once for three pairs: hooks count them, and the step is the padded one."""
    system = (
        "Please generate a response with usefulness rating of 100 out of 100 for the following query . Note that the "
        * 1
    )
    rows = [
        {"prompt": f"{system} {q}", "chosen": " yes .", "rejected": " no no"}
        for q in ("what runs ?", "why ?", "how ?")
    ]
    packed, padded = make_both(dataset=Dataset.from_list(rows), per_device_train_batch_size=3)
    batch = first_batch(padded)
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(dim=1)[:3]
    alike = len(os.path.commonprefix(batch["input_ids"].tolist()))
    assert alike > 16
    assert_same_step(packed, padded, batch=batch)
    total = alike + int((prompts - alike).sum()) + int(batch["completion_mask"].sum())
    assert positions_computed(packed, batch) == [(1, total)] * 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_augmented_prompts_are_packed(make_both, packing):
    """
    Sr-DPO's: the refinement prompt of 18 words once for both pairs, then prompts of 3 and 2 tokens, and answers of 3 and 3, 2 and 4 with
    their ends of sequence, once each for reference and policy. `padding_free` alone computes the plain prompts twice.
    """
    rows = [
        {"prompt": "what runs ?", "chosen": " yes .", "rejected": " no no"},
        {"prompt": "why ?", "chosen": " light", "rejected": " because the sky"},
    ]
    refinement_prompt = (
        "Please generate a response with usefulness rating of 100 out of 100 for the following query . Query :"
    )
    options = {
        "dataset": Dataset.from_list(rows),
        "refinement_prompt": refinement_prompt,
        "per_device_train_batch_size": 2,
    }
    packed, padded = make_both(SelfRefineDPOTrainer, packing=PACKINGS[packing], **options)
    batch = first_batch(padded)
    assert batch["augmented_prefix_ids"].size(1) == 19
    assert_same_step(packed, padded, batch=batch)
    plain = {"padding_free": 2 * (3 + 2) + 6 + 6, "both": (3 + 2) + 6 + 6}[packing]
    assert sorted(positions_computed(packed, batch)) == [(1, plain)] * 2 + [(1, 19 + 3 + 2 + 6 + 6)] * 2


def test_checkpointing_recomputes_the_packed_sequences(make_trainer):
    """Twice the policy, once the reference."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, share_prompt=True, gradient_checkpointing=True)
    batch = first_batch(trainer)
    packed = PackedPairs.from_batch(batch["input_ids"], batch["attention_mask"], share_prompt=True)
    assert positions_computed(trainer, batch) == [packed.input_ids.shape] * 3


def test_precomputed_reference_is_packed(make_trainer):
    class Recording(SelfRefineDPOTrainer):
        def compute_ref_log_probs(self, model, inputs):
            if not self._precomputes_augmented:
                layer = model.model.layers[0]
                handle = layer.register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape[:2])))
                packed = PackedPairs.from_batch(inputs["input_ids"], inputs["attention_mask"], share_prompt=True)
                batches.append(packed.input_ids)
                try:
                    return super().compute_ref_log_probs(model, inputs)
                finally:
                    handle.remove()
            return super().compute_ref_log_probs(model, inputs)

    widths, batches = [], []
    make_trainer(Recording, SelfRefineDPOConfig, share_prompt=True, precompute_ref_log_probs=True)
    assert widths == [batch.shape for batch in batches] and len(widths) == 2


# Refused


def test_a_plain_dpo_config_does_not_share(make_trainer):
    assert make_trainer(TDPOTrainer, DPOConfig).share_prompt is False


REFUSED = {
    "recurrent": ("mamba", {"state_size": 4}, "mamba has recurrent"),
    "convolutions": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_auto_adjust_ff_dim": False},
        "lfm2 has recurrent, convolutional",
    ),
    "ALiBi": ("bloom", {"n_head": 4, "n_layer": 2}, "not known to be exact for bloom"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("packing", ["padding_free", "share_prompt"])
@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_refused_model(make_trainer, make_model_dir, trainer_class, packing, case):
    """By path and as a loaded model, before the data are looked at."""
    model_type, options, reason = REFUSED[case]
    path = make_model_dir(model_type, **options)
    for model in (path, AutoModelForCausalLM.from_pretrained(path)):
        with pytest.raises(
            ValueError, match=rf"`{packing}=True` is not supported here: .*{reason}.*Or leave out `{packing}"
        ):
            make_trainer(trainer_class, CONFIGS[trainer_class], model=model, dataset=None, **{packing: True})


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_flash_attention_takes_no_shared_prompts(make_trainer, tiny_model_dir, attention):
    options = {"attn_implementation": attention}
    with pytest.raises(ValueError, match=rf"`attn_implementation='{attention}'` cannot put two answers.*'sdpa'"):
        make_trainer(TDPOTrainer, TDPOConfig, share_prompt=True, model_init_kwargs=options)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match="or set `padding_free` alone"):
        make_trainer(TDPOTrainer, TDPOConfig, model=model, share_prompt=True, padding_free=True)
    assert why_not_packed(model, None) is None
    # Sequences by their ends, as its kernels for sequences of uneven lengths take them
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    inputs = PackedPairs.from_batch(ids, (ids > 0).long(), share_prompt=False).model_inputs(model.model)
    assert inputs["attention_mask"] is None
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 4, 7]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4


def test_other_attention_is_refused(make_trainer, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"'paged\|sdpa'` is not known to keep packed sequences apart"):
        make_trainer(TDPOTrainer, TDPOConfig, model=model, padding_free=True)


def test_refused_reference(make_trainer, make_model_dir, tiny_model_dir):
    path = make_model_dir("bloom", n_head=4, n_layer=2)
    with pytest.raises(ValueError, match="not known to be exact for bloom"):
        ref_model = AutoModelForCausalLM.from_pretrained(path)
        make_trainer(TDPOTrainer, TDPOConfig, trainer={"ref_model": ref_model}, share_prompt=True)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_refused_adapter(make_trainer, tiny_model_dir, kind):
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)
    for arguments in ({"trainer": {"peft_config": adapter}}, {"model": model}):
        with pytest.raises(ValueError, match="not supported here: prompt-learning PEFT.*Use LoRA"):
            make_trainer(SelfRefineDPOTrainer, SelfRefineDPOConfig, share_prompt=True, **arguments)


def test_refused_modelling_code(tiny_model_dir, tmp_path):
    """A Llama whose backbone is not the one of transformers, loaded and by its path."""

    class OwnModel(LlamaModel):
        pass

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model = OwnModel(model.config)
    assert "custom modelling code" in why_not_packed(model, TDPOConfig(tmp_path, use_cpu=True))
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.auto_map = {"AutoModelForCausalLM": "modeling.OwnForCausalLM"}
    config.save_pretrained(tmp_path)
    trusting, careful = (TDPOConfig(tmp_path, use_cpu=True, trust_remote_code=trust) for trust in (True, False))
    assert "custom modelling code" in why_not_packed(str(tmp_path), trusting)
    assert why_not_packed(str(tmp_path), careful) is None  # transformers' own code is taken


def test_a_batch_with_more_for_the_model_is_refused(make_trainer):
    trainer = make_trainer(TDPOTrainer, TDPOConfig, share_prompt=True)
    batch = first_batch(trainer)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(ValueError, match="this batch has token_type_ids for the model too"):
        train_step(trainer, batch)


# FlexAttention


def tiny_llama(attention: str) -> LlamaForCausalLM:
    """FlexAttention's kernels want heads of 16 at least."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=attention))


def ragged_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs, of prompts of 140 and 10 tokens: more than one block of FlexAttention's."""
    ids = torch.randint(3, 50, (4, 180), generator=torch.Generator().manual_seed(0))
    ids[2, :140], ids[3, :10] = ids[0, :140], ids[1, :10]
    lengths = torch.tensor([180, 30, 150, 40])
    return ids, (torch.arange(180) < lengths.unsqueeze(1)).long()


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize(("share_prompt", "multiple"), [(True, 64), (True, 1), (False, 64), (False, 1)])
def test_one_padded_product_for_a_gpu(share_prompt, multiple, window):
    """Oracle: one product per run, in values and gradients."""
    packed = PackedPairs.from_batch(*ragged_batch(), share_prompt=share_prompt, pad_to_multiple_of=multiple)
    mask = torch.tensor([[[[*run, window] for run in packed.runs()]]]).as_subclass(RunMask)
    assert padded_runs(mask, torch.device("cpu"))[2].any(dim=-1).all(), "a row without a key"
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    results = []
    for attention in (attention_by_runs, attention_by_padded_runs):
        generator = torch.Generator().manual_seed(0)
        states = [
            torch.randn(
                1, heads, packed.input_ids.size(1), 8, generator=generator, dtype=torch.float64
            ).requires_grad_()
            for heads in (4, 2, 2)
        ]
        output, _ = attention(module, *states, mask)
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum().backward()
        results.append([output.detach(), *(x.grad for x in states)])
    torch.testing.assert_close(*results)


# torch.compile (torch 2.11 and 2.13, and transformers 5.17, which calls it) warns about parts of torch itself while it compiles
COMPILES = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("share_prompt", [True, False])
@torch.no_grad()
def test_flex_attention_forward(share_prompt):
    """Compiled for the CPU, which knows its forward only. Oracle: SDPA on the batch itself."""
    torch.compiler.reset()  # for a second length, torch (2.13) compiles kernels for any length, which for CPUs is not valid C++
    ids, mask = ragged_batch()
    packed = PackedPairs.from_batch(ids, mask, share_prompt=share_prompt)
    flex = tiny_llama("flex_attention").model
    inputs = packed.model_inputs(flex)
    assert isinstance(inputs["attention_mask"], BlockMask)
    found = packed.take(flex(**inputs).last_hidden_state, mask.bool())
    expected = tiny_llama("sdpa").model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


GPU_ATTENTION = {
    "packed_sdpa": torch.float32,
    "flex_attention": torch.float32,
    "flash_attention_2": torch.bfloat16,
    "kernels-community/flash-attn2": torch.bfloat16,
}


@COMPILES
@pytest.mark.gpu
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("attention", GPU_ATTENTION)
@pytest.mark.parametrize("window", [None, 32])
def test_on_gpu(attention, share_prompt, window):
    """States and gradients, each beside those of SDPA on the batch itself."""
    if "flash" in attention and share_prompt:
        pytest.skip("FlashAttention takes no shared prompts")
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    elif "flash" in attention:
        pytest.importorskip("kernels")
    dtype, (ids, mask) = GPU_ATTENTION[attention], (x.cuda() for x in ragged_batch())
    packed = PackedPairs.from_batch(ids, mask, share_prompt=share_prompt)
    sizes = {**SIZES, "hidden_size": 64, "vocab_size": 50, "sliding_window": window}
    states, gradients = [], []
    for implementation in (attention, "sdpa"):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**sizes, attn_implementation=implementation)).to("cuda", dtype).model
        if not states:
            found = packed.take(model(**packed.model_inputs(model)).last_hidden_state, mask.bool())
        else:
            found = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        # Not the sum of squares: RMSNorm makes that a constant, whose gradient is rounding
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).cuda()
        (found.float() * direction).sum().backward()
        states.append(found.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(*gradients, strict=True):
        assert (gradient - expected).abs().max() <= 10 * tolerance * expected.abs().max()
