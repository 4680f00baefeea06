"""
TDPO's frontier on a pretrained model: reward against KL for DPO, TDPO1 and TDPO2. `make evidence-real-frontier`.

    python -m docs.evidence.real.tdpo_frontier --model google/gemma-3-270m --jobs 4
    python -m docs.evidence.real.tdpo_frontier --model google/gemma-3-270m --small  # for a CPU

In: a pretrained causal LM. Out: `tdpo_frontier.csv`, a row per run and evaluation, its figure, and its tables on standard output. The stage before the runs writes into `--output`: the SFT model, which
every run starts from and has as its reference, samples of it, and the pairs. A second call continues the first. The trainers are
TRL's DPOTrainer and this package's TDPOTrainer; all methods see the pairs of a seed in the same order.
"""

import argparse
import copy
import functools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_ext import TDPOConfig, TDPOTrainer

from ..tables import write
from . import tdpo_frontier_figure
from .distributions import sums_over_completions
from .film_reviews import (
    analyzer,
    completion_ids,
    first_sentences,
    load_model,
    load_tokenizer,
    make_openings,
    make_pairs,
    measure,
    prompt_ids,
    reward,
    sample,
    shown_reviews,
    text_of,
)
from .runs import Row, run_all


HERE = Path(__file__).parent
METHODS = {
    "DPO": None,
    "TDPO1": {"variant": "tdpo1"},
    "TDPO2, α = 0.3": {"variant": "tdpo2", "alpha": 0.3},
    "TDPO2, α = 0.5": {"variant": "tdpo2", "alpha": 0.5},
}
MAX_LENGTH = 96  # nothing is cut: an opening has at most 20 tokens


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    sft_openings: int = 3000
    sft_epochs: int = 2
    openings: int = 1000  # of each seed
    held_out: int = 512
    batch: int = 32  # pairs
    steps: int = 96
    every: int = 12  # steps between evaluations
    early: int = 3  # and between those before the first of them, when DPO's KL grows fastest
    learning_rate: float = 1e-5
    lora_r: int | None = None  # by default, all weights are trained
    bf16_on_cpu: bool = False  # autocast, in training and in measuring


TINY = Sizes(sft_openings=24, sft_epochs=1, openings=8, held_out=8, batch=2, every=1, early=1)
# LoRA spares the gradient of 262,144 embeddings, which takes longer than all else
SMALL = Sizes(
    sft_openings=384,
    openings=192,
    held_out=96,
    batch=16,
    steps=16,
    every=8,
    early=2,
    learning_rate=5e-5,
    lora_r=16,
    bf16_on_cpu=True,
)


