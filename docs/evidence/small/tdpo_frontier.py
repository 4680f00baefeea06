"""
TDPO's frontier: reward against KL for DPO, TDPO1 and TDPO2, on the reviews of reviews.py. `make evidence-frontier`.

    python -m docs.evidence.small.tdpo_frontier --seeds 3

In: seeds. Out: `tdpo_frontier.csv`, a row per run and evaluation, and `tdpo_frontier.svg`. Every run starts from the same reference and
sees the same pairs of its seed in the same order; the trainers are TRL's DPOTrainer and this package's TDPOTrainer.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_ext import TDPOConfig, TDPOTrainer

from ..tables import write
from .reviews import TRAINING, compare, make_pairs, make_prompts, make_reference, measure


HERE = Path(__file__).parent
METHODS = {
    "DPO": None,
    "TDPO1": {"variant": "tdpo1"},
    **{f"TDPO2, α = {alpha}": {"variant": "tdpo2", "alpha": alpha} for alpha in (0.1, 0.3, 0.5, 0.7)},
}
BETA, OTHER_BETAS = 0.1, (0.05, 0.3)  # the paper's, with all seeds, and others with one
STEPS, EVERY, BATCH, LEARNING_RATE = 120, 12, 32, 2e-4
HELD_OUT = 256


class Evaluate(TrainerCallback):
    """Measure the policy at the start and every so many steps."""

    def __init__(self, reference, tokenizer, pairs: list[dict[str, str]], rows: list[dict], labels: dict):
        self.reference, self.tokenizer, self.rows, self.labels = reference, tokenizer, rows, labels
        self.prompts = make_prompts(HELD_OUT, seed=999)
        self.pairs = pairs

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % EVERY == 0:
            self.evaluate(state.global_step, model)

    def evaluate(self, step: int, model) -> None:
        model.eval()
        row = {
            **self.labels,
            "step": step,
            **asdict(measure(model, self.reference, self.tokenizer, self.prompts, seed=step)),
        }
        ratios = {}
        for side in ("chosen", "rejected"):
            ratios[side], row[f"seq_kl_{side}"] = compare(model, self.reference, self.tokenizer, self.pairs, side)
        row["accuracy"] = float((ratios["chosen"] > ratios["rejected"]).float().mean())
        self.rows.append(row)
        model.train()


def train(
    method: str, beta: float, seed: int, reference_path: Path, pairs: list[dict], rows: list[dict], scratch: str
) -> None:
    options = {
        "output_dir": scratch,
        "beta": beta,
        "seed": seed,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        **TRAINING,
    }
    load = {"dtype": "float32"}
    model, reference = (AutoModelForCausalLM.from_pretrained(reference_path, **load) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(reference_path)
    held_out, learned = pairs[:HELD_OUT], pairs[HELD_OUT:]
    callback = Evaluate(reference, tokenizer, held_out, rows, {"method": method, "beta": beta, "seed": seed})
    token_level = METHODS[method]
    trainer_class, args = (
        (DPOTrainer, DPOConfig(**options))
        if token_level is None
        else (TDPOTrainer, TDPOConfig(**options, **token_level))
    )
    trainer = trainer_class(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(reference_path, **load),
        args=args,
        train_dataset=datasets.Dataset.from_list(learned),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    callback.evaluate(0, trainer.model)
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=800, help="each gives up to 6 pairs")
    parser.add_argument("--output", type=Path, default=HERE / "tdpo_frontier.csv")
    args = parser.parse_args()
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
        for seed in range(args.seeds):
            pairs = make_pairs(model, tokenizer, args.prompts, seed)
            for beta in (BETA, *OTHER_BETAS) if seed == 0 else (BETA,):
                for method in METHODS:
                    train(method, beta, seed, reference_path, pairs, rows, scratch)
                    write(rows, args.output)
                    print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)


if __name__ == "__main__":
    main()
