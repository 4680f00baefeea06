"""
Status: how far a run is, read off its directory, whether a process is running in it or not.
"""

import json
from pathlib import Path

from .config import AriesConfig
from .rounds import Rounds
from .state import read_progress, read_state


def status(config: AriesConfig) -> int:
    """
    Print which stages of a run are done, whether it is running, and the scores so far.

    Returns:
        `int`: exit code, 0.
    """
    loop = Rounds(config)
    say = loop.progress.say
    if not loop.dir.path.exists():
        say(f"{loop.dir.path} does not exist: the run has not been started.")
        return 0
    state = read_state(loop.dir, config.rounds)
    say(f"{loop.dir.path}: {state}")
    under_way = read_progress(loop.dir)
    if state.kind == "running" and under_way and (under_way.round, under_way.stage) == (state.round, state.stage):
        say(f"  {under_way}")
    for number in range(config.rounds + 1):
        round_dir = loop.dir.round(number)
        stages = {"sft": loop.product(0)} if config.sft else {}
        if number > 0:
            stages = {
                "prompts": round_dir.prompts,
                "answers": round_dir.answers,
                "scores": round_dir.scores,
                "pairs": round_dir.pairs,
                "training": loop.product(number),
            }
        stages["evaluation"] = round_dir.evaluation
        done = {name: "done" if path.exists() else progress(path) for name, path in stages.items()}
        if loop.is_skipped(number):
            done["training"] = "left out by the guard"
        if round_dir.set_aside.exists() and not loop.product(number).exists():
            done["training"] = "set aside as degenerate"
        words = [f"{name} {state}" for name, state in done.items()]
        say(f"  round {number}: " + ", ".join(words))
        drops = round_dir.drops if number > 0 else round_dir.sft_drops
        if drops.exists():
            dropped = json.loads(drops.read_text(encoding="utf-8"))["dropped"]
            counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            say(f"           dropped: {counts or 'none'}")
    if state.kind in ("stopped", "died"):
        # As it was recorded: with what the command line had added
        say(f"To continue: trl-ext aries run --config {loop.dir.recipe}")
    loop.print_results()
    return 0


def progress(path: Path) -> str:
    """How far a stage that appends to its file has come."""
    part = path.with_name(path.name + ".part")
    return f"{len(part.read_bytes().splitlines())} answers so far" if part.exists() else "-"
