"""
The memory estimate. Oracles: Llama 3.1 8B's sizes worked out by hand from its configuration, and real models, adapters,
optimizers, caches and quantized weights on the CPU.
"""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl import DPOConfig, ModelConfig, get_peft_config

from trl_ext import TDPOConfig
from trl_ext.aries.config import GenerationConfig
from trl_ext.doctor.memory import OVERHEAD, concurrency, engine_dtype, engine_memory, kv_bytes, training_memory
from trl_ext.doctor.shape import model_shape, saved_bytes


LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def llama_8b():
    """Llama 3.1 8B: 32 layers, hidden 4096, 32 heads, 8 of them for keys and values, feed-forward 14336, vocabulary 128256."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def shape_8b(llama_8b):
    return model_shape(llama_8b, ModelConfig(**LORA))


def config_of(**keys) -> DPOConfig:
    args = DPOConfig(output_dir="out", use_cpu=True, bf16=False, **keys)
    args.bf16 = True  # not checked again: the estimate is for a GPU
    return args


class TestByHand:
    def test_sizes(self, shape_8b):
        """
        A layer's linear parameters: q and o 4096 × 4096, k and v 4096 × 1024, three of 4096 × 14336, together 218,103,808;
        its norms 2 × 4096. All: 32 layers, embeddings and head 128256 × 4096 each, the last norm. LoRA at rank 16 on q and
        v: 16 × (4096 + 4096) + 16 × (4096 + 1024) a layer. KV: 2 × 32 layers × 8 heads × 128.
        """
        linear = 32 * 218_103_808
        assert sum(shape_8b.linear) == linear
        assert shape_8b.parameters == linear + 32 * 2 * 4096 + 2 * 128256 * 4096 + 4096 == 8_030_261_248
        assert shape_8b.lora == 32 * (16 * 8192 + 16 * 5120) == 6_815_744
        assert shape_8b.kv_elements == 2 * 32 * 8 * 128
        assert kv_bytes(shape_8b, "bfloat16") == 131_072

    def test_nf4(self, shape_8b):
        """Half a byte per linear parameter and 4 bytes per 64 of them; the remaining 1,050,939,392 in 2 bytes."""
        expected = 3_489_660_928 + 436_207_616 + 2 * 1_050_939_392
        assert shape_8b.nf4("bfloat16", nested=False) == expected

    def test_full_training(self, llama_8b):
        """Weights, gradients, two Adam states and the reference, 4 bytes each; 16-bit copies of the linear layers."""
        shape = model_shape(llama_8b, ModelConfig())
        args = config_of(optim="adamw_torch", per_device_train_batch_size=2, max_length=1024)
        estimate = training_memory(shape, ModelConfig(), args, "float32")
        found = {item.what: item.bytes for item in estimate.items}
        n = 8_030_261_248
        assert found["policy"] == found["reference"] == found["gradients"] == 4 * n
        assert found["optimizer"] == 8 * n
        assert found["autocast"] == 2 * 32 * 218_103_808
        # 2 × 2 sequences of 1024 tokens, the input of each of 32 layers, 4096 values of 2 bytes
        assert found["checkpoints"] == 4096 * 32 * 4096 * 2
        assert found["overhead"] == OVERHEAD
        assert estimate.total == sum(found.values())

    def test_qlora_training(self, shape_8b):
        """Adapters on a quantized base are bfloat16, and so are their gradients and Adam's states."""
        model_args = ModelConfig(**LORA, load_in_4bit=True)
        estimate = training_memory(shape_8b, model_args, config_of(), "bfloat16", has_ref_adapter=True)
        found = {item.what: item.bytes for item in estimate.items}
        assert (found["adapter"], found["gradients"], found["optimizer"]) == tuple(6_815_744 * n for n in (2, 2, 4))
        assert found["reference"] == 6_815_744 * 4

    @pytest.mark.parametrize(("most", "tokens"), [(8192, 8192), (1000, 2048), (10**6, 131_072)])
    def test_batches_by_tokens(self, shape_8b, most, tokens):
        """Of 64 pairs of 2 × 1024 tokens, what a forward takes: `max_batch_tokens`, at least one pair, at most all."""
        options = {"per_device_train_batch_size": 64, "max_length": 1024, "padding_free": True}
        args = TDPOConfig(output_dir="out", use_cpu=True, bf16=False, max_batch_tokens=most, **options)
        args.bf16 = True
        estimate = training_memory(shape_8b, ModelConfig(**LORA), args, "bfloat16")
        found = {item.what: item.bytes for item in estimate.items}
        assert found["checkpoints"] == tokens * 32 * 4096 * 2

    def test_engine(self, shape_8b):
        """16.06 GB of weights, 13.6 MB of adapter, 2048 × 131,072 B of cache; 24 GB × 0.9 leaves room for 16 such sequences."""
        generation = GenerationConfig(max_model_len=2048, gpu_memory_utilization=0.9)
        estimate = engine_memory(shape_8b, generation, "bfloat16", lora_rank=16)
        assert [item.bytes for item in estimate.items] == [16_060_522_496, 13_631_488, 268_435_456, OVERHEAD]
        free = int(0.9 * 24e9) - 16_060_522_496 - 13_631_488 - OVERHEAD
        assert concurrency(shape_8b, generation, "bfloat16", estimate, int(24e9)) == free // 268_435_456 == 16
        generation = GenerationConfig(max_model_len=2048, gpu_kv_cache_gib=0.8)  # three are 0.75 GiB
        assert concurrency(shape_8b, generation, "bfloat16", estimate, int(24e9)) == 3

    @pytest.mark.parametrize(
        ("asked", "checkpoint", "expected"),
        [("auto", "float32", "bfloat16"), ("auto", "float16", "float16"), ("float32", "bfloat16", "float32")],
    )
    def test_engine_dtype(self, asked, checkpoint, expected):
        assert engine_dtype(GenerationConfig(dtype=asked), checkpoint) == expected


