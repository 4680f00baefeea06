"""
`TDPOTrainer` and images: `trl.DPOTrainer` at α = 0, and the paper in float64 from full logits. Sr-DPO refuses them.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.conftest import (
    PAIRS,
    TINY,
    FullLogits,
    assert_gradients_close,
    first_batch,
    perturb,
    step_metrics,
    train_step,
)
from tests.trainers.methods import LN_2, METHODS, Method, Paper, step_losses
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from trl import DPOConfig, DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer


SIZES = {**TINY, "num_hidden_layers": 1, "num_attention_heads": 2}
# TDPO at alpha 0 and DPO, which must coincide
BOTH = [(TDPOTrainer, TDPOConfig, {"alpha": 0.0}), (DPOTrainer, DPOConfig, {})]
TDPO = Method(TDPOTrainer, TDPOConfig)  # the defaults


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


@pytest.fixture
def make(make_trainer, tiny_llava_dir, image_pairs):
    """Returns a function that builds a trainer on the tiny LLaVA and the pairs with images."""

    def make(trainer_class, config_class, *, trainer=None, **options):
        arguments = {"processing_class": AutoProcessor.from_pretrained(tiny_llava_dir), **(trainer or {})}
        return make_trainer(
            trainer_class, config_class, model=str(tiny_llava_dir), dataset=image_pairs, trainer=arguments, **options
        )

    return make


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


def assert_is_dpo(trainers: list, losses: list, tower: str) -> None:
    """Loss and gradients of two trainers, ours and `DPOTrainer`, after a step; the vision tower has learned."""
    torch.testing.assert_close(*losses, atol=1e-7, rtol=1e-6)
    gradients = {name: p.grad for name, p in trainers[1].model.named_parameters() if p.requires_grad}
    assert any(tower in name for name in gradients)
    assert_gradients_close(trainers[0].model, gradients, tolerance=1e-4)


def test_images_with_alpha_zero_are_dpo(make):
    """Limit: TDPO2 with alpha 0 gives `DPOTrainer`'s loss, gradients and metrics on images; the vision tower learns."""
    trainers, losses = [], []
    for trainer_class, config_class, options in BOTH:
        trainer = make(trainer_class, config_class, **options)
        freeze_what_learns_nothing(trainer.model)
        perturb(trainer.model)
        losses.append(train_step(trainer, first_batch(trainer)))
        trainers.append(trainer)
    assert_is_dpo(trainers, losses, "vision_tower")
    metrics, stock_metrics = (step_metrics(trainer) for trainer in trainers)
    assert {name: metrics[name] for name in stock_metrics} == pytest.approx(stock_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["tdpo1", "tdpo2"])
def test_images_match_the_paper(make, tiny_llava_dir, method):
    """Oracle: float64 full logits of the same images and weights; loss, KLs and every gradient."""
    trainer = make(TDPOTrainer, TDPOConfig, **METHODS[method].options)
    freeze_what_learns_nothing(trainer.model)
    perturb(trainer.model)
    batch = first_batch(trainer)
    assert batch["pixel_values"].shape == (6, 3, 8, 8)  # three rows of four have an image, chosen and rejected
    loss = train_step(trainer, batch)

    policy, ref = VisionFullLogits(tiny_llava_dir, trainer.model.state_dict()), VisionFullLogits(tiny_llava_dir)
    paper = Paper(METHODS[method], policy, ref, batch)
    expected = paper.loss()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    learnt = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    exact = {name: gradient for name, gradient in policy.gradients().items() if name in learnt}
    assert_gradients_close(trainer.model, exact, tolerance=1e-3)
    assert paper.kls.min() > 0
    metrics, expected_metrics = step_metrics(trainer), paper.metrics()
    assert {name: metrics[name] for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


def test_images_in_the_training_loop(make, image_pairs):
    """With alpha 0, the losses of `DPOTrainer` over several steps and an evaluation, which both start at ln 2."""
    results = []
    for trainer_class, config_class, options in BOTH:
        options = options | {"learning_rate": 1e-3, "max_steps": 4}
        trainer = make(trainer_class, config_class, trainer={"eval_dataset": image_pairs}, **options)
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
    assert_is_dpo(trainers[:2], losses[:2], "visual")

    policy = VisionFullLogits(tiny_qwen_vl_dir, trainers[2].model.state_dict())
    expected = Paper(TDPO, policy, VisionFullLogits(tiny_qwen_vl_dir), batch).loss()
    expected.backward()
    assert losses[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3
    assert_gradients_close(trainers[2].model, policy.gradients(), tolerance=1e-3)


def test_self_refinement_refuses_images(make):
    with pytest.raises(ValueError, match="does not support vision datasets"):
        make(SelfRefineDPOTrainer, SelfRefineDPOConfig)
