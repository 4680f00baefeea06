"""
What the tests share: a tiny random Llama with a word-level tokenizer, made on the spot, a preference dataset of uneven
lengths, and the same model in float64 with full logits, from which the oracles are computed.
"""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on several threads, child processes' too

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from trl_ext.terminal import quiet_imports  # noqa: E402


quiet_imports()


def pytest_collection_finish():
    """
    Take what the libraries have made out of garbage collection. Every training collects garbage several times, and looking at all of it took
    a third of the time of trainings as small as these.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


# The same examples in every run, and no clock. `pytest --hypothesis-profile=search` looks further
timeless = {"database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", derandomize=True, **timeless)
settings.register_profile("search", max_examples=2_000, **timeless)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def environment():
    """
    Restore the environment after each test. A recipe's `env` changes it, and so does importing Ray. A stage is not forked in another environment
    than its server's, and a fresh process takes seconds more.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


# Every word of the tests' texts, the paper's refinement prompt included, so that nothing becomes <unk>
WORDS = """
Please generate a response with usefulness rating of 100 out for the following query Note that should be harmless The
term indicates level where is maximum and 1 minimum Query Be useful You are brief one two three four five six seven
eight nine ten plus minus times makes what why how sky blue sea green grass red fox dog cat jumps sleeps runs yes no
it because light scatters short waves more than long ones . , : ? !
""".split()

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}<tool> {{ tool['function']['name'] }} {% endfor %}"
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="session")
def single_thread():
    """Torch on one thread: matrices this small are slower on several, above all on a busy machine."""
    import torch

    torch.set_num_threads(1)


# Sizes of the tiny models, as most architectures spell them
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # the default 0.02 is nearly uniform over the vocabulary, and every KL nearly 0
}


def save_tiny_llama(path: Path) -> None:
    """Saves a random two-layer Llama (hidden 32) and its tokenizer in `path`, as `from_pretrained` takes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "</s>", "<system>", "<user>", "<assistant>", "<tool>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        **TINY,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attention_dropout=0.0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, single_thread) -> Path:
    """A directory with the tiny Llama and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(path)
    return path


@pytest.fixture(scope="session")
def tiny_moe_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """A one-layer Mixtral of four experts, for the tiny Llama's tokenizer."""
    import torch
    from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=AutoConfig.from_pretrained(tiny_model_dir).vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("tiny-mixtral")
    MixtralForCausalLM(config).save_pretrained(path)
    return path


PAIRS = [
    ("what is one plus two ?", "three", "four ."),
    ("why is the sky blue ?", "because short waves scatters more than long ones .", "it is ."),
    ("what is five minus two ?", "three .", "five minus two makes seven because five is red !"),
    ("how the fox jumps ?", "the fox jumps , the dog sleeps .", "no"),
    ("what is two times three ?", "six", "two times three makes ten , yes ."),
    ("why is grass green ?", "light", "because , because , because the sea is blue and the sky is blue ."),
    ("is the sea blue ?", "yes , it is blue because the sky is blue .", "no , it is red ."),
    ("what runs ?", "the cat runs .", "the grass runs"),
]


def make_conversational_pairs():
    """Eight conversational preference rows; completions from 1 to 15 words, either side the longer one."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in PAIRS
        ]
    )


@pytest.fixture(scope="session")
def conversational_pairs():
    """`make_conversational_pairs` for the tests."""
    return make_conversational_pairs()


@pytest.fixture(scope="session")
def plain_text_pairs():
    """The same rows as plain text."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected} for prompt, chosen, rejected in PAIRS]
    )


@pytest.fixture
def make_trainer(tiny_model_dir, conversational_pairs, tmp_path):
    """
    Returns a function that builds a preference trainer on the tiny model, on CPU, in fp32 unless `options` say
    otherwise. `options` are the config's, and `trainer` the other arguments of the trainer.
    """
    from transformers import AutoTokenizer

    def make(trainer_class, config_class=None, *, model=None, dataset=conversational_pairs, trainer=None, **options):
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return trainer_class(
            model=str(tiny_model_dir) if model is None else model,
            args=config_class(**{**defaults, **options}),
            train_dataset=dataset,
            **{"processing_class": AutoTokenizer.from_pretrained(tiny_model_dir), **(trainer or {})},
        )

    return make


@pytest.fixture
def lora_config():
    """A LoRA on the attention, without dropout."""
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def perturb(model, scale: float = 0.05, seed: int = 1) -> None:
    """Moves the trainable weights of `model` away from the reference, in place, the same way for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def first_batch(trainer) -> dict:
    """The first rows of the training data, unshuffled, as the trainer's collator makes a batch of them."""
    trainer._set_signature_columns_if_needed()
    rows = [trainer.train_dataset[i] for i in range(trainer.args.per_device_train_batch_size)]
    return trainer.data_collator([{k: v for k, v in row.items() if k in trainer._signature_columns} for row in rows])


def train_step(trainer, batch: dict):
    """The loss of `batch` in training mode and, in the parameters, its gradients; `trainer._metrics` has the rest."""
    trainer.model.train()
    if trainer.args.gradient_checkpointing:  # the training loop enables it, not the constructor
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach()


def step_metrics(trainer, mode: str = "train") -> dict[str, float]:
    """The metrics of the last step."""
    return {name: values[-1] for name, values in trainer._metrics[mode].items()}


def assert_gradients_close(model, expected: dict, tolerance: float = 1e-4) -> None:
    """Compares the gradients of all trainable parameters; `tolerance` is relative to the largest entry of each."""
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        largest = expected[name].abs().max()
        assert largest > 0, f"{name}: the oracle has no gradient, so the comparison would be empty"
        error = (gradient.double() - expected[name].double()).abs().max()
        assert error <= tolerance * largest, f"{name}: off by {error:.1e}, largest {largest:.1e}"


class FullLogits:
    """
    The oracle's view of a model: a float64 copy of it with the given weights, which returns all the logits.

    Args:
        model_dir: Directory of the model.
        state_dict: Weights to take instead of the directory's; LoRA's names if `peft_config` is given.
        peft_config: Wraps the model; `adapter` is then the adapter whose weights are taken from `state_dict`.
    """

    def __init__(self, model_dir, state_dict=None, peft_config=None, adapter="default"):
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        # The grouped GEMM of experts has no float64
        options = {"dtype": torch.float64, "experts_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
        if peft_config is not None:
            self.model = get_peft_model(self.model, peft_config)
            others = {".default.", ".ref."} - {f".{adapter}."}
            state_dict = {
                name.replace(f".{adapter}.", ".default."): weight
                for name, weight in state_dict.items()
                if not any(other in name for other in others)
            }
        if state_dict is not None:
            self.model.load_state_dict(state_dict)
        self.model = self.model.double()

    def __call__(self, batch: dict):
        """Returns the logits `(2B, T, V)` of a collated batch, shifted to align with `labels_and_mask`."""
        kwargs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.model(**kwargs, use_cache=False).logits[:, :-1]

    def gradients(self) -> dict:
        """The gradient of every trainable parameter, by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}


def labels_and_mask(batch: dict):
    """The labels and the response mask of a collated batch, `(2B, T)` each, shifted to align with the logits."""
    return batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
