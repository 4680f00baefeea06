"""
The same on a GPU, at real sizes: `make bench-gpu`. Writes `docs/benchmarks/gpu_heads`, `gpu_steps` and `gpu_gemma`, `.csv` and `.md`.

First the Triton path is checked against the torch path; nothing is measured if they differ. Then the head alone, for the
shapes of Llama-3.1-8B and Qwen2.5-0.5B, and whole training steps of both, with random weights: what a step costs does not
depend on them. Last, steps on pairs of HH-RLHF's lengths, with the model at `--model` or with random weights in the shape of Gemma 3 270M.
`docs/benchmarks/README.md` says what a bare machine needs.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from trl import DPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.kernels.position_kl import log_probs, position_kl

from .gemma import write_gemma
from .self_refine_dpo import PRECOMPUTED
from .steps import DTYPES, Contestant, Shape, argument_parser, environment, measure, peak_bytes, synchronize, write
from .tdpo import FullLogitsTDPOTrainer


HEADS = {"Llama-3.1-8B": (4096, 128256, 4096), "Qwen2.5-0.5B": (4096, 151936, 896)}  # N, V, H
LLAMA = Shape(128256, 4096, 32, 4, 512, 511, head_size=128, kv_heads=8, intermediate=14336)
QWEN = Shape(151936, 896, 24, 4, 512, 511, head_size=64, kv_heads=2, intermediate=4864)
# At full fine-tuning every trainer has weights of its own: half of Llama's layers fit beside each other in 140 GB
STEPS = [
    ("Llama-3.1-8B", "LoRA", LLAMA),
    ("Llama-3.1-8B", "full", dataclasses.replace(LLAMA, layers=16)),
    ("Qwen2.5-0.5B", "LoRA", QWEN),
    ("Qwen2.5-0.5B", "full", QWEN),
]
TINY = Shape(1000, 64, 1, 2, 8, 8)
TINY_HEADS, TINY_STEPS = {"tiny": (32, 401, 16)}, [("tiny", "LoRA", TINY), ("tiny", "full", TINY)]
CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer),
    "TDPOTrainer": Contestant(TDPOTrainer, TDPOConfig),
    "full logits": Contestant(FullLogitsTDPOTrainer, TDPOConfig),
    "SelfRefineDPOTrainer": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig),
}
PRECOMPUTED_CONTESTANTS = {
    "DPOTrainer, precomputed": Contestant(DPOTrainer, options=PRECOMPUTED),
    "SelfRefineDPOTrainer, precomputed": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig, PRECOMPUTED),
}


class Head:
    """Hidden states and heads of a policy and of a reference near it, and labels."""

    def __init__(self, count: int, vocab: int, width: int, *, device: str, dtype: torch.dtype, trained: bool):
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        hidden, weight = randn(count, width), 2 * randn(vocab, width) / width**0.5
        self.hidden = hidden.to(dtype).requires_grad_()
        self.ref_hidden = (hidden + 0.1 * randn(count, width)).to(dtype)
        self.weight = weight.to(dtype).requires_grad_(trained)
        self.ref_weight = weight.to(dtype)
        self.labels = torch.randint(vocab, (count,), generator=generator, device=device)
        self.upstream = randn(count)
        # TDPO2 at α = 0.5: half of the positions are those of chosen answers
        self.kl_weight = torch.full((count,), 0.5, device=device)
        self.kl_weight[: count // 2] = 0

    def dpo_of_trl(self) -> torch.Tensor:
        outputs = ("entropy", "mean_logits", "is_top1")
        policy = ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )
        with torch.no_grad():
            ChunkedLogProbFunction.apply(
                self.ref_hidden,
                self.ref_weight,
                None,
                self.labels,
                1.0,
                _CHUNKED_LOGPROB_CHUNK_SIZE,
                None,
                1.0,
                outputs,
            )
        return policy[0]

    def dpo(self) -> torch.Tensor:
        with torch.no_grad():
            log_probs(self.ref_hidden, self.ref_weight, None, self.labels)
        return log_probs(self.hidden, self.weight, None, self.labels).log_probs

    def tdpo(self) -> torch.Tensor:
        heads = self.hidden, self.weight, None, self.ref_hidden, self.ref_weight, None
        return position_kl(*heads, self.labels, self.kl_weight).weighted

    def tdpo_in_torch(self) -> torch.Tensor:
        with mock.patch("trl_ext.kernels.logits_tile.is_triton_available", lambda: False):
            return self.tdpo()

    def tdpo_from_full_logits(self) -> torch.Tensor:
        log_p = (self.hidden @ self.weight.t()).float().log_softmax(-1)
        log_q = (self.ref_hidden @ self.ref_weight.t()).float().log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        return log_p.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1) + self.kl_weight * kl

    def step(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Loss and gradients."""
        output = forward()
        output.backward(self.upstream)
        gradients = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return output.detach(), *gradients


