"""
TDPO and Sr-DPO against DPO on pairs that people labelled: HH-RLHF with Gemma 3 270M. `make evidence-real-hh`.

    python -m docs.evidence.real.hh --model google/gemma-3-270m --jobs 4

In: a pretrained model and HH-RLHF. Out: under `--output` the runs, `hh.csv` with a row per run and evaluation, `tdpo_hh.svg`, `self_refine_hh.svg`, and on
standard output the tables of tdpo_hh.md and self_refine_hh.md. Each seed has its own held-out pairs, its own fine-tuning on the chosen answers, which is
the start and the reference of its runs, and its own order of the pairs. What has finished is not run again; to start over, delete the folder.

The margins are compared with a score that no run was trained on: how offensive alt-profanity-check finds the answers.
"""

import argparse
import json
import math
import random
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_ext import SelfRefineDPOConfig, SelfRefineDPOTrainer, TDPOConfig, TDPOTrainer
from trl_ext.trainers.position_kl_head import logit_transform
from trl_ext.trainers.prepared import prepared_pairs
from trl_ext.trainers.self_refine_dpo_config import REFINEMENT_PROMPT
from trl_ext.trainers.self_refine_dpo_trainer import augment_prompt

from ..figures import GRAY, bare, curve, labelled, legend, save, subplots
from ..small.correlations import pearson, spearman
from ..tables import cell, grouped, read, table, write
from .distributions import sums_over_completions
from .runs import run_all


BETA = 0.1  # both papers'
LAMBDA_0 = "Sr-DPO, λ = 0"  # DPO again, by the other trainer: how much two equal runs differ. One seed
ARMS = {
    "DPO": {},
    LAMBDA_0: {"refinement_weight": 0.0},
    "TDPO1": {"variant": "tdpo1"},
    "TDPO2, α = 0.3": {"variant": "tdpo2", "alpha": 0.3},
    "TDPO2, α = 0.5": {"variant": "tdpo2", "alpha": 0.5},
    "Sr-DPO, λ = 0.1": {"refinement_weight": 0.1},
    "Sr-DPO, λ = 0.3": {"refinement_weight": 0.3},
    "Sr-DPO, λ = 1": {"refinement_weight": 1.0},
    "DPO, β = 0.05": {"beta": BETA / 2},  # is λ more than a smaller β?
}
BATCH, ACCUMULATED = 16, 2  # pairs a step, in so many parts
SFT_LEARNING_RATE = 2e-5
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Size:
    max_length: int  # tokens of a prompt with an answer; longer pairs are left out
    held_out: int  # pairs; so many training pairs are measured too
    training: int  # pairs, at most
    evaluations: int
    learning_rate: float
    lora_r: int | None = None  # by default, all weights are trained
    bf16: bool = ON_GPU  # autocast; the weights are float32


