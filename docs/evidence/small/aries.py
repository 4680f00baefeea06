"""
ARIES beside what it is made of: iterative DPO, fine-tuning on the best answers, other trainers and selections, and what makes it
degenerate. `make evidence-aries`.

    python -m docs.evidence.small.aries --seeds 3 --jobs 2

In: seeds. Out: `aries.csv`, a row per run and policy, and a directory of runs. Each run is `trl-ext aries run` on a recipe that differs
from the quickstart's in what its method says. Runs of a seed start from the same SFT model, that of the seed's first run, and each
policy's answers to 500 held-out prompts are generated here, greedily and by transformers, in chains whatever the run's own strategy is. A
second call goes on with the runs that are missing.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml

from trl_ext.aries.data.records import read_json, read_jsonl
from trl_ext.aries.policies import is_rolled_back, is_skipped
from trl_ext.aries.run_dir import RoundDir
from trl_ext.aries.scoring.evaluation import lost_turns
from trl_ext.processes import die_with_parent

from ..tables import write
from . import editing
from .quickstart_task import QUICKSTART, Answers, prepare
from .training import ON_CPU


HERE = Path(__file__).parent
ROUNDS, PER_ROUND = 3, 1500
ITERATIVE_DPO = {"refinements": {"strategy": "parallel", "temperature": 1.0}, "pairs": {"refinement_weight": 0}}
# As many rows as ARIES makes of a pair
ITERATIVE_DPO_COMPUTE = ITERATIVE_DPO | {"pairs": {"refinement_weight": 0, "direct_weight": 4}}

# What a method's recipe changes in the quickstart's, by section
METHODS = {
    "ARIES, DPO": {},
    "ARIES, TDPO": {"training": {"trainer": "tdpo"}},
    # The paper's p is words that this tokenizer does not have
    "ARIES, Sr-DPO": {"training": {"trainer": "self_refine_dpo", "refinement_prompt": "Write a better answer ."}},
    "best answers": {"training": {"loss_type": ["sft"], "loss_weights": [2.0]}},  # the quickstart's NLL term alone
    "iterative DPO, samples": ITERATIVE_DPO,
    "iterative DPO, compute": ITERATIVE_DPO_COMPUTE,
    "by reward model": {"scores": {"verifier": None, "reward_model": "REWARD_MODEL"}},
    "by rule": {"pairs": {"selection": "rule_based"}},
}
# What makes the loop degenerate. Here as everywhere the guard, which would end the run, only warns; so would the bound on KL
DEGENERATE = {
    "no NLL": {
        "training": {"loss_type": ["sigmoid"], "loss_weights": None},
        "parity": {},
        "health": {"max_kl": None},
    },
    "few pairs": {"prompts": {"per_round": 60}, "parity": {}},
    "150 prompts": {"prompts": {"dataset": "SAME_PROMPTS"}, "parity": {}},
}
# Of the second task, whose direct answers are not right at first: with scores for right positions, direct answers have pairs too
PARTIAL = {"scores": {"verifier": str(QUICKSTART / "verifier.py:partial_match")}}
PARTIALLY_SCORED = {"ARIES, partial scores": PARTIAL, "iterative DPO, partial scores": ITERATIVE_DPO_COMPUTE | PARTIAL}
ALL_METHODS = METHODS | DEGENERATE | PARTIALLY_SCORED
FIRST = next(iter(METHODS))  # makes the SFT model of the others
TASKS = {
    "sorting": [*METHODS, *DEGENERATE],
    "editing": [FIRST, "best answers", "iterative DPO, samples", *PARTIALLY_SCORED],
    "editing, short SFT": [FIRST],
    "small edits, short SFT": [FIRST],
}
# Passes of bubble sort in an edit, and rows of the SFT
EDITS = {"editing": (4, 40000), "editing, short SFT": (4, 16000), "small edits, short SFT": (2, 16000)}


def recipe_of(task: str, method: str, data: Path, output: Path, seed: int, start: Path | None) -> dict:
    """The quickstart's recipe with the task's data and the method's changes, from the SFT model `start`, or with the SFT."""
    recipe = yaml.safe_load((QUICKSTART / "aries.yaml").read_text())
    recipe |= {"output_dir": str(output), "seed": seed, "rounds": ROUNDS, "parity": {"samples": 0}}
    recipe["model"]["model_name_or_path"] = str(start or data / "model")
    recipe["prompts"] = {"dataset": str(data / "train.jsonl"), "per_round": PER_ROUND}
    recipe["evaluation"] |= {"dataset": str(data / "eval.jsonl"), "samples": 100}  # for the run's own checks
    recipe["pairs"]["guard"] = "warn"
    recipe["sft"]["dataset"] = str(data / "sft.jsonl")
    if start is not None:
        del recipe["sft"]
    for section, changes in ALL_METHODS[method].items():
        recipe[section] = recipe.get(section, {}) | changes if changes else {}
    if recipe["prompts"]["dataset"] == "SAME_PROMPTS":
        recipe["prompts"]["dataset"] = str(data / "same.jsonl")
    if recipe["scores"].get("reward_model") == "REWARD_MODEL":
        reward_model = output.with_name(f"{output.name}_reward_model")
        train_reward_model(start, data, reward_model, seed)
        recipe["scores"] = {"reward_model": str(reward_model), "reward_model_backend": "transformers"}
    return recipe


# The data of a seed