def quiet() -> None:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def lowered(sizes: Sizes) -> torch.autocast:
    """The precision of what is sampled and measured: without effect on a GPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=sizes.bf16_on_cpu)


def options(sizes: Sizes, **own) -> dict:
    """What every training has."""
    cuda = torch.cuda.is_available()
    return {
        "bf16": cuda or sizes.bf16_on_cpu,  # autocast; the weights stay in float32, where small updates do not vanish
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "max_length": MAX_LENGTH,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    } | own


def openings_of(part: str, sizes: Sizes) -> list[str]:
    """The openings of one part: `sft`, `held_out` or `seed_0` and so on; no two parts share one."""
    first, last = 0, sizes.sft_openings
    if part != "sft":
        first, last = last, last + sizes.held_out
    if part.startswith("seed_"):
        first = last + int(part.removeprefix("seed_")) * sizes.openings
        last = first + sizes.openings
    return make_openings(last, seed=0)[first:last]


def make_reference(seed: int, *, model_path: str, folder: Path, sizes: Sizes) -> list[Row]:
    """
    SFT on the model's own reviews: it continues openings behind reviews of either sentiment, and learns the first sentences without those
    reviews. Saves `reference` and returns what it writes about held-out openings, to look at.
    """
    quiet()
    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    generator, openings = random.Random(seed), openings_of("sft", sizes)
    prompts = prompt_ids(tokenizer, [shown_reviews(opening, generator) for opening in openings])
    with lowered(sizes):
        texts = [first_sentences(text_of(tokenizer, ids)) for ids in sample(model, prompts, seed, top_p=0.95)]
    reviews = [
        {"prompt": opening, "completion": text}
        for opening, text in zip(openings, texts, strict=True)
        if text is not None
    ]
    print(f"SFT on {len(reviews)} continuations of {len(openings)} openings", flush=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **options(
                sizes,
                output_dir=str(folder / "trainer"),
                learning_rate=2e-5,
                num_train_epochs=sizes.sft_epochs,
                per_device_train_batch_size=sizes.batch,
                seed=seed,
            )
        ),
        train_dataset=datasets.Dataset.from_list(reviews),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "reference"))
    model = load_model(folder / "reference")
    shown = openings_of("held_out", sizes)
    with lowered(sizes):
        texts = [text_of(tokenizer, ids) for ids in sample(model, prompt_ids(tokenizer, shown), seed)]
    return [
        {"opening": opening, "continuation": text, "reward": reward(text)}
        for opening, text in zip(shown, texts, strict=True)
    ]


def pairs_of(part: str, *, folder: Path, sizes: Sizes) -> list[Row]:
    """Pairs of the reference's continuations: all of a seed's openings, or one of each of the first half of the held-out openings."""
    quiet()
    model, tokenizer = load_model(folder / "reference"), load_tokenizer(folder / "reference")
    openings = openings_of(part, sizes)
    if part == "held_out":
        openings = openings[: sizes.held_out // 2]
    seed = 999 if part == "held_out" else int(part.removeprefix("seed_"))
    with lowered(sizes):
        pairs = make_pairs(model, tokenizer, openings, seed=seed)
    print(f"{part}: {len(pairs)} pairs of {len(openings)} openings", flush=True)
    return list({pair["prompt"]: pair for pair in pairs}.values()) if part == "held_out" else pairs


def pairs_in(folder: Path, part: str) -> list[Row]:
    return json.loads((folder / "pairs" / f"{part}.json").read_text(encoding="utf-8"))


class Evaluate(TrainerCallback):
    """Measure the policy at the start and every so many steps, without what a trainer has wrapped it in."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.sizes, self.rows = sizes, []
        self.tokenizer = load_tokenizer(folder / "reference")
        self.reference = load_model(folder / "reference")
        self.copy = None if sizes.lora_r else load_model(folder / "reference")
        self.openings, pairs = openings_of("held_out", sizes), pairs_in(folder, "held_out")
        self.prompts = prompt_ids(self.tokenizer, [pair["prompt"] for pair in pairs])
        self.sides = {
            side: [completion_ids(self.tokenizer, pair["prompt"], pair[side]) for pair in pairs]
            for side in ("chosen", "rejected")
        }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        interval = self.sizes.early if state.global_step < self.sizes.every else self.sizes.every
        if state.global_step % interval == 0:
            self.evaluate(state.global_step, model)

    def evaluate(self, step: int, model) -> None:
        if isinstance(model, PeftModel):
            policy = copy.deepcopy(model).merge_and_unload()
            policy.requires_grad_(True)  # autocast keeps the bfloat16 copies of no other weights
        else:
            policy = self.copy
            policy.load_state_dict(model.state_dict())
        with lowered(self.sizes):
            self.rows.append({"step": step, **self.measure(policy, step)})

    def measure(self, policy: PreTrainedModel, step: int) -> dict[str, float]:
        sums = {
            side: sums_over_completions(policy, self.reference, self.prompts, completions, rows=128)
            for side, completions in self.sides.items()
        }
        chosen, rejected = (sums[side]["logps"] - sums[side]["ref_logps"] for side in ("chosen", "rejected"))
        return {
            **measure(policy, self.reference, self.tokenizer, self.openings, seed=step),
            **{f"seq_kl_{side}": float(of["seq_kl"].mean()) for side, of in sums.items()},
            "accuracy": float((chosen > rejected).double().mean()),
        }


