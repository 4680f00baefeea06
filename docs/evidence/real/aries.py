"""
ARIES on Gemma 3 270M beside what it is made of: iterative DPO, and fine-tuning on the best answers. `make evidence-real-aries`.

    python -m docs.evidence.real.aries --model build/real/gemma-3-270m --jobs 4

In: a pretrained model. Out: under `--output` the finished runs, `aries.csv` with a row per run, round and turn, `aries.svg`, a report of one
run, and on standard output the tables of aries.md. What has finished is not run again; to start over, delete both folders.

The task and the recipe are those of `make quickstart-real`, with more rows, rounds and turns. Each run is `trl-ext aries run` on a recipe
that differs from the others in what its method says. The policies of all runs are measured alike, outside the runs: greedy answers by transformers,
in chains whatever the run's own strategy, to the same held-out prompts.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_ext.aries.data.records import read_json, read_jsonl
from trl_ext.aries.data.templates import compile_template, refinement_prompt
from trl_ext.aries.generation.drafts import stop_token_ids
from trl_ext.aries.scoring.evaluation import win_rate
from trl_ext.aries.scoring.verifier import load_verifier
from trl_ext.processes import die_with_parent

from ..figures import GRAY, bare, curve, labelled, legend, save, subplots
from ..tables import cell, grouped, read, table, write
from .runs import name_of, run_all


ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart-real"
ON_GPU = torch.cuda.is_available()
TURNS = 4
FIRST, NF4 = "ARIES, TDPO", "ARIES, TDPO, NF4"
# What a method's recipe changes, by section
METHODS: dict[str, dict[str, dict]] = {
    FIRST: {},
    "ARIES, DPO": {"training": {"trainer": "dpo"}},
    # As many answers as ARIES, all samples of the prompt, and as many training rows of a pair, all direct
    "iterative DPO": {
        "training": {"trainer": "dpo"},
        "refinements": {"strategy": "parallel"},
        "pairs": {"refinement_weight": 0, "direct_weight": 3},
    },
    # The recipe's NLL term alone
    "best answers": {"training": {"trainer": "dpo", "loss_type": ["sft"]}},
    NF4: {"model": {"load_in_4bit": True, "use_bnb_nested_quant": True}},
}
NLL_WEIGHT = 0.5  # of the preference loss's 1
ON_DEVICE = {"use_cpu": not ON_GPU, "bf16": ON_GPU}
# What all of them change in the quickstart's recipe
CHANGES: dict[str, dict] = {
    "model": {"dtype": "bfloat16" if ON_GPU else "float32"},
    # Runs share a GPU: each takes a little of it, whatever the others leave
    "generation": {
        "gpu_memory_utilization": 0.05,
        "gpu_kv_cache_gib": 2,
        "enforce_eager": True,
        "max_num_seqs": 256 if ON_GPU else 64,
    },
    "sft": {**ON_DEVICE, "per_device_train_batch_size": 16},
    "refinements": {"turns": TURNS},
    "pairs": {"guard": "warn"},
    "training": {**ON_DEVICE, "per_device_train_batch_size": 16},
    "parity": {"samples": 32},
    "health": {"max_kl": None},
}
TRIES = 3  # of a stage that fails

Row = dict[str, Any]


# Recipes and runs


def recipe_of(method: str, seed: int, model: str, data: Path, output: Path, sizes: dict[str, int]) -> Row:
    """The quickstart's recipe with the experiment's changes and the method's."""
    recipe = yaml.safe_load((QUICKSTART / "aries.yaml").read_text())
    recipe |= {"output_dir": str(output), "seed": seed, "rounds": sizes["rounds"]}
    changes = {
        "model": {"model_name_or_path": model},
        "prompts": {"dataset": str(data / "train.jsonl"), "per_round": sizes["per_round"]},
        "sft": {"dataset": str(data / "sft.jsonl")},
        "evaluation": {"dataset": str(data / "eval.jsonl")},
        "scores": {"verifier": f"{QUICKSTART / 'verifier.py'}:share_kept"},
    }
    for sections in (CHANGES, changes, METHODS[method]):
        for section, keys in sections.items():
            recipe[section] = recipe.get(section, {}) | keys
    losses = recipe["training"]["loss_type"]
    recipe["training"]["loss_weights"] = [NLL_WEIGHT if loss == "sft" else 1.0 for loss in losses]
    return recipe


def prepare(data: Path, seed: int, sizes: dict[str, int]) -> None:
    """The rows of a seed, the same for all methods."""
    command = [sys.executable, str(QUICKSTART / "prepare.py"), f"--output={data}", f"--seed={seed}"]
    command += [f"--sft={sizes['sft']}", f"--train={sizes['per_round'] * sizes['rounds']}"]
    subprocess.run([*command, f"--evaluation={sizes['held_out']}"], check=True, stdout=subprocess.DEVNULL)


