"""
Is the preference term at work? The same pairs trained on with it, without it and with its sign flipped. `make evidence-preference`.

    python -m docs.evidence.small.preference_term --seeds 3

In: seeds. Out: `preference_term.csv`, a row per training. A seed's SFT model answers 1,500 prompts in
chains; the pairs, direct and refinement rows, are those of ARIES. Without it is β = 0, and flipped is -β, the loss of the opposite preference, while an
NLL term stays on the better answer. The trainers are called as a user of TRL calls them.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.aries.config import PairsConfig
from trl_ext.aries.data.pairs import preference_rows, select_pairs
from trl_ext.aries.data.records import Answer, Chain, read_jsonl
from trl_ext.aries.data.sft import sft_row

from ..tables import write
from .quickstart_task import TEMPLATE, Answers, prepare, verifier
from .training import ON_CPU


HERE = Path(__file__).parent
PROMPTS, HELD_OUT = 1500, 500
COMMON = {"max_length": 256, **ON_CPU}
TRAINERS = {
    "DPO": (DPOTrainer, DPOConfig, {}),
    "TDPO2": (TDPOTrainer, TDPOConfig, {}),
    "Sr-DPO": (SelfRefineDPOTrainer, SelfRefineDPOConfig, {"refinement_prompt": "Write a better answer ."}),
}
# Alone the term is given a lower learning rate, under which it does not drive down the chosen answers as well
ALONE = {
    "loss_type": ["sigmoid"],
    "beta": 0.5,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 1,
}
# The quickstart's
WITH_NLL = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 2.0],
    "beta": 0.1,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 2,
}
SETTINGS = {**{f"{name} alone": (name, ALONE) for name in TRAINERS}, "DPO and NLL": ("DPO", WITH_NLL)}
# β times this: at 0 the term is a constant, below it the loss is that of the opposite preference
SIGNS = {"on": 1, "off": 0, "flipped": -1}


def warm_start(directory: Path, seed: int) -> None:
    """The quickstart's model and data of this seed, and its SFT, with the recipe's settings."""
    prepare.main([f"--output={directory}", f"--seed={seed}"])
    trainer = SFTTrainer(
        model=str(directory / "model"),
        args=SFTConfig(
            output_dir=str(directory / "sft"),
            seed=seed,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            adam_beta2=0.98,
            **COMMON,
        ),
        train_dataset=datasets.Dataset.from_list(
            [sft_row(row, TEMPLATE) for row in read_jsonl(directory / "sft.jsonl")]
        ),
    )
    trainer.train()
    trainer.save_model(str(directory / "start"))


def make_pairs(directory: Path, seed: int) -> list[dict]:
    """Chains of the start at temperature 1, right over wrong, direct rows twice as in the quickstart."""
    torch.manual_seed(seed)
    policy = Answers(directory / "start", directory / "model", directory / "train.jsonl", PROMPTS)
    prompts = [row["prompt"] for row in read_jsonl(directory / "train.jsonl")[:PROMPTS]]
    chains, scores = [], []
    for number, (prompt, solution, answers) in enumerate(
        zip(prompts, policy.solutions, zip(*policy.chains(temperature=1.0), strict=True), strict=True)
    ):
        chain = [Answer(turn, text, len(text.split()), "stop") for turn, text in enumerate(answers, start=1)]
        chains.append(Chain(str(number), prompt, chain))
        scores.append(verifier.exact_match([prompt] * len(answers), list(answers), [solution] * len(answers)))
    config = PairsConfig(direct_weight=2)
    pairs, _ = select_pairs(chains, scores, config)
    rows = [row for pair in pairs for row in preference_rows(pair, TEMPLATE, config)]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows for _ in range(row["weight"])]


def train(setting: str, sign: int, directory: Path, pairs: list[dict], seed: int) -> Path:
    """One training from the start; returns the policy's directory."""
    name, options = SETTINGS[setting]
    trainer_class, config_class, own = TRAINERS[name]
    output = directory / f"{setting}, {sign}"
    options = options | own | {"beta": sign * options["beta"]}
    start = [AutoModelForCausalLM.from_pretrained(directory / "start", dtype=torch.float32) for _ in range(2)]
    trainer = trainer_class(
        model=start[0],
        ref_model=start[1],
        args=config_class(output_dir=str(output), seed=seed, **options, **COMMON),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    trainer.train()
    trainer.save_model(str(output))
    return output


def run(seed: int, directory: Path, settings: Iterable[str] = tuple(SETTINGS)) -> list[dict]:
    """The trainings of a seed: rows of the CSV."""
    warm_start(directory, seed)

    def measure(policy: Path) -> dict[str, float]:
        return Answers(policy, directory / "model", directory / "eval.jsonl", HELD_OUT).measure()

    start = measure(directory / "start")
    pairs = make_pairs(directory, seed)
    rows = []
    for setting in settings:
        for term, sign in SIGNS.items():
            if SETTINGS[setting][1] is ALONE and sign == 0:
                continue  # nothing is trained
            shares = measure(train(setting, sign, directory, pairs, seed))
            labels = {"seed": seed, "setting": setting, "term": term, "rows": len(pairs)}
            rows.append(labels | {f"start_{turn}": start[turn] for turn in ("y1", "y2")} | shares)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "preference_term.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows: list[dict] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as directory:
            rows += run(seed, Path(directory))
        write(rows, args.output)


if __name__ == "__main__":
    main()