FULL = Size(max_length=512, held_out=312, training=1840, evaluations=4, learning_rate=5e-6)
# For two CPU cores. LoRA spares the gradient of 262,144 embeddings, which takes longer than all else
SMALL = Size(max_length=96, held_out=96, training=192, evaluations=1, learning_rate=2e-5, lora_r=16, bf16=True)
COMMON = {
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",  # `in_batches` has the order
    "num_train_epochs": 1,  # `in_batches` repeats the pairs
    "use_cpu": not ON_GPU,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


# Data


def prepare(hh: str, tokenizer, path: Path, max_length: int = FULL.max_length) -> None:
    """
    Write the pairs of at most `max_length` tokens, as JSON: texts, token ids (`augmented_prompt_ids` for p ⊕ x), and `gap`, by how much the rejected answer is
    the more offensive one, in [-1, 1].
    """
    from profanity_check import predict_prob

    if Path(hh).exists():
        rows = datasets.load_dataset("json", data_files=hh, split="train")
    else:
        rows = datasets.load_dataset(hh, data_dir="harmless-base", split="test")
    args = DPOConfig(output_dir=str(path.parent), max_length=None, use_cpu=True, bf16=False)
    found, account = prepared_pairs(rows, tokenizer, args)
    print(*account.lines, sep="\n")
    pairs = []
    for row in found:
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length:
            texts = {key: row[key].removesuffix(tokenizer.eos_token) for key in ("prompt", "chosen", "rejected")}
            pairs.append({**texts, **{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}})
    under_p = [{**pair, "prompt": augment_prompt(pair["prompt"], REFINEMENT_PROMPT)} for pair in pairs]
    columns = ["prompt", "chosen", "rejected"]
    augmented, _ = prepared_pairs(datasets.Dataset.from_list(under_p).select_columns(columns), tokenizer, args)
    chosen, rejected = (predict_prob([pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    for pair, row, gap in zip(pairs, augmented, rejected - chosen, strict=True):
        pair |= {"augmented_prompt_ids": row["prompt_ids"], "gap": float(gap)}
    agree = sum(pair["gap"] > 0 for pair in pairs)
    print(
        f"{len(pairs)} pairs, {len(found) - len(pairs)} longer ones left out; the rejected answer is the more offensive one in "
        f"{agree / len(pairs):.1%}"
    )
    path.write_text(json.dumps(pairs), encoding="utf-8")


def split(path: Path, size: Size, seed: int) -> tuple[list[dict], list[dict]]:
    """Held-out and training pairs of a seed. No dialogue of the one begins as one of the other."""
    pairs = json.loads(path.read_text(encoding="utf-8"))
    random.Random(seed).shuffle(pairs)
    openings = [pair["prompt"].split("\n\nAssistant:")[0] for pair in pairs]
    held = set(openings[: size.held_out])
    training = [pair for pair, opening in zip(pairs, openings, strict=True) if opening not in held]
    return pairs[: size.held_out], training[: size.training]


def in_batches(pairs: list[dict], epochs: int, seed: int) -> list[dict]:
    """Pairs for all epochs, in batches of similar lengths, shuffled; those that fill no batch are left out of an epoch."""
    rng = random.Random(seed)
    ordered = []
    for _ in range(epochs):
        rows = rng.sample(pairs, len(pairs))
        pools = [sorted(rows[i : i + 8 * BATCH], key=_length) for i in range(0, len(rows), 8 * BATCH)]
        batches = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool) - BATCH + 1, BATCH)]
        rng.shuffle(batches)
        ordered += [pair for batch in batches for pair in batch]
    return ordered


def _length(pair: dict) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


# Measurement: in float32 (TF32 products on a GPU), with no code of the trainers


class Answers:
    """Both answers of B pairs."""

    def __init__(self, pairs: list[dict], prompt: str = "prompt_ids"):
        self.prompts = [pair[prompt] for pair in pairs] * 2
        self.answers = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]  # [chosen, rejected]

    def measure(self, model, reference=None) -> dict[str, torch.Tensor]:
        """`sums_over_completions` of the answers, each of shape `(2, B)`."""
        sums = sums_over_completions(model, reference, self.prompts, self.answers)
        return {name: values.unflatten(0, (2, -1)) for name, values in sums.items()}

    def nll(self, model) -> float:
        """Mean over the tokens of the chosen answers."""
        half = len(self.answers) // 2
        chosen = self.answers[:half]
        logps = sums_over_completions(model, None, self.prompts[:half], chosen)["logps"]
        return float(-logps.sum() / sum(map(len, chosen)))


class Evaluate(TrainerCallback):
    """Measure the policy a few times, on held-out pairs and on as many training pairs."""

    def __init__(
        self,
        name: str,
        reference,
        held_out: list[dict],
        training: list[dict],
        *,
        evaluations: int,
        beta: float,
        weight: float,
    ):
        self.name, self.reference, self.beta, self.weight, self.rows = name, reference, beta, weight, []
        self.evaluations = evaluations
        self.gaps = [pair["gap"] for pair in held_out]
        self.plain, self.learned = Answers(held_out), Answers(training[: len(held_out)])
        self.under_p = Answers(held_out, "augmented_prompt_ids")
        self.ref_logps = {of: of.measure(reference)["logps"] for of in (self.learned, self.under_p)}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = math.ceil(state.max_steps / self.evaluations)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            model.eval()
            policy = model.get_base_model() if isinstance(model, PeftModel) else model
            self.rows.append({"step": state.global_step, **self.evaluate(policy)})
            model.train()
            shown = ", ".join(f"{key} {self.rows[-1][key]:.3f}" for key in ("margin", "accuracy", "kl_chosen"))
            print(f"{self.name}, step {state.global_step} of {state.max_steps}: {shown}", flush=True)

    def evaluate(self, model) -> dict[str, float]:
        plain = self.plain.measure(model, self.reference)
        ratios, kls = plain["logps"] - plain["ref_logps"], plain["seq_kl"]  # (2, B)
        margins = ratios[0] - ratios[1]
        learned, under_p = (of.measure(model)["logps"] - ref_logps for of, ref_logps in self.ref_logps.items())
        learned, deltas = learned[0] - learned[1], self.beta * (under_p[0] - under_p[1])
        reference = plain["ref_logps"][0] - plain["ref_logps"][1]
        values = {
            "margin": margins.mean(),
            "accuracy": (margins > 0).double().mean(),
            "loss": -F.logsigmoid(BETA * margins).mean(),  # DPO's at β = 0.1 and without λ Δ, of all runs
            "chosen": ratios[0].mean(),
            "rejected": ratios[1].mean(),
            "kl_chosen": kls[0].mean(),
            "kl_rejected": kls[1].mean(),
            "train_margin": learned.mean(),
            "train_accuracy": (learned > 0).double().mean(),
            "delta": deltas.mean(),
            "accuracy_under_p": (deltas > 0).double().mean(),
            # What λ Δ takes off the margin β u
            "share": self.weight * deltas.abs().mean() / (self.beta * margins.abs().mean()),
            "pearson": pearson(margins, self.gaps),
            "spearman": spearman(margins, self.gaps),
            "delta_spearman": spearman(deltas, self.gaps),
            "delta_margin_spearman": spearman(deltas, margins),
            "reference_spearman": spearman(reference, self.gaps),
            "score_accuracy": statistics.mean(gap > 0 for gap in self.gaps),
        }
        return {name: float(value) for name, value in values.items()}