class TestAgainstRealModels:
    @pytest.fixture
    def model(self, tiny_model_dir):
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)

    @pytest.fixture
    def shape(self, tiny_model_dir):
        return model_shape(AutoConfig.from_pretrained(tiny_model_dir), ModelConfig())

    def test_weights(self, shape, model):
        assert shape.weights("bfloat16") == sum(p.numel() * p.element_size() for p in model.parameters())

    def test_tied_weights_count_once(self, tiny_model_dir):
        config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
        expected = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert model_shape(config, ModelConfig()).parameters == expected

    def test_mixture_of_experts(self, tiny_moe_dir):
        model = AutoModelForCausalLM.from_pretrained(tiny_moe_dir)
        shape = model_shape(AutoConfig.from_pretrained(tiny_moe_dir), ModelConfig())
        assert shape.parameters == sum(p.numel() for p in model.parameters())

    def test_kv_cache(self, shape, model):
        """Of 7 tokens, a number that the estimate does not use."""
        with torch.no_grad():
            cache = model(torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
        size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert kv_bytes(shape, "bfloat16") * 7 == size

    def test_adapter_and_adam(self, tiny_model_dir, model):
        """The optimizer's own state after a step, its step counters left out."""
        model_args = ModelConfig(**LORA)
        shape = model_shape(model.config, model_args)
        peft = get_peft_model(model, get_peft_config(model_args))
        trained = [p for p in peft.parameters() if p.requires_grad]
        assert shape.lora == sum(p.numel() for p in trained)
        optimizer = torch.optim.AdamW(trained)
        ids = torch.ones(1, 4, dtype=torch.long)
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
        estimate = training_memory(shape, model_args, config_of(optim="adamw_torch"), "bfloat16")
        found = {item.what: item.bytes for item in estimate.items}
        assert found["adapter"] == sum(p.numel() * p.element_size() for p in trained)
        assert found["gradients"] == sum(p.grad.numel() * p.grad.element_size() for p in trained)
        assert found["optimizer"] == sum(t.numel() * t.element_size() for t in states)

    @pytest.mark.parametrize("lora", [False, True])
    def test_what_autograd_keeps(self, tiny_model_dir, lora):
        """On the meta device as on the CPU, where the tensors are real. The attention there is eager on both."""
        model_args = ModelConfig(**LORA) if lora else ModelConfig()
        found = {}
        for device in ("meta", "cpu"):
            config = AutoConfig.from_pretrained(tiny_model_dir, attn_implementation="eager")
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            if lora:
                model = get_peft_model(model, get_peft_config(model_args), low_cpu_mem_usage=device == "meta")
                model.enable_input_require_grads()
            found[device] = saved_bytes(model, 16)
        assert found["meta"] == found["cpu"] > 0

    @pytest.mark.parametrize("nested", [False, True])
    def test_nf4(self, tmp_path, nested):
        """bitsandbytes' own tensors: packed weights and scales."""
        config = LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        size = 0
        for parameter in model.parameters():
            size += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                size += state.absmax.numel() * state.absmax.element_size()
                size += 0 if state.state2 is None else state.state2.absmax.numel() * 4
        shape = model_shape(config, ModelConfig())
        assert shape.nf4("bfloat16", nested) == pytest.approx(size, rel=0.001)
