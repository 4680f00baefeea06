"""
Estimate a recipe's time from a short run: a real start of the engine and real training steps, in a temporary directory.

Steps are timed one micro-batch at a time, after the first. The engine is timed with fewer requests at once than in a round, so the
estimate is too high.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import DPOConfig

from ..aries.children import ENVIRONMENT, ChildError, one_gpu
from ..aries.config import AriesConfig, PairsConfig
from ..aries.data.pairs import Pair, preference_rows, select_pairs
from ..aries.data.records import Chain, read_jsonl, write_jsonl
from ..aries.inputs import Inputs
from ..aries.results.progress import duration
from ..aries.rounds import Rounds
from ..aries.scoring.scores import load_chains
from ..launch import Launch
from ..processes import launcher_command, process_group
from ..recipe import Recipe
from .checks import Check, gigabytes
from .environment import ended, last_line


STEPS = 4
PROMPTS = 32
MODULES = {"tdpo": "trl_ext.scripts.tdpo", "self-refine-dpo": "trl_ext.scripts.self_refine_dpo"}


def probe_training(command: str, recipe: Recipe, overrides: Sequence[str], args: DPOConfig, rows: int) -> Check:
    """Run `STEPS` steps of one micro-batch each, of the recipe's model on its data."""
    with tempfile.TemporaryDirectory() as directory:
        changes = {
            "output_dir": directory,
            "max_steps": STEPS,
            "gradient_accumulation_steps": 1,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "disable_tqdm": True,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
            "report_to": "none",
            "push_to_hub": False,
        }
        flags = [token for key, value in changes.items() for token in (f"--{key}", str(value))]
        arguments = ["--config", str(recipe.path), *overrides, *flags]
        seconds, code, tail = timed_steps(launcher_command(MODULES[command], *arguments))
    if code != 0 or len(seconds) < 2:
        return Check(
            "failed",
            "time",
            f"the probe failed: {ended(code)}: {tail}",
            "Run it with `--max_steps 2` to see the error.",
        )
    each = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    return Check("ok", "time", training_time(each, args, rows))


