"""
Training steps of a model on disk, on pairs of HH-RLHF's lengths: the last part of `make bench-gpu`.

Side by side: `trl.DPOTrainer`, and `TDPOTrainer` and `SelfRefineDPOTrainer` without and with `padding_free` and `share_prompt`; with LoRA, all
weights and LoRA on NF4. The tokens are random; how many there are is HH-RLHF's.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_bitsandbytes_available
from trl import DPOTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer

from .padding_free import BOTH, PADDING_FREE, text_lengths
from .steps import DTYPES, Contestant, Shape, default_dtype, prepare, take_turns, write


# Gemma 3 270M, and the same at a tiny size
GEMMA = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=512,
    bos_token_id=None,
)
TINY_GEMMA = Gemma3TextConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"],
    bos_token_id=None,
)
CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer),
    "TDPOTrainer": Contestant(TDPOTrainer, TDPOConfig),
    "TDPOTrainer, padding_free": Contestant(TDPOTrainer, TDPOConfig, PADDING_FREE),
    "TDPOTrainer, padding_free, share_prompt": Contestant(TDPOTrainer, TDPOConfig, BOTH),
    "SelfRefineDPOTrainer": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig),
    "SelfRefineDPOTrainer, padding_free, share_prompt": Contestant(SelfRefineDPOTrainer, SelfRefineDPOConfig, BOTH),
}
FLEX_CONTESTANTS = {
    "DPOTrainer": Contestant(DPOTrainer),
    "TDPOTrainer, padding_free, share_prompt, flex_attention": Contestant(
        TDPOTrainer, TDPOConfig, BOTH, attention="flex_attention"
    ),
}
# Weights, gradient checkpointing, batches, trainers
CASES = [
    ("LoRA", True, 2, CONTESTANTS),
    ("LoRA", False, 2, CONTESTANTS),
    ("full", True, 2, CONTESTANTS),
    ("full", False, 2, CONTESTANTS),
    ("LoRA on NF4", True, 2, CONTESTANTS),
    # One batch, since flex_attention is compiled for each length; on a CPU it cannot be trained
    ("LoRA", True, 1, FLEX_CONTESTANTS),
]


@dataclass
class Pretrained(Shape):
    """A model on disk."""

    path: str = ""
    nf4: bool = False

    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.path)

    def model(self, device: str, dtype: torch.dtype) -> PreTrainedModel:
        options = {}
        if self.nf4:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return AutoModelForCausalLM.from_pretrained(
            self.path, dtype=dtype, device_map={"": 0 if device == "cuda" else device}, **options
        )


def save_random(config: Gemma3TextConfig, path: str, device: str) -> None:
    """Save a model with random weights, which are drawn on the device."""
    with torch.device(device), default_dtype(DTYPES[device]):
        Gemma3ForCausalLM(config).save_pretrained(path)


def measure_pretrained(path: str, pairs: int, repeats: int, device: str, cases: list[tuple]) -> Iterator[list[dict]]:
    """For each case, one row per trainer; ratios are to the first."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    for weights, checkpointing, batches, contestants in cases:
        shape = Pretrained(
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            pairs,
            batches=batches,
            lengths=text_lengths(pairs * batches),
            path=path,
            nf4="NF4" in weights,
        )
        _, inputs, run = prepare(
            contestants, shape, lora="LoRA" in weights, device=device, checkpointing=checkpointing
        )
        tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs["DPOTrainer"])
        rows = [
            {
                "weights": weights,
                "checkpointing": "yes" if checkpointing else "no",
                "batches": batches,
                **turn,
                "tokens/s": round(tokens / turn["seconds"]),
            }
            for turn in take_turns(contestants, run, repeats, device)
        ]
        for row in rows:
            print(row, flush=True)
        yield rows


def write_gemma(args: argparse.Namespace, repeats: int, device: str, about: str) -> None:
    pairs, path = 2 if args.tiny else 16, None if args.tiny else args.model
    text = (
        f"`make bench-gpu` measures this: the loss and gradients of batches of {pairs} pairs with HH-RLHF's lengths "
        "(`tests/benchmarks/hh_lengths.csv`: lengths, no text), without the optimizer. The model is "
        f"{'Gemma 3 270M in shape, with random weights' if path is None else Path(path).name}, with SDPA unless the row says otherwise. "
        "`seconds` is the time for all `batches`, `ratio` the median over the repeats of its ratio to that of `trl.DPOTrainer` in the same case, "
        "and `peak` what a step allocates. `tokens/s` counts both sequences of each pair without padding, whatever the trainer shares."
        f"\n\n{about}"
    )
    cases = CASES
    if device == "cpu":
        cases = [case for case in cases if case[-1] is not FLEX_CONTESTANTS]
    if not is_bitsandbytes_available():
        print("bitsandbytes is not installed: no NF4", flush=True)
        cases = [case for case in cases if "NF4" not in case[0]]
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            save_random(TINY_GEMMA if args.tiny else GEMMA, folder, device)
        rows = []
        for more in measure_pretrained(path or folder, pairs, repeats, device, cases):
            rows += more
            write(rows, args.output / "gpu_gemma", "Steps on pairs of real lengths, on a GPU", text)
