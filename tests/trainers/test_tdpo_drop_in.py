"""
`TDPOTrainer` in the place of `trl.DPOTrainer`: the datasets, references, models, memory savers and batch shapes that the
parent takes. The oracles are float64 full logits, `DPOTrainer` itself where alpha is 0, and runs that must coincide; what
the parent refuses must be refused in its words.
"""

import importlib
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import IA3Config, LoraConfig, get_peft_model
from tests.benchmarks.tdpo import FullLogitsTDPOTrainer
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
from tests.invariant import record
from tests.oracles import tdpo as oracle
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from trl import DPOConfig, DPOTrainer

from trl_ext import TDPOConfig, TDPOTrainer


LN_2 = torch.tensor(2.0).log().item()  # in fp32, as the loss
PAPER = {"beta": 0.1, "alpha": 0.5, "variant": "tdpo2"}  # the defaults
# Alpha 0 in the place of DPO: the two must coincide
BOTH = [(TDPOTrainer, TDPOConfig, {"alpha": 0.0}), (DPOTrainer, DPOConfig, {})]


def paper_losses(policy, ref, batch: dict, **loss_kwargs) -> torch.Tensor:
    """TDPO's losses, `(B,)`, of a collated batch; `policy` and `ref` return its logits."""
    labels, mask = labels_and_mask(batch)
    return oracle.tdpo_loss_from_logits(policy(batch), ref(batch), labels, mask, **loss_kwargs)


def step_losses(trainer) -> list[float]:
    """Trains, and returns the loss of every optimizer step."""
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# Streaming datasets


def test_streaming_training_set(make_trainer, conversational_pairs):
    """
    The losses of a map-style dataset read in order, bit for bit, over more than one epoch; with alpha 0, the losses of
    `DPOTrainer` on the same stream. In the reverse order they are others, so the order is seen in them.
    """
    options = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2}

    def losses(dataset, trainer_class=TDPOTrainer, config_class=TDPOConfig, **more):
        return step_losses(make_trainer(trainer_class, config_class, dataset=dataset, **options, **more))

    streamed = losses(conversational_pairs.to_iterable_dataset())
    assert len(streamed) == 6
    assert streamed[0] == pytest.approx(LN_2)
    assert streamed == losses(conversational_pairs, train_sampling_strategy="sequential")
    backwards = conversational_pairs.select(range(7, -1, -1)).to_iterable_dataset()
    assert losses(backwards)[1:] != pytest.approx(streamed[1:], abs=1e-2)
    stream = conversational_pairs.to_iterable_dataset()
    ours, stock = (losses(stream, cls, config_cls, **more) for cls, config_cls, more in BOTH)
    assert ours == pytest.approx(stock, rel=1e-4)


def test_streaming_evaluation_set(make_trainer, conversational_pairs):
    """The metrics of the same rows in memory; `test_evaluation_matches_the_paper` has those against full logits."""
    results = []
    for dataset in (conversational_pairs, conversational_pairs.to_iterable_dataset()):
        trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"eval_dataset": dataset})
        perturb(trainer.model)
        results.append({name: value for name, value in trainer.evaluate().items() if "per_second" not in name})
        results[-1].pop("eval_runtime")
    assert results[1]["eval_position_kl/rejected"] > 0
    assert results[0] == results[1]


# Several evaluation datasets