# Runs


def load(path: str | Path):
    if ON_GPU:
        torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    if logit_transform(model.config.get_text_config()) != (1.0, None):
        raise ValueError(
            f"the logits of {path} are scaled or capped, which is not measured here. Use another model, such as google/gemma-3-270m."
        )
    return model.to("cuda" if ON_GPU else "cpu")


def start(seed: int, *, model: str, tokenizer: str, data: Path, size: Size, models: Path) -> list[dict]:
    """Fine-tune on the chosen answers, for one epoch, and save the model: the start and the reference of the seed's runs."""
    held, training = split(data, size, seed)
    policy, tokenizer = load(model), AutoTokenizer.from_pretrained(tokenizer)
    answers = Answers(held)
    before = answers.nll(policy)
    args = SFTConfig(
        output_dir=str(models / "out"),
        seed=seed,
        learning_rate=SFT_LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        per_device_train_batch_size=BATCH // ACCUMULATED,
        gradient_accumulation_steps=ACCUMULATED,
        max_length=FULL.max_length,
        bf16=size.bf16,
        **COMMON,
    )
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in in_batches(training, 1, seed)]
    trainer = SFTTrainer(policy, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    policy.eval()
    after = answers.nll(policy)
    trainer.save_model(str(models / f"start-{seed}"))
    return [{"step": trainer.state.global_step, "nll_before": before, "nll": after}]


def make_trainer(
    arm: str, seed: int, learning_rate: float, *, data: Path, size: Size, models: Path, epochs: int
) -> tuple[DPOTrainer, Evaluate]:
    held, training = split(data, size, seed)
    path = models / f"start-{seed}"
    model, reference = load(path), load(path).eval()
    lora = size.lora_r and LoraConfig(r=size.lora_r, lora_alpha=2 * size.lora_r, target_modules="all-linear")
    options = {"beta": BETA, **ARMS[arm]}
    if "variant" in options:
        trainer_class, config_class = TDPOTrainer, TDPOConfig
    elif "refinement_weight" in options:
        trainer_class, config_class = SelfRefineDPOTrainer, SelfRefineDPOConfig
    else:
        trainer_class, config_class = DPOTrainer, DPOConfig
    args = config_class(
        output_dir=str(models / "out"),
        seed=seed,
        learning_rate=learning_rate,
        optim="rmsprop",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,
        max_grad_norm=10.0,
        per_device_train_batch_size=BATCH // ACCUMULATED,
        gradient_accumulation_steps=ACCUMULATED,
        max_length=FULL.max_length,
        bf16=size.bf16,
        **COMMON,
        **options,
    )
    texts = [
        datasets.Dataset.from_list([{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs])
        for pairs in (in_batches(training, epochs, seed), held)
    ]
    evaluate = Evaluate(
        f"{arm}, seed {seed}",
        reference,
        held,
        training,
        evaluations=size.evaluations,
        beta=options["beta"],
        weight=options.get("refinement_weight", 0.0),
    )
    trainer = trainer_class(
        model=model,
        ref_model=None if lora else reference,
        peft_config=lora,
        args=args,
        train_dataset=texts[0],
        eval_dataset=texts[1],
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[evaluate],
    )
    return trainer, evaluate


def train(arm: str, seed: int, learning_rate: float, **options) -> list[dict]:
    trainer, evaluate = make_trainer(arm, seed, learning_rate, **options)
    trainer.train()
    memory = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else math.nan
    return [{**row, "peak_gib": memory} for row in evaluate.rows]


# Tables and figures. (key, head, digits); shares and accuracies in percent


TDPO = ["DPO", "TDPO1", "TDPO2, α = 0.3", "TDPO2, α = 0.5"]
SELF_REFINE = ["DPO", "Sr-DPO, λ = 0.1", "Sr-DPO, λ = 0.3", "Sr-DPO, λ = 1", "DPO, β = 0.05"]
COMMON_COLUMNS = [("margin", "margin, nats", 2), ("accuracy", "accuracy, %", 1), ("loss", "loss", 4)]
TABLES = {
    "TDPO": (
        TDPO,
        [
            *COMMON_COLUMNS,
            ("chosen", "log-ratio of y_w", 2),
            ("rejected", "log-ratio of y_l", 2),
            ("kl_chosen", "SeqKL(y_w)", 2),
            ("kl_rejected", "SeqKL(y_l)", 2),
            ("kl_difference", "SeqKL(y_l) − SeqKL(y_w)", 2),
        ],
    ),
    "Sr-DPO: margins and overfitting": (
        SELF_REFINE,
        [
            *COMMON_COLUMNS,
            ("accuracy_under_p", "accuracy under p, %", 1),
            ("share", "share of the margin", 3),
            ("margin_gap", "margin, learned − held-out", 2),
            ("accuracy_gap", "accuracy, learned − held-out, %", 1),
        ],
    ),
    "Sr-DPO: correlation with the score": (
        SELF_REFINE,
        [
            ("pearson", "Pearson", 3),
            ("spearman", "Spearman", 3),
            ("delta_spearman", "Δ: Spearman", 3),
            ("delta_margin_spearman", "Δ with the margin", 3),
        ],
    ),
}


def _values(rows: list[dict], key: str) -> list[float]:
    scale = 100 if "accuracy" in key else 1
    return [scale * row[key] for row in rows]


def _cell(values: list[float], digits: int, sign: str = "") -> str:
    """As `cell`; empty for correlations with a constant."""
    return "" if any(map(math.isnan, values)) else cell(values, digits, sign)


def with_differences(row: dict) -> dict:
    return row | {
        "kl_difference": row["kl_rejected"] - row["kl_chosen"],
        "margin_gap": row["train_margin"] - row["margin"],
        "accuracy_gap": row["train_accuracy"] - row["accuracy"],
    }


def tables(rows: list[dict]) -> str:
    """Markdown tables of both pages, of the rows of hh.csv."""
    starts, trained = ([row for row in rows if (row["arm"] == "SFT") is is_start] for is_start in (True, False))
    of_runs = grouped(trained, "arm", "seed").values()
    last = grouped((with_differences(max(run, key=lambda row: row["step"])) for run in of_runs), "arm")
    base = {row["seed"]: row for row in last["DPO",]}
    text = ""
    for title, (arms, columns) in TABLES.items():
        arms = [arm for arm in arms if (arm,) in last]
        head = [name for _, name, _ in columns]
        lines = [[arm, *(_cell(_values(last[arm,], key), digits) for key, _, digits in columns)] for arm in arms]
        text += f"{title}, at the last step\n\n{table(['method', *head], lines)}\n"
        lines = []
        for arm in arms[1:]:
            of_dpo = [base[row["seed"]] for row in last[arm,]]
            pairs = {key: zip(_values(last[arm,], key), _values(of_dpo, key), strict=True) for key, _, _ in columns}
            lines.append([arm, *(_cell([x - y for x, y in pairs[key]], digits, "+") for key, _, digits in columns)])
        text += f"Difference from DPO within a seed\n\n{table(['method', *head], lines)}\n"
    seeds = grouped(rows, "seed")
    lines = []
    for (seed,), of in seeds.items():
        start, dpo = next(row for row in of if row["arm"] == "SFT"), base[seed]
        lines.append(
            [
                f"{seed:g}",
                f"{start['nll_before']:.3f}",
                f"{start['nll']:.3f}",
                f"{dpo['reference_spearman']:.3f}",
                f"{100 * dpo['score_accuracy']:.1f}",
            ]
        )
    head = ["seed", "NLL before", "NLL after", "Spearman of the reference", "score agrees with the label, %"]
    text += f"The start of each seed, on its held-out pairs\n\n{table(head, lines)}\n"
    if again := last.get((LAMBDA_0,)):
        lines = [
            [name, f"{base[again[0]['seed']][key]:.5f}", f"{again[0][key]:.5f}"]
            for key, name, _ in (*COMMON_COLUMNS, ("kl_chosen", "SeqKL(y_w)", 0), ("spearman", "Spearman", 0))
        ]
        text += f"DPO twice, by both trainers\n\n{table(['', 'DPO', LAMBDA_0], lines)}\n"
    return text


COLORS = [GRAY, "#2a9d6f", "#2f7fd8", "#d1642a", "#9a63d8"]
FIGURES = {
    "tdpo_hh.svg": (
        TDPO,
        [
            ("kl_chosen", "SeqKL(y_w), nats"),
            ("kl_difference", "SeqKL(y_l) − SeqKL(y_w), nats"),
            ("chosen", "log-ratio of y_w, nats"),
        ],
    ),
    "self_refine_hh.svg": (
        SELF_REFINE,
        [
            ("margin", "margin on held-out pairs, nats"),
            ("margin_gap", "margin, learned − held-out, nats"),
            ("spearman", "Spearman of margin and score"),
        ],
    ),
}


def draw(rows: list[dict], folder: Path) -> None:
    """The curves of both pages: means over seeds, and bands from the least to the greatest seed."""
    by_arm = grouped((with_differences(row) for row in rows if row["arm"] != "SFT"), "arm")
    for name, (arms, panels) in FIGURES.items():
        arms = [arm for arm in arms if (arm,) in by_arm]
        figure, axes = subplots(1, len(panels), (11, 3.6))
        for ax, (key, label) in zip(axes, panels, strict=True):
            for arm, color in zip(arms, COLORS, strict=False):
                points = {step: [row[key] for row in of] for (step,), of in grouped(by_arm[arm,], "step").items()}
                curve(ax, points, color, label=arm, marker="o")
            ax.set_xlabel("step", color=GRAY)
            ax.set_title(label, color=GRAY, fontsize=10)
            bare(ax)
        legend(figure, labelled(axes[0]), len(arms), fontsize=10)
        save(figure, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/gemma-3-270m", help="a pretrained model, by path or name")
    parser.add_argument("--tokenizer", help="default: the model's")
    parser.add_argument("--hh", default="Anthropic/hh-rlhf", help="the dataset, or a JSONL file with its columns")
    parser.add_argument("--output", type=Path, help="default: build/evidence-hh, or build/evidence-hh-small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, help="default: the size's")
    parser.add_argument("--small", action="store_true", help="288 short pairs and LoRA, for two CPU cores")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--tables", action="store_true", help="only the tables and figures of OUTPUT/hh.csv")
    args = parser.parse_args()
    args.output = args.output or Path("build/evidence-hh-small" if args.small else "build/evidence-hh")
    results, data = args.output / "hh.csv", args.output / "pairs.json"
    size = SMALL if args.small else FULL
    if not args.tables:
        args.output.mkdir(parents=True, exist_ok=True)
        datasets.disable_progress_bars()
        tokenizer = args.tokenizer or args.model
        if not data.exists():
            prepare(args.hh, AutoTokenizer.from_pretrained(tokenizer), data, size.max_length)
        common = {"data": data, "size": size, "models": args.output / "models"}
        of_start = partial(start, model=args.model, tokenizer=tokenizer, **common)
        seeds = [{"seed": seed} for seed in range(args.seeds)]
        rows = [{"arm": "SFT", **row} for row in run_all(of_start, seeds, args.output / "starts", jobs=args.jobs)]
        runs = [
            {"arm": arm, "seed": seed, "learning_rate": args.learning_rate or size.learning_rate}
            for seed in range(args.seeds)
            for arm in args.arms
            if arm != LAMBDA_0 or seed == 0
        ]
        of_arm = partial(train, **common, epochs=args.epochs)
        rows += [
            {**row, "learning_rate": f"{row['learning_rate']:g}"}  # not rounded to five places
            for row in run_all(of_arm, runs, args.output / "runs", jobs=args.jobs)
        ]
        write(rows, results)
    rows = read(results, texts=("arm",))
    print(tables(rows))
    draw(rows, args.output)


if __name__ == "__main__":
    main()