def timed_steps(command: list[str]) -> tuple[list[float], int, str]:
    """Run a training, and return when each step was logged, the exit code, and the last line."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"text": True, "errors": "replace", "env": {**os.environ, **ENVIRONMENT, **one_gpu()}}
    seconds, lines = [], []
    with process_group(command, **options) as child:
        for line in child.stdout:
            lines.append(line)
            if "'loss'" in line:
                seconds.append(time.monotonic())
        code = child.wait()
    return seconds, code, last_line("".join(lines))


def training_time(each: float, args: DPOConfig, rows: int) -> str:
    """The time of a whole training on one device, from the seconds of a micro-batch."""
    size = args.per_device_train_batch_size
    if args.max_steps > 0:
        count = args.max_steps * args.gradient_accumulation_steps
        shown = f"{args.max_steps} steps × {args.gradient_accumulation_steps}"
    else:
        count = round(rows * args.num_train_epochs / size)
        shown = f"{rows:,} pairs × {args.num_train_epochs:g} epochs / {size}"
    return f"about {duration(count * each)} of training on one device: {shown} = {count:,} × {each:.2f} s (evaluations left out)"


class ProbedRounds(Rounds):
    """Rounds that print nothing and note when their stages report."""

    def __init__(self, config: AriesConfig, inputs: Inputs, launch: Launch | None):
        super().__init__(config, inputs, launch=launch)
        self.times: dict[str, list[tuple[float, int]]] = {}

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Any]:
        self.times[name] = [(time.monotonic(), 0)]
        yield lambda done, total: self.times[name].append((time.monotonic(), done))


def probe_aries(config: AriesConfig, inputs: Inputs, launch: Launch | None) -> Iterator[Check]:
    """Start the engine, generate some chains, score them, and train on their answers; then what a round will cost."""
    with tempfile.TemporaryDirectory() as directory:
        steps = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": "none"}
        short = {"output_dir": directory, "rounds": 1, "sft": None, "parity": replace(config.parity, samples=0)}
        short["training"] = {**config.training, **steps}
        inputs = replace(inputs, evaluation_prompts=inputs.prompts[:1])
        loop = ProbedRounds(replace(config, **short), inputs, launch)
        chosen = inputs.prompts[: min(PROMPTS, config.generation.max_num_seqs)]
        try:
            with loop.dir.opened(loop.config, "", {}):
                for number in (0, 1):
                    loop.dir.round(number).path.mkdir()
                write_jsonl(loop.dir.round(1).prompts, chosen)
                loop.generate(answering=0)
                chains = load_chains(chosen, loop.dir.round(1).answers)
                cost = RoundCost(config.prompts.per_round or len(inputs.prompts) // config.rounds)
                yield Check("ok", "time", engine_time(loop, chains, cost))
                loop.score(answering=0)
                yield ceiling(loop, config, chains, cost)
                yield Check("ok", "time", steps_time(loop, config, chains, directory, cost))
                yield Check("ok", "cost", cost.text(loop.peaks()))
        except ChildError as error:
            yield Check(
                "failed",
                "time",
                f"the probe failed: {last_line(str(error))}",
                "Run the recipe to see the whole error.",
            )


@dataclass
class RoundCost:
    """What a round of so many prompts will cost, by what the probe has measured."""

    size: int
    tokens: float = 0.0  # generated for a prompt
    pairs: float = 0.0  # from a prompt
    generation: float = 0.0  # seconds of the round
    training: float = 0.0

    def text(self, peaks: dict[str, int]) -> str:
        memory = [f"{gigabytes(peaks['peak_memory'])} of memory"] if peaks else []
        memory += [f"{gigabytes(peaks['peak_gpu_memory'])} on the GPU"] if "peak_gpu_memory" in peaks else []
        return (
            f"a round of {self.size:,} prompts: about {self.size * self.tokens:,.0f} generated tokens, {self.size * self.pairs:,.0f} pairs, at "
            f"most {duration(self.generation)} of generation and {duration(self.training)} of training"
            + (f"; the probe's largest process took {' and '.join(memory)}" if memory else "")
        )


def engine_time(loop: ProbedRounds, chains: list[Chain], cost: RoundCost) -> str:
    times = loop.times["drafts and refinements"]
    start, first, last = times[0][0], next(t for t, done in times if done == 1), times[-1][0]
    count = len(chains)
    each = (last - first) / count
    cost.generation = cost.size * each
    cost.tokens = sum(answer.tokens for chain in chains for answer in (*chain.answers, *chain.unanswered)) / count
    return (
        f"engine: {duration(first - start)} until the first chain, then {each:.2f} s per chain with {count} at once; a round of "
        f"{cost.size:,} at most {duration(cost.generation)}, less with more at once"
    )


def ceiling(loop: ProbedRounds, config: AriesConfig, chains: list[Chain], cost: RoundCost) -> Check:
    """How many pairs the probe's chains give, and how many of them have nothing to choose from."""
    scores = [row["scores"] for row in read_jsonl(loop.dir.round(1).scores)]
    pairs, dropped = select_pairs(chains, scores, config.pairs)
    cost.pairs = len(pairs) / len(chains)
    known = [[score for score in row if score is not None] for row in scores]
    most = max((score for row in known for score in row), default=None)
    alike = [row for row in known if len(row) > 1 and len(set(row)) == 1]
    text = f"{len(pairs)} pair{'s' * (len(pairs) != 1)} from {len(chains)} chains"
    text += f" (dropped: {', '.join(f'{count} {reason}' for reason, count in dropped.items())})" if dropped else ""
    if alike:
        at_most = sum(row[0] == most for row in alike)
        text += f"; in {len(alike)} all answers score alike, in {at_most} of these as high as any answer of the probe ({most:g})"
    state = "ok" if pairs else "warning"
    fix = None if pairs else "Use other prompts, a finer score or a higher `drafts.temperature`."
    return Check(state, "ceiling", text, fix)


def steps_time(loop: ProbedRounds, config: AriesConfig, chains: list[Chain], directory: str, cost: RoundCost) -> str:
    """Train on pairs of the probe's own answers, the last of each chain over the first."""
    round_dir = loop.dir.round(1)
    pairs = [Pair(chain, chain.answers[-1], chain.answers[0], None, None) for chain in chains if chain.answers]
    rows = [row for pair in pairs for row in preference_rows(pair, loop.template, PairsConfig())]
    if not rows:
        return "training: skipped, since no chain of the probe has an answer"
    write_jsonl(round_dir.pairs, rows)
    with loop.stage(1, "training") as update:
        loop.run_training(1, Path(directory, "training.log"), update)
    ends = {done: at for at, done in loop.times["training"] if done > 0}
    each = (ends[STEPS] - ends[1]) / (STEPS - 1)
    size = json.loads((round_dir.training / "rows.json").read_text(encoding="utf-8"))["batch_size"]
    # How many `refinement_rows: neighbors` makes depends on the chains
    drafts = 2 if config.pairs.drafts == "both" else 1
    per_pair = config.pairs.direct_weight + drafts * config.pairs.refinement_weight
    epochs = config.training.get("num_train_epochs", DPOConfig.num_train_epochs)
    cost.training = cost.size * cost.pairs * each / size * per_pair * epochs
    return (
        f"training: {each:.2f} s for {size} rows, so {each / size * per_pair:.3f} s for a pair of {per_pair} rows, times "
        "the round's pairs and `num_train_epochs`"
    )