@pytest.mark.parametrize("given", ["to the constructor", "to evaluate"])
def test_evaluation_sets_by_name(make_trainer, tiny_model_dir, conversational_pairs, given):
    """Oracle: float64 full logits of each dataset. The names are `DPOTrainer`'s, and ours beside them."""
    datasets = {"first": conversational_pairs.select(range(4)), "last": conversational_pairs.select(range(4, 8))}
    results = []
    for trainer_class, config_class, _ in BOTH:
        at_construction = {"eval_dataset": datasets} if given == "to the constructor" else None
        trainer = make_trainer(trainer_class, config_class, trainer=at_construction)
        perturb(trainer.model)
        results.append(trainer.evaluate() if at_construction else trainer.evaluate(datasets))
        if trainer_class is TDPOTrainer:
            ours = trainer
    added = {"position_kl/chosen", "position_kl/rejected", "position_kl/margin"}
    added |= {"rewards_tdpo/chosen", "rewards_tdpo/rejected"}
    assert results[0].keys() == results[1].keys() | {f"eval_{name}" for name in added}

    policy, ref = FullLogits(tiny_model_dir, ours.model.state_dict()), FullLogits(tiny_model_dir)
    for name, dataset in datasets.items():
        trainer = make_trainer(TDPOTrainer, TDPOConfig, dataset=dataset)
        losses = paper_losses(policy, ref, first_batch(trainer), **PAPER)
        assert results[0][f"eval_{name}_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


# References


def test_reference_beside_a_new_adapter(make_trainer, tiny_model_dir, lora_config):
    """Oracle: float64 full logits. A `ref_model` that is given is the reference, and not the model without adapter."""
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    weights = {name: weight.clone() for name, weight in ref_model.state_dict().items()}
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"ref_model": ref_model, "peft_config": lora_config})
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    expected = paper_losses(policy, FullLogits(tiny_model_dir, weights), batch, **PAPER).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


def test_reference_beside_a_trained_adapter(make_trainer, tiny_model_dir, lora_config):
    """Oracle: float64 full logits. A `PeftModel` with a `ref_model` gets no "ref" copy of its adapter."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), lora_config)
    perturb(model, scale=0.2, seed=2)
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    perturb(ref_model, seed=3)
    weights = {name: weight.clone() for name, weight in ref_model.state_dict().items()}
    trainer = make_trainer(TDPOTrainer, TDPOConfig, model=model, trainer={"ref_model": ref_model})
    assert set(trainer.model.peft_config) == {"default"}
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy = FullLogits(tiny_model_dir, trainer.model.state_dict(), lora_config)
    expected = paper_losses(policy, FullLogits(tiny_model_dir, weights), batch, **PAPER).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients())


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
    }[case]()


@pytest.mark.parametrize(
    "case",
    [
        *("reference by path", "reference is the policy", "sync_ref_model with an adapter"),
        *("sync_ref_model with an adapter and a reference", "two adapters", "adapter on the head"),
        *("quantization of an instance", "router loss without router", "list as a dataset", "no dataset"),
        "images without a processor",
    ],
)
def test_refused_as_dpo_refuses(make_trainer, tiny_model_dir, conversational_pairs, lora_config, case):
    """`DPOTrainer`'s error, of the same type and in the same words."""
    errors = []
    for trainer_class, config_class, options in BOTH:
        arguments = arguments_of_refusal(case, tiny_model_dir, conversational_pairs, lora_config)
        with pytest.raises((ValueError, TypeError, AttributeError, NotImplementedError)) as error:
            make_trainer(trainer_class, config_class, **options, **arguments)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


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