def check(device: str) -> bool:
    """Whether the Triton path equals the torch path, in values and gradients; prints the largest relative errors."""
    good = True
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        for vocab in (1271, 128256):
            head = Head(600, vocab, 256, device=device, dtype=dtype, trained=True)
            errors = []
            for ours, oracle in zip(head.step(head.tdpo), head.step(head.tdpo_in_torch), strict=True):
                errors.append(((ours.float() - oracle.float()).abs().max() / oracle.float().abs().max()).item())
            good &= max(errors) <= tolerance
            print(
                f"Triton against torch, {dtype}, V={vocab}: value and gradients off by {max(errors):.1e}", flush=True
            )
    return good


def measure_head(head: Head, device: str, repeats: int) -> list[dict]:
    """One row per way to compute it; ratios are to TRL's DPO."""
    contestants = {
        "DPO, TRL": head.dpo_of_trl,
        "DPO": head.dpo,
        "TDPO": head.tdpo,
        "TDPO without Triton": head.tdpo_in_torch,
        "TDPO, full logits": head.tdpo_from_full_logits,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):  # two to warm up
        for name, forward in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            head.step(forward)
            synchronize(device)
            if repeat > 1:
                seconds[name].append(time.perf_counter() - start)
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
    peaks = {name: peak_bytes(lambda f=forward: head.step(f), device) for name, forward in contestants.items()}
    first = next(iter(contestants))
    return [
        {
            "N": head.hidden.size(0),
            "V": head.weight.size(0),
            "H": head.weight.size(1),
            "head": "trained" if head.weight.requires_grad else "frozen",
            "loss": name,
            "ms": round(1000 * times[name], 2),
            "ratio": round(times[name] / times[first], 3),
            "peak MiB": round(peaks[name] / 2**20),
            "peak ratio": round(peaks[name] / peaks[first], 3),
        }
        for name in contestants
    ]


def write_heads(args: argparse.Namespace, repeats: int, device: str, about: str) -> None:
    text = (
        "`make bench-gpu` measures this: the LM head alone, forward and backward, for N completion tokens. Values are medians, and "
        f"their ratios to DPO with TRL's kernels. `peak` is what a step allocates.\n\n{about}"
    )
    rows = []
    for name, (count, vocab, width) in (TINY_HEADS if args.tiny else HEADS).items():
        for trained in (False, True):
            head = Head(count, vocab, width, device=device, dtype=DTYPES[device], trained=trained)
            rows += [{"shape": name, **row} for row in measure_head(head, device, repeats)]
            write(rows, args.output / "gpu_heads", "LM heads on a GPU", text)


def write_steps(args: argparse.Namespace, repeats: int, device: str, about: str) -> None:
    text = (
        "`make bench-gpu` measures this: whole training steps, loss and gradients without the optimizer, on models with "
        "random weights and gradient checkpointing, for 4 pairs of 1024 tokens, half of them the prompt. `ratio` is the median over the "
        "repeats to the first trainer with the same `precompute_ref_log_probs`; `peak` is what a step allocates.\n\n"
        + about
    )
    rows = []
    for name, weights, shape in TINY_STEPS if args.tiny else STEPS:
        for contestants in (CONTESTANTS, PRECOMPUTED_CONTESTANTS):
            measured = measure(
                contestants,
                shape,
                lora=weights == "LoRA",
                repeats=repeats,
                device=device,
                checkpointing=True,
            )
            rows += [{"shape": name, **row} for row in measured]
            write(rows, args.output / "gpu_steps", "Training steps on a GPU", text)


PARTS = {"heads": (write_heads, 10), "steps": (write_steps, 3), "gemma": (write_gemma, 3)}  # with their repeats


def main() -> None:
    parser = argument_parser(__doc__, repeats=None)
    parser.add_argument("--only", choices=["check", *PARTS], help="one part; the check always runs")
    parser.add_argument(
        "--model", help="model on disk for `gemma`; default: random weights in the shape of Gemma 3 270M"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, on a CPU if there is no GPU: to try this script"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        sys.exit("error: no CUDA device here. `make bench` measures on a CPU; --tiny tries this script.")
    if device == "cuda" and not check(device):
        sys.exit("error: the Triton path differs from the torch path: nothing was measured")
    about = environment(device, str(DTYPES[device]).removeprefix("torch."))
    for part, (write_part, repeats) in PARTS.items():
        if args.only in (None, part):
            start = time.perf_counter()
            write_part(args, args.repeats or repeats, device, about)
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
