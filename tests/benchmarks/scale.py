"""
What a round of very many prompts takes besides a model: `python -m tests.benchmarks.scale --prompts 1000000`, and `make bench` at a
smaller size. Writes `docs/benchmarks/scale.csv` and `.md`.

The loop's own prompts, chain driver, scoring and pairing, each in a process of its own. Only the engine is a stand-in, which answers at
once: what is measured is everything but the model.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trl_ext.aries.children import Reporter
from trl_ext.aries.config import AriesConfig, sampling_by_turn
from trl_ext.aries.data.prompts import select_prompts
from trl_ext.aries.data.records import Chain, to_line, write_jsonl
from trl_ext.aries.generation.refinements import Request, Strategy
from trl_ext.aries.inputs import read_inputs
from trl_ext.aries.jobs import scoring_job
from trl_ext.aries.rounds import Rounds
from trl_ext.aries.scoring import scoring
from trl_ext.recipe import Recipe, parse_section


TURNS, EVALUATION_PROMPTS, WINDOW = 4, 100, 256
STAGES = ("prompts", "answers", "scores", "pairs")


class InstantEngine:
    """Answers every request in the next step, with one of a few short texts: an [`~aries.generation.chains.Engine`] without a model."""

    prompt_tokens = cached_tokens = 0
    window = WINDOW

    def __init__(self):
        generator = random.Random(0)
        self._texts = [" ".join(str(generator.randrange(10)) for _ in range(5)) for _ in range(997)]
        self._running: list[tuple[Chain, Request]] = []
        self._answered = 0

    def start(self, task: Any) -> None:
        self._strategy = task.strategy

    def submit(self, chain: Chain) -> bool:
        request = self._strategy.next_request(chain)
        if request is None:
            return False
        self._running.append((chain, request))
        return True

    def step(self) -> list[Chain]:
        running, self._running = self._running, []
        for chain, request in running:
            self._answered += 1
            self._strategy.add(chain, request, self._texts[self._answered % len(self._texts)], 5, "stop")
        return [chain for chain, _ in running]


def write_prompts(file: Path, count: int, seed: int) -> None:
    """Conversations of one message: five digits to sort, with the solution."""
    generator = random.Random(seed)
    with open(file, "w", encoding="utf-8") as lines:
        for _ in range(count):
            digits = [str(generator.randrange(10)) for _ in range(5)]
            prompt = [{"role": "user", "content": f"Sort : {' '.join(digits)}"}]
            lines.write(to_line({"prompt": prompt, "solution": " ".join(sorted(digits))}))


def loop_of(directory: Path, count: int) -> Rounds:
    mapping = {
        "output_dir": str(directory / "run"),
        "rounds": 1,
        "model": {"model_name_or_path": "none"},
        "prompts": {"dataset": str(directory / "train.jsonl"), "per_round": count},
        "refinements": {"turns": TURNS, "template": "{{ question }} Draft : {{ draft }} . Write a better answer ."},
        "scores": {"verifier": "recipes/quickstart/verifier.py:partial_match"},
        "training": {},
        "evaluation": {"dataset": str(directory / "eval.jsonl")},
    }
    config = parse_section(Recipe(None, mapping, {}), AriesConfig)
    return Rounds(config, read_inputs(config))


def run_stage(stage: str, directory: Path, count: int) -> dict:
    """One stage in this process; what it took, and the most that was ever resident, imports and the prompts' index included."""
    if stage == "answers":  # transformers with it, which the loop's own process never imports
        from trl_ext.aries.generation import chains
    if stage == "prompts":
        start, cpu = time.perf_counter(), time.process_time()
    loop = loop_of(directory, count)
    if stage != "prompts":
        start, cpu = time.perf_counter(), time.process_time()
    if stage == "prompts":
        write_rounds_prompts(loop)
    elif stage == "answers":
        answer(loop, chains)
    elif stage == "scores":
        score(loop)
    else:
        loop.pair(1)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "CPU seconds": round(time.process_time() - cpu, 1),
        "peak MiB": peak_mebibytes(),
    }


def write_rounds_prompts(loop: Rounds) -> None:
    loop.dir.round(1).path.mkdir(parents=True)
    loop.dir.round(0).path.mkdir()
    inputs = loop.inputs
    write_jsonl(loop.dir.round(1).prompts, select_prompts(inputs.prompts, 1, inputs.round_size, loop.config.seed))
    write_jsonl(loop.dir.evaluation_prompts, inputs.evaluation_prompts)


def answer(loop: Rounds, chains: Any) -> None:
    tasks = [
        (loop.dir.evaluation_prompts, loop.dir.round(0).evaluation),
        (loop.dir.round(1).prompts, loop.dir.round(1).answers),
    ]
    strategy = Strategy(loop.config.refinements)
    for prompts, answers in tasks:
        task = chains.Task(prompts, answers, strategy, sampling_by_turn(loop.config), (0, 1))
        chains.answer_task(InstantEngine(), task, lambda done: None)


def score(loop: Rounds) -> None:
    """What the process that scores does, in this one."""
    log = loop.dir.round(1).logs / "scores.log"
    log.parent.mkdir(exist_ok=True)
    scoring.main(
        scoring_job(loop.dir, loop.config, 1) | {"log": str(log), "call": str(log.with_suffix(".call"))},
        Reporter(io.StringIO()),
    )


def peak_mebibytes() -> int:
    """Of this process alone: `ru_maxrss` begins with what the parent had when it started it."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def measure(directory: Path, count: int) -> list[dict]:
    """A row per stage, and one of driver, scoring and pairing together."""
    write_prompts(directory / "train.jsonl", count, seed=0)
    write_prompts(directory / "eval.jsonl", EVALUATION_PROMPTS, seed=1)
    rows = []
    for stage in STAGES:
        command = [sys.executable, "-m", "tests.benchmarks.scale", "--stage", stage, "--directory", str(directory)]
        done = subprocess.run([*command, "--prompts", str(count)], check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"prompts": count, "stage": stage} | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    together = [row for row in rows if row["stage"] != "prompts"]
    rows.append(
        {"prompts": count, "stage": "answers, scores and pairs"}
        | {key: round(sum(row[key] for row in together), 1) for key in ("seconds", "CPU seconds")}
        | {"peak MiB": max(row["peak MiB"] for row in together)}
    )
    answers = count * TURNS
    return [row | {"answers per CPU second": round(answers / max(row["CPU seconds"], 0.1))} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "benchmarks")
    parser.add_argument("--repeats", help="taken, as `make bench` passes it to all, and ignored")
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.directory, args.prompts)))
        return
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), args.prompts)

    from .steps import environment, write  # torch with it, which no stage needs

    text = (
        f"`python -m tests.benchmarks.scale --prompts {args.prompts}` measures this, `make bench` with 100,000 prompts: the loop's own "
        "prompts (a file of JSON lines is checked, shuffled and written), chain driver, scoring by the quickstart's verifier, and pairing, "
        f"each in a process of its own. Only the engine is a stand-in, which answers at once: {TURNS} answers to each prompt, five digits "
        "long. CPU seconds are those of the process, so that others on the machine count less; `peak MiB` is the most that was resident, "
        "imports included (transformers and torch under `answers`, which is the engine's process without vLLM). The aim is at most 1,024 MiB in every stage "
        "at a million prompts, and 20,000 answers a second through the last three stages together.\n\n"
        + environment("cpu", "no model")
    )
    write(rows, args.output / "scale", "A round of very many prompts", text)


if __name__ == "__main__":
    main()