class StepRecordingTrainer(TDPOTrainer):
    """Keeps the batch, the loss and the gradients of each step of the training loop."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        self.__dict__.setdefault("steps", []).append((dict(inputs), loss, gradients))
        return loss


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_saved_tensors_may_be_carried_away(make_trainer, lora_config, variant, adapter):
    """
    Oracle: the step without. In the context where TRL enters `activation_offloading`'s hooks, loss and gradients are
    bitwise those without, and what the head keeps for the backward (N completion positions) goes through the hooks.
    """
    steps = []
    for hooks in (None, PackedAway()):
        trainer = make_trainer(
            StepRecordingTrainer,
            TDPOConfig,
            variant=variant,
            max_steps=1,
            trainer={"peft_config": lora_config} if adapter else None,
        )
        perturb(trainer.model)
        if hooks is not None:
            trainer.maybe_activation_offload_context = hooks
        trainer.train()
        steps += trainer.steps
    (batch, loss, gradients), (_, carried_loss, carried_gradients) = steps
    positions = int(batch["completion_mask"][:, 1:].sum())
    vocabulary, width = trainer.model.get_output_embeddings().weight.shape
    assert (positions, width) in hooks.shapes
    assert ((positions, vocabulary) in hooks.shapes) == (not adapter)  # a trained head keeps its gradient tile
    assert all(gradient.any() for gradient in gradients.values())
    torch.testing.assert_close((carried_loss, carried_gradients), (loss, gradients), rtol=0, atol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the parent accepts it where there is an accelerator")
def test_activation_offloading_without_accelerator(make_trainer):
    """TRL moves activations off an accelerator; without one its context fails, and so does ours, in the same way."""
    errors = []
    for trainer_class, config_class, options in BOTH:
        with pytest.raises(AttributeError) as error:
            make_trainer(trainer_class, config_class, activation_offloading=True, **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_activation_offloading(make_trainer, lora_config, adapter):
    """Oracle: the steps without. TRL's own hooks, which move what is larger than 1024 bytes; the policy moves, too."""
    steps = []
    for offloading in (False, True):
        trainer = make_trainer(
            StepRecordingTrainer,
            TDPOConfig,
            use_cpu=False,
            activation_offloading=offloading,
            learning_rate=1e-2,
            max_steps=2,
            trainer={"peft_config": lora_config} if adapter else None,
        )
        trainer.train()
        steps.append([step[1:] for step in trainer.steps])
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing(make_trainer, lora_config, use_reentrant, adapter):
    """
    Oracle: the step without. The layers run once more for the backward, under the policy only: the reference of an
    adapter runs the same layers once.
    """
    results, calls = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(
            TDPOTrainer,
            TDPOConfig,
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
        results.append(
            (losses, loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}),
        )
    assert calls == ([2, 3] if adapter else [1, 2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


# Architectures


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
# The head of each: what the full logits have that `h Wᵀ` has not
ARCHITECTURES = {
    "gpt2: tied": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}),
    "gpt_neox: embed_out": ("gpt_neox", {"tie_word_embeddings": False}),
    "phi: bias": ("phi", {}),
    "gemma2: tied, soft cap": (
        "gemma2",
        {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "cohere: tied, scale": ("cohere", {"logit_scale": 0.25}),
    "granite: divisor": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.25}),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3: untied": ("qwen3", {"head_dim": 16}),
    "llama: tied": ("llama", {"tie_word_embeddings": True}),
}


@pytest.fixture
def architecture_dir(request, tiny_model_dir, tmp_path):
    """A directory with a one-layer random model of an entry of `ARCHITECTURES`, for the tiny Llama's tokenizer."""
    model_type, options = ARCHITECTURES[request.param]
    llama = AutoConfig.from_pretrained(tiny_model_dir)
    tokens = {"pad_token_id": llama.pad_token_id, "eos_token_id": llama.eos_token_id, "bos_token_id": None}
    sizes = {} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, vocab_size=llama.vocab_size, **tokens, **{**sizes, **options})
    torch.manual_seed(0)
    path = tmp_path / model_type
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.mark.parametrize("architecture_dir", ARCHITECTURES, ids=str, indirect=True)
def test_architecture(make_trainer, architecture_dir):
    """Oracle: float64 full logits of the model in transformers; loss, KLs, mean logits and every gradient."""
    trainer = make_trainer(TDPOTrainer, TDPOConfig, model=str(architecture_dir), alpha=0.7, beta=0.3)
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)

    policy, ref = FullLogits(architecture_dir, trainer.model.state_dict()), FullLogits(architecture_dir)
    expected = paper_losses(policy, ref, batch, beta=0.3, alpha=0.7, variant="tdpo2").mean()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, policy.gradients(), tolerance=1e-3)
    _, mask = labels_and_mask(batch)
    chosen_kl, rejected_kl = oracle.sequence_kl(policy(batch), ref(batch), mask).chunk(2)
    chosen_logits, _ = policy(batch).mean(dim=-1).chunk(2)
    metrics = step_metrics(trainer)
    assert metrics["position_kl/chosen"] == pytest.approx(chosen_kl.mean().item(), rel=1e-4)
    assert metrics["position_kl/rejected"] == pytest.approx(rejected_kl.mean().item(), rel=1e-4)
    assert metrics["logits/chosen"] == pytest.approx(chosen_logits[mask[:4].bool()].mean().item(), abs=1e-5)


