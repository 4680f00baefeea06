"""
What a TDPO step costs beside a DPO step: `make bench`.

In one process, on the same model and batch, step by step in turn: `trl.DPOTrainer`, `TDPOTrainer`, and TDPO as its paper's
code computes it, with full logits. A step is loss and gradients, without the optimizer. Written to `docs/benchmarks/tdpo.csv`
and `.md`: the ratio of median step times to DPOTrainer's, head GEMMs counted in units of 2·N·V·H FLOP, and the peak of the
memory that a step allocates.
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_ext import TDPOConfig, TDPOTrainer
from trl_ext.trainers.pairwise_trainer import PairBatch
from trl_ext.trainers.position_kl_head import PositionKLOutput


OUTPUT = Path(__file__).parents[2] / "docs" / "benchmarks"
PROMPT_TOKENS, ANSWER_TOKENS = 64, 96
# Longer than any side of a matrix product outside the LM head: tokens of a batch, MLP width
LONGEST_OTHER_SIDE = 2048


class FullLogitsTDPOTrainer(TDPOTrainer):
    """TDPO as the paper's code computes it: both models' logits, their log-softmax and softmax, all `(2B, T, V)` in fp32."""

    def _reference_forward(self, batch: PairBatch) -> torch.Tensor:
        with self._reference_model() as ref_model:
            return ref_model(**batch.model_kwargs).logits[:, :-1].float().log_softmax(-1)

    def _policy_forward(self, model, batch: PairBatch, reference: torch.Tensor) -> PositionKLOutput:
        logits = model(**batch.model_kwargs).logits[:, :-1].float()
        log_probs = logits.log_softmax(-1)
        mask = batch.completion_mask
        labels = batch.labels[:, 1:].clamp(min=0).unsqueeze(-1)
        position_kl = (reference.exp() * (reference - log_probs)).sum(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        return PositionKLOutput(
            log_probs=log_probs.gather(-1, labels).squeeze(-1) * mask,
            ref_log_probs=reference.gather(-1, labels).squeeze(-1) * mask,
            position_kl=position_kl * mask,
            entropy=entropy,
            mean_logits=logits.detach().mean(-1),
            is_top1=logits.argmax(-1) == labels.squeeze(-1),
        )


TRAINERS = {
    "DPOTrainer": (DPOTrainer, DPOConfig),
    "TDPOTrainer": (TDPOTrainer, TDPOConfig),
    "full logits": (FullLogitsTDPOTrainer, TDPOConfig),
}


class HeadWork(TorchDispatchMode):
    """Counts the FLOP of matrix products that involve the whole vocabulary or a tile of it."""

    def __init__(self, positions: int, vocab: int, hidden: int):
        super().__init__()
        self.positions, self.vocab, self.hidden = positions, vocab, hidden
        self.flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            sizes = {*a.shape, *b.shape}
            # The vocabulary is walked in tiles: any product with a side this long is the head's
            if self.hidden in sizes and max(sizes) > LONGEST_OTHER_SIDE:
                self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def build_model(path: Path, vocab: int, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden - 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def build_dataset(vocab: int, rows: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, vocab, (tokens,), generator=generator).tolist())

    return Dataset.from_list(
        [
            {"prompt": text(PROMPT_TOKENS), "chosen": f" {text(ANSWER_TOKENS)}", "rejected": f" {text(ANSWER_TOKENS)}"}
            for _ in range(rows)
        ]
    )


def build_trainer(name: str, path: Path, dataset: Dataset, lora: bool):
    trainer_class, config_class = TRAINERS[name]
    args = config_class(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(dataset),
        disable_tqdm=True,
    )
    peft_config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = trainer_class(str(path), args=args, train_dataset=dataset, peft_config=peft_config)
    torch.manual_seed(1)  # a policy that has moved: a KL of 0 is no test of anything
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    return trainer


def step(trainer, batch) -> float:
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    seconds = time.perf_counter() - start
    trainer.model.zero_grad(set_to_none=True)
    return seconds


def peak_bytes(trainer, batch) -> int:
    """Peak of what a step allocates above what is held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(trainer, batch)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(vocab: int, hidden: int, layers: int, pairs: int, lora: bool, repeats: int) -> list[dict]:
    path = Path(tempfile.mkdtemp())
    build_model(path, vocab, hidden, layers)
    dataset = build_dataset(vocab, pairs)
    trainers = {name: build_trainer(name, path, dataset, lora) for name in TRAINERS}
    batches = {
        name: t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(pairs)]))
        for name, t in trainers.items()
    }
    for trainer in trainers.values():
        trainer.model.train()
    positions = int(batches["TDPOTrainer"]["completion_mask"][:, 1:].sum())

    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, trainer in trainers.items():
            taken = step(trainer, batches[name])
            if repeat:
                seconds[name].append(taken)

    rows = []
    base_time = statistics.median(seconds["DPOTrainer"])
    peaks = {name: peak_bytes(trainer, batches[name]) for name, trainer in trainers.items()}
    for name, trainer in trainers.items():
        with HeadWork(positions, vocab, hidden) as work:
            step(trainer, batches[name])
        rows.append(
            {
                "vocabulary": vocab,
                "hidden": hidden,
                "layers": layers,
                "completion_tokens": positions,
                "weights": "LoRA" if lora else "full",
                "trainer": name,
                "step_ratio": round(statistics.median(seconds[name]) / base_time, 3),
                "head_gemms": round(work.flop / (2 * positions * vocab * hidden), 2),
                "peak_mib": round(peaks[name] / 2**20),
                "peak_ratio": round(peaks[name] / peaks["DPOTrainer"], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def write(rows: list[dict], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "tdpo.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "transformers", "peft", "trl-ext"))
    lines = [
        "# A TDPO step beside a DPO step",
        "",
        "`make bench` measures this: trainers in turn on the same model and batch in one process, medians; step time is loss and "
        "gradients as a ratio to `trl.DPOTrainer`'s. Head GEMMs are counted, in units of 2·N·V·H FLOP (N completion tokens); on a "
        'CPU, TRL\'s kernels project every position, prompt and padding included. Peak is what a step allocates. "Full logits" is '
        "TDPO as its paper's code computes it.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, CPU, fp32, {packages}.",
        "",
        "| V | H | layers | N | weights | trainer | step / DPO | head GEMMs | peak, MiB | peak / DPO |",
        "|--:|--:|--:|--:|---|---|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (output / "tdpo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    rows = []
    for vocab, hidden, layers, pairs in ((4096, 256, 4, 4), (32000, 256, 4, 4), (128256, 256, 4, 2)):
        for lora in (True, False):
            rows += measure(vocab, hidden, layers, pairs, lora, args.repeats)
            write(rows, args.output)  # after each size: the large ones take minutes


if __name__ == "__main__":
    main()