def train(
    method: str, beta: float, seed: int, steps: int, learning_rate: float, *, folder: Path, sizes: Sizes, threads: int
) -> list[Row]:
    """One run: a row per evaluation."""
    torch.set_num_threads(threads)
    quiet()
    callback = Evaluate(folder, sizes)
    own = METHODS[method]
    settings = options(
        sizes,
        output_dir=str(folder / "trainer"),
        beta=beta,
        seed=seed,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=sizes.batch,
        optim="rmsprop",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=steps // 4,
        max_grad_norm=10.0,
        **(own or {}),
    )
    lora = sizes.lora_r and LoraConfig(r=sizes.lora_r, lora_alpha=2 * sizes.lora_r, target_modules="all-linear")
    trainer = (DPOTrainer if own is None else TDPOTrainer)(
        model=load_model(folder / "reference"),
        ref_model=None if lora else load_model(folder / "reference"),
        peft_config=lora,
        args=(DPOConfig if own is None else TDPOConfig)(**settings),
        train_dataset=datasets.Dataset.from_list(pairs_in(folder, f"seed_{seed}")),
        processing_class=callback.tokenizer,
        callbacks=[callback],
    )
    callback.evaluate(0, trainer.model)
    trainer.train()
    return callback.rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="google/gemma-3-270m", help="a pretrained model, as a directory or its id on the Hub"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, help="default: the size's")
    parser.add_argument("--learning_rate", type=float, help="default: the size's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each takes about 15 GB of a GPU")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="LoRA and 16 steps, for a CPU")
    size.add_argument("--tiny", action="store_true", help="a few examples of everything, to try the script on a CPU")
    parser.add_argument(
        "--output", type=Path, help="for the reference, the pairs and the runs; default: in build/evidence"
    )
    parser.add_argument("--csv", type=Path, help="default: tdpo_frontier.csv, or tdpo_frontier_small.csv")
    args = parser.parse_args(argv)
    analyzer()  # raises at once if it is not installed
    name = "tdpo_frontier_small" if args.small else "tdpo_frontier"
    args.output, args.csv = args.output or Path("build/evidence") / name, args.csv or HERE / f"{name}.csv"
    sizes = SMALL if args.small else TINY if args.tiny else Sizes()
    args.steps, args.learning_rate = args.steps or sizes.steps, args.learning_rate or sizes.learning_rate
    folder, started = args.output, time.monotonic()
    made_with, settings = folder / "settings.json", {"model": str(args.model), "sizes": repr(sizes)}
    if made_with.exists() and json.loads(made_with.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{folder} has runs with other settings: see {made_with}. Give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    made_with.write_text(json.dumps(settings), encoding="utf-8")
    # Each stage in processes of its own, which leave the memory of the GPU behind them
    prepare = functools.partial(make_reference, model_path=args.model, folder=folder, sizes=sizes)
    run_all(prepare, [{"seed": 0}], folder / "samples")
    parts = [{"part": part} for part in ("held_out", *(f"seed_{seed}" for seed in range(args.seeds)))]
    run_all(functools.partial(pairs_of, folder=folder, sizes=sizes), parts, folder / "pairs", jobs=args.jobs)
    settings = [
        {"method": method, "beta": beta, "seed": seed, "steps": args.steps, "learning_rate": args.learning_rate}
        for beta in args.betas
        for seed in range(args.seeds)
        for method in args.methods
    ]
    threads = max(1, torch.get_num_threads() // args.jobs)
    run = functools.partial(train, folder=folder, sizes=sizes, threads=threads)
    rows = run_all(run, settings, folder / "runs", jobs=args.jobs)
    write(rows, args.csv)
    print(f"{args.csv}: {len(rows)} rows, {time.monotonic() - started:.0f} s", flush=True)
    tdpo_frontier_figure.main(["--csv", str(args.csv)])
    return rows


if __name__ == "__main__":
    main()