# Adapters other than LoRA


ADAPTERS = {
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": list(range(20, 40))},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("adapter", [*ADAPTERS, "ia3"])
def test_kind_of_adapter(make_trainer, adapter):
    """Oracle: the full logits of the PEFT model itself, with its adapter and without, and their autograd."""
    if adapter == "ia3":
        peft_config = IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    else:
        peft_config = LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter])
    trainer = make_trainer(TDPOTrainer, TDPOConfig, trainer={"peft_config": peft_config})
    perturb(trainer.model)
    batch = first_batch(trainer)
    loss = train_step(trainer, batch)
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), trainer.model.disable_adapter():
        ref_logits = trainer.model(**inputs).logits[:, :-1]
    trainer.model.zero_grad()
    labels, mask = labels_and_mask(batch)
    policy_logits = trainer.model(**inputs).logits[:, :-1]
    expected = oracle.tdpo_loss_from_logits(policy_logits, ref_logits, labels, mask, **PAPER).mean()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_close(trainer.model, gradients)


# Quantized base


@pytest.mark.parametrize(
    ("adapter_dtype", "tolerance"),
    [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)],
    ids=["bf16 adapter", "fp32 adapter"],
)
def test_nf4_base(make_trainer, tiny_model_dir, lora_config, adapter_dtype, tolerance):
    """
    Oracle: float64 full logits of the dequantized base with the same adapter. DPOTrainer puts a quantized model's
    adapter in bf16, whose 8 bits the tolerance allows for; with the same adapter in fp32 nothing is left to allow for.
    """
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = make_trainer(
        TDPOTrainer, TDPOConfig, trainer={"peft_config": lora_config, "quantization_config": quantization}
    )
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.bfloat16 for parameter in trainable)
    perturb(trainer.model)
    for parameter in trainable:
        parameter.data = parameter.data.to(adapter_dtype)
    batch = first_batch(trainer)
    trainer.evaluate(
        trainer.train_dataset
    )  # bitsandbytes must not repack the base for inference, and so cut the gradients
    loss = train_step(trainer, batch)
    assert loss.isfinite()

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
    expected = paper_losses(policy, FullLogits(tiny_model_dir, ref_weights), batch, **PAPER).mean()
    expected.backward()
    assert abs(expected.item() - LN_2) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    assert_gradients_close(trainer.model, policy.gradients(), tolerance=tolerance)


# Vision-language models


VISION_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def random_images(count: int) -> list:
    """PIL images of 8 × 8 random pixels."""
    Image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny_llava_dir(tiny_model_dir, tmp_path_factory):
    """
    A random LLaVA of a two-layer CLIP (images of 8 × 8 pixels, four patches) and a one-layer Llama, and its processor, the
    variant that needs no torchvision.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens("<image>", special_tokens=True)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VISION_TEMPLATE,
    )
    vision = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "initializer_range": 0.2, "model_type": "clip_vision_model"}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SIZES, **tokens).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        **tokens,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-llava")
    LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image_pairs():
    """The preference rows with one image each, but for two rows without."""
    rows = []
    for i, ((prompt, chosen, rejected), image) in enumerate(zip(PAIRS, random_images(len(PAIRS)), strict=True)):
        row = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "images": [] if i in (2, 5) else [image],
        }
        rows.append(row)
    return Dataset.from_list(rows)


class VisionFullLogits(FullLogits):
    """The float64 oracle of a vision-language model, which also takes the batch's images."""

    def __init__(self, model_dir, state_dict=None):
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float64)
        if state_dict is not None:
            self.model.load_state_dict(state_dict)

    def __call__(self, batch: dict):
        kwargs = {key: value for key, value in batch.items() if key != "completion_mask"}
        return self.model(**kwargs, use_cache=False).logits[:, :-1]


def freeze_what_learns_nothing(model) -> None:
    """
    Freezes what has no gradient but rounding: the last norm of CLIP, which patches do not pass, and the biases of its
    keys, the same for every key, which the softmax takes out again.
    """
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name or name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)