def run_recipe(file: Path, output: Path) -> str:
    """
    `trl-ext aries run`. A stage that fails is tried again.

    Returns:
        `str`: what ended the run before its last round; empty if nothing did.

    Raises:
        RuntimeError: a stage keeps failing, or the run never began.
    """
    command = [sys.executable, "-m", "trl_ext.cli", "aries", "run", "--config", str(file)]
    ends_with_us = partial(die_with_parent, os.getpid())
    for _ in range(TRIES):
        with open(file.with_suffix(".log"), "a") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, preexec_fn=ends_with_us)
            log.write(done.stderr)
        if done.returncode == 0:
            return ""
        if "The same command continues" not in done.stderr:
            if done.returncode not in (1, 2) or not (output / "round_00" / "metrics.json").exists():
                break
            return done.stderr.strip().splitlines()[-1]  # its own checks ended it, which is a result
        print(f"{file.stem}, again after:\n{done.stderr[-2000:]}", flush=True)
    raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr[-2000:]}")


def run(method: str, seed: int, *, model: str, sizes: dict[str, int], root: Path) -> list[Row]:
    """One run, and its policies measured: rows of the CSV."""
    name = name_of({"method": method, "seed": seed})
    data, output = root / "data" / name, root / name
    prepare(data, seed, sizes)
    file = root / f"{name}.yaml"
    recipe = recipe_of(method, seed, model, data, output, sizes)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    ended = run_recipe(file, output)
    prompts = read_jsonl(data / "eval.jsonl")
    rows: list[Row] = []
    scores: list[list[list[float]]] = []  # by round, turn and prompt
    for number, adapter in enumerate(sorted(output.glob("round_*/adapter"))):
        answers = Answers(recipe, adapter).chains([row["prompt"] for row in prompts])
        scores.append(scores_of(answers, prompts))
        of_round = round_facts(output / f"round_{number:02d}") | {"start": start_of(output), "ended": ended}
        for turn in range(1, TURNS + 1):
            rows.append({"round": number, "turn": turn} | turn_row(turn - 1, answers, scores, prompts) | of_round)
    return rows


def round_facts(path: Path) -> Row:
    """What the run's own files say of a round."""
    tokens = (read_json(path / "cost.json") or {}).get("generated_tokens", {})
    kl = (read_json(path / "metrics.json") or {}).get("kl_to_initial") or {}
    return {
        "pairs": (read_json(path / "drops.json") or {}).get("pairs", 0),
        "rows": (read_json(path / "training" / "rows.json") or {}).get("rows", 0),
        "generated_tokens": sum(tokens.get(stage, 0) for stage in ("drafts", "refinements")),
        "kl_per_token": kl.get("per_token", ""),
    }


