"""
Status: how far a run is and its scores so far, whether a process is working in it or not.
"""

import sys
from pathlib import Path

from ..checks.overlap import prompts_kind
from ..config import AriesConfig
from ..data.records import read_json
from ..policies import base_round, is_rolled_back, is_skipped, policy_after, product
from ..run_dir import RunDir
from ..scoring.round_metrics import round_warnings
from .best import best_round
from .progress import STARTING, WARNING, RunProgress
from .state import read_progress, read_state


def status(config: AriesConfig) -> int:
    """Print which stages of a run are done, whether it is running, and the scores so far. Returns the exit code, 0."""
    run, progress = RunDir(Path(config.output_dir)), RunProgress(config.rounds)
    say = progress.say
    if not run.path.exists():
        say(f"{run.path} does not exist: the run has not been started.")
        return 0
    state = read_state(run, config.rounds)
    say(f"{run.path}: {state}")
    under_way = read_progress(run)
    if state.kind == "running" and under_way and (under_way.round, under_way.stage) == (state.round, state.stage):
        say(f"  {under_way}")
    elif state.kind == "running" and state.in_stage and state.stage in STARTING:
        say(f"  {STARTING[state.stage]}")
    for number in range(config.rounds + 1):
        round_dir = run.round(number)
        stages = {"sft": product(round_dir, config)} if config.sft else {}
        if number > 0:
            stages = {
                "prompts": round_dir.prompts,
                "answers": round_dir.answers,
                "scores": round_dir.scores,
                "pairs": round_dir.pairs,
                "training": product(round_dir, config),
            }
        stages["evaluation"] = round_dir.evaluation
        done = {name: "done" if path.exists() else answers_so_far(path) for name, path in stages.items()}
        if is_skipped(round_dir):
            done["training"] = "skipped by the guard"
        if round_dir.set_aside.exists() and not product(round_dir, config).exists():
            done["training"] = "set aside as degenerate"
        if is_rolled_back(round_dir):
            done["evaluation"] = "done, rolled back"
        words = [f"{name} {state}" for name, state in done.items()]
        say(f"  round {number}: " + ", ".join(words))
        drops = round_dir.drops if number > 0 else round_dir.sft_drops
        if drops.exists():
            dropped = read_json(drops)["dropped"]
            counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            say(f"           dropped: {counts or 'none'}")
    if state.kind in ("stopped", "died"):
        say(f"To continue: trl-ext aries run {run.path}")
    print_results(run, config, progress)
    for number in range(config.rounds + 1):
        metrics = read_json(run.round(number).metrics)
        for line in round_warnings(run, config, number, metrics) if metrics else ():
            say(f"Warning: round {number}: {line}.", WARNING)
    return 0


def answers_so_far(path: Path) -> str:
    """Progress of a stage that appends to its file."""
    part = path.with_name(path.name + ".part")
    return f"{len(part.read_bytes().splitlines())} answers so far" if part.exists() else "-"


def print_results(run: RunDir, config: AriesConfig, progress: RunProgress) -> None:
    """Print the scores so far, and which round is best if it is not the last one."""
    found = {number: read_json(run.round(number).metrics) for number in range(config.rounds + 1)}
    metrics = {number: of_round for number, of_round in found.items() if of_round is not None}
    if metrics:
        progress.results(metrics, config.refinements.turns, config.sft is not None, prompts_kind(run))
        best = best_round(run, config)
        if best is not None and best.number != best.last:
            progress.say(f"Best: {best}.")


def print_next(run: RunDir, config: AriesConfig, progress: RunProgress, elapsed: str) -> None:
    """Print what to do with a finished run."""
    kept = base_round(run, config.rounds + 1)  # an earlier one if the last was rolled back
    last, policy = run.round(kept), policy_after(run, config, kept)
    other = "tdpo" if config.training.get("trainer", "dpo") == "dpo" else "dpo"
    # The command as it was called: `make` runs the environment's, which need not be on the path
    program = sys.argv[0] if Path(sys.argv[0]).name == "trl-ext" else "trl-ext"
    progress.say(
        f"Finished in {elapsed}. "
        + (f"Rolled back to round {kept}. " if kept < config.rounds else "")
        + f"The trained policy is {policy.adapter or policy.model}. Next, for example:\n"
        + (f"  {run.report}  # how it went, for a browser\n" if run.report.exists() else "")
        + (f"  less {last.pairs}  # what it learned from\n" if last.pairs.exists() else "")
        + f"  less {last.evaluation}  # its answers, y1 to y{config.refinements.turns}\n"
        f"  {program} aries run {run.path} --output_dir {run.path}-{other} --training.trainer {other}"
    )