def test_images_with_alpha_zero_are_dpo(make_trainer, tiny_llava_dir, image_pairs):
    """Limit: TDPO2 with alpha 0 gives `DPOTrainer`'s loss, gradients and metrics on images; the vision tower learns."""
    trainers, losses = [], []
    for trainer_class, config_class, options in BOTH:
        trainer = make_trainer(
            trainer_class,
            config_class,
            model=str(tiny_llava_dir),
            dataset=image_pairs,
            trainer={"processing_class": AutoProcessor.from_pretrained(tiny_llava_dir)},
            **options,
        )
        freeze_what_learns_nothing(trainer.model)
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in trainers[1].model.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in stock_gradients)
    assert_gradients_close(trainers[0].model, stock_gradients, tolerance=1e-4)
    metrics, stock_metrics = (step_metrics(trainer) for trainer in trainers)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_images_match_the_paper(make_trainer, tiny_llava_dir, image_pairs, variant):
    """Oracle: float64 full logits of the same images and weights; loss, KLs and every gradient."""
    trainer = make_trainer(
        TDPOTrainer,
        TDPOConfig,
        model=str(tiny_llava_dir),
        dataset=image_pairs,
        variant=variant,
        trainer={"processing_class": AutoProcessor.from_pretrained(tiny_llava_dir)},
    )
    freeze_what_learns_nothing(trainer.model)
    perturb(trainer.model)
    batch = first_batch(trainer)
    assert batch["pixel_values"].shape == (6, 3, 8, 8)  # three rows of four have an image, chosen and rejected
    loss = train_step(trainer, batch)

    policy, ref = VisionFullLogits(tiny_llava_dir, trainer.model.state_dict()), VisionFullLogits(tiny_llava_dir)
    expected = paper_losses(policy, ref, batch, **PAPER | {"variant": variant}).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    learnt = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    exact = {name: gradient for name, gradient in policy.gradients().items() if name in learnt}
    assert_gradients_close(trainer.model, exact, tolerance=1e-3)
    chosen_kl, rejected_kl = oracle.sequence_kl(policy(batch), ref(batch), labels_and_mask(batch)[1]).chunk(2)
    metrics = step_metrics(trainer)
    assert metrics["position_kl/chosen"] == pytest.approx(chosen_kl.mean().item(), rel=1e-4) and chosen_kl.min() > 0
    assert metrics["position_kl/rejected"] == pytest.approx(rejected_kl.mean().item(), rel=1e-4)


def test_images_in_the_training_loop(make_trainer, tiny_llava_dir, image_pairs):
    """With alpha 0, the losses of `DPOTrainer` over several steps and an evaluation, which both start at ln 2."""
    results = []
    for trainer_class, config_class, options in BOTH:
        trainer = make_trainer(
            trainer_class,
            config_class,
            model=str(tiny_llava_dir),
            dataset=image_pairs,
            learning_rate=1e-3,
            max_steps=4,
            trainer={
                "processing_class": AutoProcessor.from_pretrained(tiny_llava_dir),
                "eval_dataset": image_pairs,
            },
            **options,
        )
        results.append([trainer.evaluate()["eval_loss"], *step_losses(trainer)])
    assert results[0][:2] == pytest.approx([LN_2] * 2, rel=1e-6)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.fixture(scope="module")
def tiny_qwen_vl_dir(tiny_model_dir, tmp_path_factory):
    """A random Qwen2.5-VL of one vision block and one layer: rotary positions in three dimensions."""
    llama = AutoConfig.from_pretrained(tiny_model_dir)
    tokens = {"pad_token_id": llama.pad_token_id, "eos_token_id": llama.eos_token_id, "bos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={
            **SIZES,
            **tokens,
            "vocab_size": llama.vocab_size + 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
            **{"patch_size": 2, "window_size": 8, "fullatt_block_indexes": [0], "initializer_range": 0.2},
        },
        **dict(zip(("image_token_id", "video_token_id"), range(llama.vocab_size, llama.vocab_size + 2), strict=True)),
        vision_start_token_id=llama.vocab_size + 2,
        vision_end_token_id=llama.vocab_size + 3,
        **tokens,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-qwen-vl")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    return path