def start_of(output: Path) -> str:
    """The beginning of a hash of the adapter that the SFT made: the same for runs that start alike."""
    return hashlib.sha256((output / "round_00" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]


# Measuring


class Answers:
    """
    Greedy answers of a policy, by transformers in the engine's precision.

    Args:
        recipe (`dict`):
            The run's.
        adapter (`Path`):
            Of the policy.
    """

    def __init__(self, recipe: Row, adapter: Path):
        from peft import PeftModel

        base, device = recipe["model"]["model_name_or_path"], "cuda" if ON_GPU else "cpu"
        dtype = getattr(torch, recipe["generation"]["dtype"])
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": device})
        self.model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.ends = stop_token_ids(self.tokenizer, self.model.generation_config)
        self.limit, [self.stop] = recipe["drafts"]["max_tokens"], recipe["drafts"]["stop"]
        self.template = compile_template(recipe["refinements"]["template"])

    @torch.no_grad()
    def answer(self, texts: list[str]) -> list[str]:
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        settings = GenerationConfig(
            max_new_tokens=self.limit,
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        out = self.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        answers = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [answer.split(self.stop)[0].strip() for answer in answers]

    def chains(self, prompts: list[str]) -> list[list[str]]:
        """y1 to y4, each a list over the prompts."""
        turns = [self.answer(prompts)]
        while len(turns) < TURNS:
            asked = [refinement_prompt(p, [draft], self.template) for p, draft in zip(prompts, turns[-1], strict=True)]
            turns.append(self.answer(asked))
        return turns


def scores_of(answers: list[list[str]], prompts: list[Row]) -> list[list[float]]:
    """By turn and prompt."""
    score = load_verifier(f"{QUICKSTART / 'verifier.py'}:share_kept")
    columns = {key: [row[key] for row in prompts] for key in ("thing", "constraints")}
    return [score(completions=turn, **columns) for turn in answers]


def turn_row(turn: int, answers: list[list[str]], scores: list[list[list[float]]], prompts: list[Row]) -> Row:
    """
    Mean score and share of right answers, those that keep to both constraints, of the prompts with kinds of constraints that the training
    combines (`seen`) and does not (`unseen`); and what the turn has lost.
    """
    *earlier, now = scores
    row: Row = {}
    for part, unseen in (("seen", False), ("unseen", True)):
        values = [score for score, prompt in zip(now[turn], prompts, strict=True) if prompt["unseen"] == unseen]
        row |= {
            f"score_{part}": statistics.mean(values),
            f"right_{part}": statistics.mean(float(v == 1) for v in values),
        }
    before = answers[turn - 1] if turn else None
    same = [] if before is None else [float(a == b) for a, b in zip(before, answers[turn], strict=True)]
    row["unchanged"] = statistics.mean(same) if same else ""
    compared = {"round before": earlier[-1:], "round 0": earlier[:1]}
    lost = [name for name, found in compared.items() for other in found if loses(now[turn], other[turn])]
    return row | {"lost": ", ".join(lost)}


def loses(scores: list[float], other: list[float]) -> bool:
    """Whether answers lose against others to the same prompts, beyond the 95 % interval, as a run says it."""
    return win_rate(scores, other)["interval"][1] < 0.5


# Tables and figure


TEXTS = ("method", "lost", "start", "ended")
MEASURES = {"right_seen": "seen pairs of kinds", "right_unseen": "unseen pairs of kinds"}
COLORS = {
    FIRST: "#2a9d6f",
    "ARIES, DPO": "#2f7fd8",
    "iterative DPO": "#d1642a",
    "best answers": "#9a63d8",
    NF4: GRAY,
}
TURN_NAMES = [f"y{turn}" for turn in range(1, TURNS + 1)]


def of(rows: list[Row], method: str, number: float) -> list[list[Row]]:
    """A method's rows after a round, a list for each turn; empty ones if no run has reached it."""
    found = [row for row in rows if (row["method"], row["round"]) == (method, number)]
    return [[row for row in found if row["turn"] == turn] for turn in range(1, TURNS + 1)]


def percent(rows: list[Row], key: str) -> str:
    return cell([100 * row[key] for row in rows], 1)


def methods_of(rows: list[Row]) -> list[str]:
    return [method for method in METHODS if any(row["method"] == method for row in rows)]


def rounds_of(rows: list[Row]) -> list[float]:
    return sorted({row["round"] for row in rows})


def ends(rows: list[Row], key: str) -> str:
    """Before round 1 and after the last round, y1 to y4."""
    found, last = methods_of(rows), rounds_of(rows)[-1]
    lines = {"SFT": of(rows, found[0], 0)} | {method: of(rows, method, last) for method in found}
    return table(["", *TURN_NAMES], [[name, *(percent(turn, key) for turn in turns)] for name, turns in lines.items()])


def differences(rows: list[Row], key: str) -> str:
    """From the first method after the last round, within each seed, in points."""
    base, *others = methods_of(rows)
    last = rounds_of(rows)[-1]
    lines = []
    for method in others:
        points = []
        for ours, theirs in zip(of(rows, method, last), of(rows, base, last), strict=True):
            of_seed = {row["seed"]: row[key] for row in theirs}
            points.append([100 * (row[key] - of_seed[row["seed"]]) for row in ours if row["seed"] in of_seed])
        lines.append([method, *(cell(values, 1, "+") for values in points)])
    return table(["", *TURN_NAMES], lines)


def by_round(rows: list[Row], key: str) -> str:
    """The direct answer, the first refinement and the last one, after each round."""
    rounds = rounds_of(rows)
    lines = [
        [method, TURN_NAMES[turn], *(percent(of(rows, method, number)[turn], key) for number in rounds)]
        for method in methods_of(rows)
        for turn in (0, 1, TURNS - 1)
    ]
    return table(["", "answer", "SFT", *(f"round {number:.0f}" for number in rounds[1:])], lines)


def work(rows: list[Row]) -> str:
    """What a run learned from and generated, its rounds together; its KL; and what its refinements still do. Means over seeds."""
    last = rounds_of(rows)[-1]
    lines = []
    for method in methods_of(rows):
        trained = [row for row in rows if row["method"] == method and row["round"] > 0]
        direct = [row for row in trained if row["turn"] == 1]
        runs = len({row["seed"] for row in direct})
        sums = [f"{sum(row[key] for row in direct) / runs:,.0f}" for key in ("pairs", "rows", "generated_tokens")]
        kl = (statistics.mean(row["kl_per_token"] for row in group) for group in grouped(direct, "round").values())
        lost = sum(row["lost"] != "" for row in trained)
        unchanged = [row["unchanged"] for row in trained if row["turn"] > 1 and row["round"] == last]
        lines.append(
            [
                method,
                *sums,
                ", ".join(f"{value:.2g}" for value in kl),
                f"{lost} of {len(trained)}",
                f"{100 * statistics.mean(unchanged):.0f} %" if unchanged else "not reached",
            ]
        )
    head = [
        "pairs",
        "training rows",
        "generated tokens",
        "KL per token",
        "turns that lost",
        "refinements that change nothing",
    ]
    return table(["", *head], lines)


def tables(rows: list[Row]) -> str:
    """The Markdown tables of aries.md."""
    parts = []
    for key, title in MEASURES.items():
        parts += [f"After the last round, {title}", ends(rows, key)]
        parts += [f"Difference from {methods_of(rows)[0]}, within each seed, {title}", differences(rows, key)]
    for key, title in MEASURES.items():
        parts += [f"Round by round, {title}", by_round(rows, key)]
    return "\n\n".join([*parts, "Work", work(rows)])


def draw(rows: list[Row], output: Path) -> None:
    """Direct answers by round, and the chain after the last round, for both kinds of prompts."""
    rounds = rounds_of(rows)
    figure, axes = subplots(2, 2, (8.5, 6.6), sharey=True)
    for line, (key, title) in zip(axes, MEASURES.items(), strict=True):

        def values_of(groups: list[list[Row]], key: str = key) -> list[list[float]]:
            return [[100 * row[key] for row in group] for group in groups if group]

        for method in methods_of(rows):
            style = {"color": COLORS[method], "linewidth": 1.8}
            direct = values_of([of(rows, method, number)[0] for number in rounds])
            curve(line[0], dict(zip(rounds, direct, strict=False)), label=method, **style)
            chain = values_of(of(rows, method, rounds[-1]))
            line[1].plot(TURN_NAMES[: len(chain)], [*map(statistics.mean, chain)], marker="o", markersize=3, **style)
        start = [*map(statistics.mean, values_of(of(rows, methods_of(rows)[0], 0)))]
        line[1].plot(
            TURN_NAMES, start, color=GRAY, linestyle=":", linewidth=1.8, marker="o", markersize=3, label="SFT"
        )
        line[0].set_title(f"y1 by round: {title}", fontsize=10, color=GRAY)
        line[0].set_xticks(rounds, ["SFT", *(f"{number:.0f}" for number in rounds[1:])])
        line[1].set_title("the chain after the last round", fontsize=10, color=GRAY)
        line[0].set_ylabel("both constraints kept, %", color=GRAY)
    for ax in axes.flat:
        ax.set_ylim(0, 100)
        bare(ax)
    legend(figure, labelled(*axes[0]), 3)
    save(figure, output)


def keep_report(run: Path, output: Path) -> None:
    """The report of a run and its numbers, without its models and answers."""
    output.mkdir(parents=True, exist_ok=True)
    for file in [*run.glob("*.html"), *run.glob("*.yaml"), *run.glob("round_*/*.json"), *run.glob("events.jsonl")]:
        target = output / file.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/real/gemma-3-270m", help="a pretrained model, by path or name")
    parser.add_argument("--output", type=Path, default=Path("build/evidence-aries"))
    parser.add_argument("--root", type=Path, default=Path("runs/evidence-real"), help="where the runs are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--nf4", action="store_true", help=f"{FIRST} on a base in NF4 too, with one seed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per_round", type=int, default=512, help="prompts of a round")
    parser.add_argument("--sft", type=int, default=256, help="problems of the SFT")
    parser.add_argument("--held_out", type=int, default=256, help="prompts of the evaluation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--tables", action="store_true", help="only the tables and the figure of OUTPUT/aries.csv")
    args = parser.parse_args()
    results = args.output / "aries.csv"
    if not args.tables:
        sizes = {key: getattr(args, key) for key in ("rounds", "per_round", "sft", "held_out")}
        wanted = [m for m in args.methods or METHODS if m != NF4 or args.methods]
        settings: list[Row] = [{"method": method, "seed": seed} for seed in range(args.seeds) for method in wanted]
        settings += [{"method": NF4, "seed": 0}] if args.nf4 else []
        job = partial(run, model=args.model, sizes=sizes, root=args.root)
        args.root.mkdir(parents=True, exist_ok=True)
        write(run_all(job, settings, args.output / "finished", jobs=args.jobs), results)
        for one in settings:
            report = args.root / name_of(one)
            if one["seed"] == 0 and report.exists():
                keep_report(report, args.output / "reports" / report.name)
    rows = read(results, TEXTS)
    print(tables(rows))
    draw(rows, args.output / "aries.svg")


if __name__ == "__main__":
    main()
