"""
Sr-DPO and Sr-IPO against DPO and IPO: marginals, accuracies, correlation with a known gap in quality, and overfitting, on the pairs of
sorting.py. `make evidence-self-refine`.

    python -m docs.evidence.small.self_refine --seeds 3

In: seeds. Out: `self_refine.csv`, a row per run and evaluation, written as it goes. The runs of a seed start from the same reference and see
the same pairs in the same order; the trainer is this package's SelfRefineDPOTrainer, which is TRL's DPOTrainer for λ = 0.
"""

import argparse
import csv
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer

from .correlations import kendall, pearson, spearman
from .sorting import BEST_PROMPT, SortingPair, log_probs, make_pairs, make_reference, right_digits, to_ids
from .training import ON_CPU


HERE = Path(__file__).parent
WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0)  # λ: the paper's, and 0
BETA = 0.1  # the paper's
STEPS, EVERY, BATCH, LEARNING_RATE = 100, 20, 32, 2e-4
HELD_OUT, MEASURED = 512, 400  # pairs; of the training pairs so many are measured
FLIPPED = (0.0, 0.2)  # share of wrong labels among the training pairs
PAIRS = 1600
OTHER_PAIRS, THEIR_WEIGHTS = (100, 400), (0.0, 0.3, 1.0)  # for overfitting, with Sr-DPO alone


class Run(NamedTuple):
    """
    What one run is. `flipped` is the share of wrong labels among the training pairs, `loss` Sr-DPO (`"sigmoid"`) or Sr-IPO (`"ipo"`), `weight` λ,
    `pairs` their number; the number of steps is always the same.
    """

    flipped: float
    loss: str
    weight: float
    beta: float
    pairs: int


RUNS = [
    run
    for flipped in FLIPPED
    for run in (
        *(Run(flipped, loss, weight, BETA, PAIRS) for loss in ("sigmoid", "ipo") for weight in WEIGHTS),
        Run(flipped, "sigmoid", 0.0, BETA / 2, PAIRS),  # is λ more than a smaller β?
        *(Run(flipped, "sigmoid", weight, BETA, pairs) for pairs in OTHER_PAIRS for weight in THEIR_WEIGHTS),
    )
]


class Differences:
    """`log π(y_w|x) − log π(y_l|x)` of some pairs, with `p` before x; those of the reference are kept."""

    def __init__(self, pairs: list[SortingPair], tokenizer, reference, p: str = ""):
        self.chosen, self.rejected = (to_ids(tokenizer, pairs, side, p) for side in ("chosen", "rejected"))
        self.reference = self(reference)

    def __call__(self, model) -> torch.Tensor:
        return log_probs(model, self.chosen) - log_probs(model, self.rejected)


class Evaluate(TrainerCallback):
    """Measure the policy at the start and every so many steps."""

    def __init__(
        self,
        held_out: list[SortingPair],
        learned: list[SortingPair],
        tokenizer,
        reference,
        rows: list[dict],
        labels: dict,
    ):
        self.tokenizer, self.rows, self.labels = tokenizer, rows, labels
        self.plain, self.under_p, self.learned = (
            Differences(pairs, tokenizer, reference, p)
            for pairs, p in ((held_out, ""), (held_out, BEST_PROMPT), (learned, ""))
        )
        self.gaps = [pair.gap for pair in held_out]
        self.wrong = torch.tensor([pair.flipped for pair in learned])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % EVERY == 0:
            self.evaluate(state.global_step, model)

    def loss(self, marginals: torch.Tensor) -> float:
        """DPO's or IPO's own at β = 0.1 and without λ Δ, for all runs alike."""
        if self.labels["loss"] == "sigmoid":
            return -F.logsigmoid(BETA * marginals).mean().item()
        return (marginals - 1 / (2 * BETA)).square().mean().item()

    def evaluate(self, step: int, model) -> None:
        model.eval()
        plain, under_p, learned = (differences(model) for differences in (self.plain, self.under_p, self.learned))
        marginals, deltas = plain - self.plain.reference, self.labels["beta"] * (under_p - self.under_p.reference)
        learned = learned - self.learned.reference
        # What λ Δ is taken off: the margin β u of Sr-DPO, the marginal itself of Sr-IPO
        scale = self.labels["beta"] if self.labels["loss"] == "sigmoid" else 1.0
        margin = scale * marginals.abs().mean().item()
        self.rows.append(
            {
                **self.labels,
                "step": step,
                "marginal": marginals.mean().item(),
                "accuracy": (marginals > 0).float().mean().item(),
                "accuracy_under_p": (deltas > 0).float().mean().item(),
                "delta": deltas.mean().item(),
                "share": self.labels["weight"] * deltas.abs().mean().item() / margin if margin > 0 else 0.0,
                "held_out_loss": self.loss(marginals),
                "pearson": pearson(marginals, self.gaps),
                "spearman": spearman(marginals, self.gaps),
                "kendall": kendall(marginals, self.gaps),
                "delta_pearson": pearson(deltas, self.gaps),
                "delta_spearman": spearman(deltas, self.gaps),
                "delta_kendall": kendall(deltas, self.gaps),
                "delta_marginal_pearson": pearson(deltas, marginals),
                "logp_spearman": spearman(plain, self.gaps),
                "logp_under_p_spearman": spearman(under_p, self.gaps),
                "train_marginal": learned.mean().item(),
                "train_accuracy": (learned > 0).float().mean().item(),
                "train_loss": self.loss(learned),
                "flipped_accuracy": (learned[self.wrong] > 0).float().mean().item(),
                "right_digits": right_digits(model, self.tokenizer, 256, seed=999),
            }
        )
        model.train()


def train(run: Run, seed: int, path: Path, held_out: list[SortingPair], rows: list[dict], scratch: str) -> None:
    pairs = make_pairs(run.pairs, 1000 + seed, run.flipped)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for _ in range(2))
    labels = {**run._asdict(), "seed": seed}
    callback = Evaluate(held_out, pairs[:MEASURED], tokenizer, reference, rows, labels)
    args = SelfRefineDPOConfig(
        output_dir=scratch,
        refinement_weight=run.weight,
        refinement_prompt=BEST_PROMPT,
        loss_type=run.loss,
        ipo_length_normalization=False,  # the paper's form
        beta=run.beta,
        seed=seed,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        precompute_ref_log_probs=True,
        learning_rate=LEARNING_RATE,
        optim="rmsprop",  # the paper's
        warmup_steps=10,
        lr_scheduler_type="linear",
        max_grad_norm=10.0,
        max_length=64,
        **ON_CPU,
    )
    trainer = SelfRefineDPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=datasets.Dataset.from_list([asdict(pair) for pair in pairs]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.evaluate(0, trainer.model)
    trainer.train()


def save(rows: list[dict], output: Path) -> None:
    def cell(value: float) -> float | str:
        return "" if isinstance(value, float) and math.isnan(value) else f"{value:.5g}"

    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else cell(v) for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "self_refine.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    datasets.disable_progress_bars()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            path = Path(scratch) / f"reference-{seed}"
            make_reference(path, seed)
            held_out = make_pairs(HELD_OUT, 2000 + seed)
            for run in RUNS:
                train(run, seed, path, held_out, rows, scratch)
                save(rows, args.output)
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    print(f"{time.process_time() / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()