def test_images_of_a_hand_made_batch(make_trainer, tiny_qwen_vl_dir):
    """
    Qwen2.5-VL, whose processor needs torchvision for videos: its batch is put together here from the image processor's
    patches, with the keys that `DPOTrainer`'s collator would give it. Oracles: `DPOTrainer` at alpha 0, and float64 full
    logits at alpha 0.5.
    """
    config = AutoConfig.from_pretrained(tiny_qwen_vl_dir)
    images = Qwen2VLImageProcessorPil(patch_size=2, min_pixels=64, max_pixels=64)(
        random_images(4), return_tensors="pt"
    )
    patches = [int(grid.prod()) // 4 for grid in images["image_grid_thw"]]
    assert patches == [4] * 4

    def row(completion: list[int]) -> list[int]:
        image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
        return [*image, 11, 12, 13, *completion, *[0] * (6 - len(completion))]

    completions = [
        [20, 21, 22],
        [23, 24, 25, 26, 27, 28],
        [29, 30],
        [31, 32, 33, 34],
        [35],
        [36, 37, 38],
        [39],
        [40, 41],
    ]
    input_ids = torch.tensor([row(completion) for completion in completions])
    batch = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "completion_mask": ((input_ids != 0) & (torch.arange(15) >= 9)).long(),
        "mm_token_type_ids": (input_ids == config.image_token_id).long(),
        "pixel_values": images["pixel_values"].repeat(2, 1),
        "image_grid_thw": images["image_grid_thw"].repeat(2, 1),
    }

    losses, trainers = [], []
    for trainer_class, config_class, options in [*BOTH, (TDPOTrainer, TDPOConfig, {"alpha": 0.5})]:
        trainer = make_trainer(trainer_class, config_class, model=str(tiny_qwen_vl_dir), **options)
        perturb(trainer.model)
        losses.append(train_step(trainer, dict(batch)))
        trainers.append(trainer)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-7, rtol=1e-6)
    stock_gradients = {name: p.grad for name, p in trainers[1].model.named_parameters()}
    assert any("visual" in name for name in stock_gradients)
    assert_gradients_close(trainers[0].model, stock_gradients, tolerance=1e-4)

    policy = VisionFullLogits(tiny_qwen_vl_dir, trainers[2].model.state_dict())
    expected = paper_losses(policy, VisionFullLogits(tiny_qwen_vl_dir), batch, **PAPER).mean()
    expected.backward()
    assert losses[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3
    assert_gradients_close(trainers[2].model, policy.gradients(), tolerance=1e-3)


# Gradient accumulation


@pytest.mark.parametrize(("trainer_class", "config_class", "options"), [(TDPOTrainer, TDPOConfig, {}), BOTH[1]])
def test_gradient_accumulation(make_trainer, conversational_pairs, trainer_class, config_class, options):
    """
    Eight batches of one pair are one batch of eight: the same losses, gradient norms and weights after five steps over
    two shuffled epochs, as in `DPOTrainer`. The loss is a mean over pairs, so it is the mean of the pairs' own losses
    however they are batched. It holds for "sigmoid" alone: "sft" is a mean over the tokens of a batch, of which some
    have more than others.

    Adam divides each weight's update by its gradient's size, rounding and all, hence the tolerance: half a percent of an
    update. The difference seen is 2e-7.
    """
    dataset = concatenate_datasets([conversational_pairs] * 3).shuffle(seed=0)
    results = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            trainer_class,
            config_class,
            dataset=dataset,
            learning_rate=1e-3,
            max_steps=5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        trainer.train()
        logs = trainer.state.log_history[:5]
        results.append((logs, trainer.model.state_dict()))
    (logs, weights), (accumulated_logs, accumulated_weights) = results
    assert logs[-1]["loss"] < logs[0]["loss"]
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        expected = [log[name] for log in logs]
        assert [log[name] for log in accumulated_logs] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(accumulated_weights, weights, rtol=0, atol=5e-6)


# Memory and work of the head


KERNEL = "trl_ext.kernels.position_kl"  # the module with `TILE_ELEMENTS`
LARGE_VOCABULARY, TILE_ROWS = 5000, 10


class HeadProbe(TorchDispatchMode):
    """
    Watches every operation of a step: keeps the shapes of the tensors it made with more elements than a tile of logits,
    in fp32 or wider, and counts the FLOP of the matrix products with the head.
    """

    def __init__(self):
        super().__init__()
        self.large: dict[tuple[int, ...], int] = {}
        self.flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.itemsize >= 4
                and tensor.numel() > TILE_ROWS * LARGE_VOCABULARY
                and tensor.untyped_storage().data_ptr() not in given  # neither a view nor in place
            ):
                shape = tuple(tensor.shape)
                self.large[shape] = self.large.get(shape, 0) + 1
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if max(*a.shape, *b.shape) > 1000:  # no other product has a side this long
                self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.fixture(scope="module")