def prepare_data(task: str, data: Path, seed: int) -> None:
    """Once for all runs of a task and seed."""
    if (data / "eval.jsonl").exists():
        return
    if task in EDITS:
        editing.prepare(data, seed, *EDITS[task])
        return
    prepare.main([f"--output={data}", f"--seed={seed}"])
    prepare.write_jsonl(data / "same.jsonl", read_jsonl(data / "train.jsonl")[: PER_ROUND // 10] * (10 * ROUNDS))


def train_reward_model(start: Path, data: Path, output: Path, seed: int) -> None:
    """A reward model that starts from the SFT model, on right answers to the problems of the SFT beside the wrong drafts it has seen."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rng = random.Random(seed)
    rows = []
    for row in read_jsonl(data / "sft.jsonl"):
        solution = row["completion"][0]["content"].split()
        make = rng.choice([prepare.miscounted, prepare.edited])
        answers = {
            quality: {"role": "assistant", "content": " ".join(words)}
            for quality, words in (("chosen", solution), ("rejected", make(rng, solution)))
        }
        if answers["chosen"] != answers["rejected"]:
            rows.append({key: [*row["prompt"], answer] for key, answer in answers.items()})
    torch.manual_seed(seed)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32),
        args=RewardConfig(
            output_dir=str(output),
            seed=seed,
            per_device_train_batch_size=64,
            num_train_epochs=3,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            max_length=128,
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(data / "model"),
    )
    trainer.train()
    trainer.save_model(str(output))


# Runs


def measured(task: str, method: str, seed: int, root: Path) -> Path:
    """The file with a run's rows, once it is over."""
    return root / f"{slug(task)}_{seed}_{slug(method)}.json"


def run(task: str, method: str, seed: int, root: Path) -> list[dict]:
    """One run to its end, or to where its checks stop it, and its policies measured: rows of the CSV."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = root / f"{slug(task)}_{seed}"
    prepare_data(task, data, seed)
    first = root / f"{slug(task)}_{seed}_{slug(FIRST)}"
    result = measured(task, method, seed, root)
    if result.exists():
        return json.loads(result.read_text())
    output = result.with_suffix("")
    start = None if output == first else first / "round_00" / "model"
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe_of(task, method, data, output, seed, start), sort_keys=False))
    command = [sys.executable, "-m", "trl_ext.cli", "aries", "run", "--config", str(file)]
    ends_with_us = partial(die_with_parent, os.getpid())
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=ends_with_us)
    file.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode not in (0, 1):  # 1: its checks ended it, which is a result
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; see {file.with_suffix('.log')}")
    ended = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    rows, policy = [], start
    for number in range(ROUNDS + 1):
        path = output / f"round_{number:02d}"
        made = [model for model in (path / "model", path / "set_aside" / "model") if model.exists()]
        # A round that was skipped or rolled back has the policy of the one before
        kept = is_skipped(RoundDir(path)) or is_rolled_back(RoundDir(path))
        if made and not kept:
            policy = made[0]
        elif number > 0 and not kept:
            break
        guard, health, drops = (read_json(path / f"{name}.json") or {} for name in ("guard", "health", "drops"))
        cost = (read_json(path / "cost.json") or {}).get("generated_tokens", {})
        lost = turns_lost(read_json(path / "metrics.json"))
        rows.append(
            {"task": task, "method": method, "seed": seed, "round": number}
            | Answers(policy, data / "model", data / "eval.jsonl").measure()
            | {
                "pairs": drops.get("pairs", 0),
                "rows": (read_json(path / "training" / "rows.json") or {}).get("rows", 0),
            }
            | {"tokens": sum(cost.get(stage, 0) for stage in ("drafts", "refinements"))}
            | {"guard": guard.get("decision", ""), "guard_difference": guard.get("difference", "")}
            | {"health": health.get("decision", ""), "kl_per_token": health.get("kl_per_token", ""), "lost": lost}
        )
    rows[-1]["ended"] = ended
    result.write_text(json.dumps(rows))
    return rows


def run_job(job: tuple[str, str, int, Path]) -> list[dict]:
    return run(*job)


def turns_lost(metrics: dict | None) -> str:
    """What the run said as it closed the round: the answers that lose against those of the round before, or of round 0."""
    lost = lost_turns(metrics).values() if metrics else []
    return " ".join(f"y{turn}" for turn in sorted({turn for worse in lost for turn in worse}))


def slug(method: str) -> str:
    return method.lower().replace(", ", "_").replace(" ", "_").replace("-", "_")


def place(row: dict) -> tuple[int, int, int]:
    """Where a row stands in the CSV."""
    return [*TASKS].index(row["task"]), [*ALL_METHODS].index(row["method"]), row["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--root", type=Path, default=Path("runs/evidence"), help="where the runs are")
    parser.add_argument("--output", type=Path, default=HERE / "aries.csv")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    wanted = [
        (task, method, seed)
        for kinds in (METHODS | PARTIALLY_SCORED, DEGENERATE)  # what degenerates comes last
        for seed in range(args.seeds)
        for task in args.tasks
        for method in TASKS[task]
        if method in kinds and (args.methods is None or method in (FIRST, *args.methods))
    ]
    # Left by Ctrl-C or an error, the pool ends its processes, and begins no other run
    with get_context("spawn").Pool(args.jobs) as pool:
        # The first run of a seed makes the SFT model of the others
        for jobs in ([job for job in wanted if job[1] == FIRST], [job for job in wanted if job[1] != FIRST]):
            for found in pool.imap_unordered(run_job, [(*job, args.root) for job in jobs]):
                rows += found
                write(sorted(rows, key=place), args.output)
                print({key: rows[-1][key] for key in ("task", "method", "seed", "y1", "y2", "y4")}, flush=True)


if __name__ == "__main__":
    main()
