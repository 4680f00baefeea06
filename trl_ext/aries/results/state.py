"""
State: whether a run is going on, finished or stopped, and where, as its directory shows it from outside.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ...recipe import RecipeError
from ..config import AriesConfig
from ..data.records import write_json
from ..policies import base_round
from ..run_dir import RunDir, is_locked
from .best import best_round
from .progress import StageProgress


# The error of a run that a signal stopped
INTERRUPTED = "interrupted"
# Seconds between two writes of `progress.json`
RECORD_SECONDS = 2.0


def recorded(update: Callable[[int, int], None], run: RunDir, number: int, name: str) -> Callable[[int, int], None]:
    """Make an `update` of a stage also write `progress.json` now and then."""
    first = began = written = None

    def update_and_record(done: int, total: int) -> None:
        nonlocal first, began, written
        update(done, total)
        now = time.monotonic()
        if first is None:
            first, began = done, now
        if written is None or now - written >= RECORD_SECONDS:
            written = now
            write_json(run.progress, asdict(StageProgress(number, name, first, done, total, now - began)))

    return update_and_record


def read_progress(run: RunDir) -> StageProgress | None:
    """What a running stage has recorded; `None` if nothing."""
    try:
        return StageProgress(**json.loads(run.progress.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


@dataclass
class RunState:
    """
    State of a run.

    Args:
        kind (`str`):
            `"not started"`, `"running"`, `"finished"`, `"stopped"` by an error, or `"died"` without one.
        round (`int`, *optional*), stage (`str`, *optional*), since (`str`, *optional*):
            The last logged event, and its time.
        error (`str`, *optional*):
            Why it stopped.
        in_stage (`bool`):
            Whether that stage had started but not ended.
    """

    kind: str
    round: int | None = None
    stage: str | None = None
    since: str | None = None
    error: str | None = None
    in_stage: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped by Ctrl-C or another signal."""
        return self.error == INTERRUPTED

    def __str__(self) -> str:
        where = "before the first stage" if self.stage is None else f"round {self.round}, {self.stage}"
        if self.stage is not None and not self.in_stage and self.kind != "stopped":
            where = f"after {where}"
        since = "" if self.since is None else f" ({self.since})"
        return {
            "not started": "not started",
            "running": f"running: {where}{since}",
            "finished": "finished",
            "stopped": f"stopped: {where}{since}: {(self.error or '').partition(chr(10))[0]}",
            "died": f"not running: it ended without an error, {where}{since}. It was killed, or the machine went down",
        }[self.kind]


def read_state(run: RunDir, rounds: int, running: bool | None = None) -> RunState:
    """
    The state of a run that is to have `rounds` rounds. `running` says whether a process is working in it; by default its lock does.
    """
    events = [event for event in run.read_events() if event["event"] != "note"]
    last: dict[str, Any] = events[-1] if events else {}
    heard = {key: last.get(key) for key in ("round", "stage")} | {"since": last.get("time")}
    heard["in_stage"] = last.get("event") == "start"
    if is_locked(run.lock) if running is None else running:
        return RunState("running", **heard)
    if run.round(rounds).manifest.exists():
        return RunState("finished", **heard)
    if last.get("event") == "stopped":
        return RunState("stopped", **heard, error=last["error"])
    if not run.resolved.exists():
        return RunState("not started")
    return RunState("died", **heard)


def chosen_round(run: RunDir, config: AriesConfig, number: int | str | None, found: list[int], what: str) -> int:
    """
    The round that `--round` names, a number or `"best"`, of those `found`, which are `what`: `"evaluated"`, `"trained"`, ... By default it is the last
    one or, if that was rolled back, the one that it started from.

    Raises:
        [`RecipeError`]: it is not among them, there is none, or no scores say which one is best.
    """
    if not found:
        raise RecipeError(f"{run.path} has no {what} round yet. `trl-ext aries run {run.path}` continues it.")
    if number == "best":
        best = best_round(run, config, found)
        if best is None:
            raise RecipeError(
                f"`--round best`: {run.path} has no scores that compare rounds (a judge's compare the answers of a chain). Name a round: "
                f"{', '.join(map(str, found))}."
            )
        return best.number
    if number is not None and number not in found:
        raise RecipeError(
            f"`--round`: round {number} of {run.path} is not {what}; {', '.join(map(str, found))} can be named."
        )
    if number is None:
        kept = base_round(run, found[-1] + 1)
        return kept if kept in found else found[-1]
    return number
