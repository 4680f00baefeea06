"""
How far the log-probability of chosen answers falls under DPO, and under what is advised against it, on the reviews of reviews.py.

    python -m docs.evidence.small.falling_rewards

In: seeds. Out: `falling_rewards.csv`, one row per run after its last step, and on standard output the table of docs/falling_rewards.md.
All runs of a seed start from the same reference and see the same pairs in the same order. `--table` prints the table of the results that are there.
"""

import argparse
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_ext import TDPOConfig, TDPOTrainer

from ..tables import cell, grouped, read, table, write
from .reviews import TRAINING, compare, make_pairs, make_prompts, make_reference, measure


HERE = Path(__file__).parent
RESULTS = HERE / "falling_rewards.csv"
SEEDS, HELD_OUT = 3, 256
OPTIONS = {**TRAINING, "beta": 0.1, "max_steps": 120, "per_device_train_batch_size": 32, "learning_rate": 2e-4}
METHODS = {
    "DPO": {},
    "DPO, a quarter of the learning rate": {"learning_rate": 5e-5},
    "DPO, β = 0.3": {"beta": 0.3},
    "DPO and NLL, weights 1 and 1": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
    "TDPO2, α = 0.5": {"variant": "tdpo2", "alpha": 0.5},
}


def run(method: str, seed: int, reference_path: Path, pairs: list[dict[str, str]]) -> dict:
    """Train by one method, and measure the policy after the last step."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(reference_path, dtype="float32") for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(reference_path)
    options = METHODS[method]
    trainer_class, config_class = (TDPOTrainer, TDPOConfig) if "variant" in options else (DPOTrainer, DPOConfig)
    trainer = trainer_class(
        model=policy,
        ref_model=reference,
        args=config_class(output_dir=str(reference_path.parent / "out"), seed=seed, **{**OPTIONS, **options}),
        train_dataset=datasets.Dataset.from_list(pairs[HELD_OUT:]),
        processing_class=tokenizer,
    )
    trainer.train()
    policy = trainer.model.eval()
    chosen, rejected = (
        compare(policy, reference, tokenizer, pairs[:HELD_OUT], side)[0] for side in ("chosen", "rejected")
    )
    own = measure(policy, reference, tokenizer, make_prompts(HELD_OUT, seed=999), seed)
    return {
        "method": method,
        "seed": seed,
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "accuracy": float((chosen > rejected).float().mean()),
        "reward": own.reward,
        "kl": own.kl,
    }


def results_table(path: Path = RESULTS) -> str:
    lines = []
    for (method,), rows in grouped(read(path, texts=("method",)), "method").items():
        numbers = {key: [row[key] for row in rows] for key in ("chosen", "rejected", "accuracy", "reward", "kl")}
        digits = {"accuracy": 3, "reward": 2}
        lines.append([method, *(cell(values, digits.get(key, 1)) for key, values in numbers.items())])
    return table(["trained with", "chosen, nats", "rejected, nats", "accuracy", "reward", "KL, nats"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        rows: list[dict] = []
        with tempfile.TemporaryDirectory() as scratch:
            reference_path = Path(scratch) / "reference"
            make_reference(reference_path)
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(reference_path),
                AutoTokenizer.from_pretrained(reference_path),
            )
            for seed in range(SEEDS):
                pairs = make_pairs(model, tokenizer, prompts=800, seed=seed)
                for method in METHODS:
                    rows.append(run(method, seed, reference_path, pairs))
                    write(rows, RESULTS)
    print(results_table(), end="")


if __name__ == "__main__":
    main()