def large_vocabulary_dir(tiny_model_dir, tmp_path_factory):
    """The tiny Llama with 5000 words, of which the tokenizer uses the first."""
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.vocab_size = LARGE_VOCABULARY
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("large-vocabulary")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def large_trainer(make_trainer, large_vocabulary_dir, conversational_pairs, monkeypatch):
    """Returns a function that builds a trainer on 5000 words whose tiles of logits have ten rows."""
    monkeypatch.setitem(importlib.import_module(KERNEL).TILE_ELEMENTS, "cpu", TILE_ROWS * LARGE_VOCABULARY)

    def make(trainer_class=TDPOTrainer, **options):
        defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        options["trainer"] = {"eval_dataset": conversational_pairs, **(options.get("trainer") or {})}
        return make_trainer(trainer_class, TDPOConfig, model=str(large_vocabulary_dir), **{**defaults, **options})

    return make


def completion_tokens(trainer) -> int:
    (batch,) = trainer.get_eval_dataloader()
    return int(batch["completion_mask"][:, 1:].sum())


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize(("adapter", "gemms"), [(True, 3), (False, 4)], ids=["lora", "full"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_training_step_is_flat(large_trainer, lora_config, variant, adapter, gemms, bf16):
    """
    A whole step of the training loop, optimizer and all. With a frozen head nothing is larger than a tile of logits; with
    a trained one only tensors of its weight's shape and, once, the `[N, V]` gradient that the kernel keeps (in fp32 if
    the step is). The head takes 3 GEMMs of 2·N·V·H FLOP where it is frozen and 4 where it is trained; `DPOTrainer`'s
    kernels take 4 and 5.
    """
    trainer = large_trainer(variant=variant, bf16=bf16, trainer={"peft_config": lora_config} if adapter else None)
    positions = completion_tokens(trainer)
    assert positions > 5 * TILE_ROWS
    with HeadProbe() as probe:
        trainer.train()
    allowed = set() if adapter else {(LARGE_VOCABULARY, 32), (32, LARGE_VOCABULARY)}
    if not adapter and not bf16:
        allowed.add((positions, LARGE_VOCABULARY))
    assert probe.large.keys() <= allowed
    assert probe.large.get((positions, LARGE_VOCABULARY), 0) <= 1
    assert 2 < probe.flop / (2 * positions * LARGE_VOCABULARY * 32) <= gemms


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_evaluation_is_flat(large_trainer, lora_config, adapter):
    """An evaluation makes nothing larger than a tile of logits, and takes one GEMM with each model's head."""
    trainer = large_trainer(trainer={"peft_config": lora_config} if adapter else None)
    with HeadProbe() as probe:
        trainer.evaluate()
    assert probe.large == {}
    assert probe.flop == 2 * 2 * completion_tokens(trainer) * LARGE_VOCABULARY * 32


def test_probe_sees_full_logits(large_trainer):
    """The control: TDPO as its paper's code computes it has `(2B, T, V)` tensors in fp32, and the probe finds them."""
    trainer = large_trainer(FullLogitsTDPOTrainer)
    (batch,) = trainer.get_eval_dataloader()
    rows, length = batch["input_ids"].shape
    with HeadProbe() as probe:
        trainer.evaluate()
    assert probe.large[rows, length - 1, LARGE_VOCABULARY] > 3


# Recorded trajectories


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
