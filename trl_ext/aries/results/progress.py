"""
What a run prints. On a terminal, a live bar with an ETA for each stage; in a log, a line when a stage ends and one a minute until
then; with `--log_format json`, one JSON object per line.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ...terminal import printable
from .tables import answers_table, score_table, selecting_table


# Columns of a table in a log, which has no width
TABLE_WIDTH = 100
# Style of the lines that `--quiet` prints too
WARNING = "yellow"
# What a stage does until its first report, if that may take minutes
STARTING = {"drafts and refinements": "the engine is starting"}
# Seconds between two lines of a log about the same stage
LOG_SECONDS = 60.0
# Seconds between two checks whether a line is due
BEAT_SECONDS = 1.0


@dataclass
class StageProgress:
    """
    How far a stage is, as `progress.json` has it while it runs.

    Args:
        round (`int`), stage (`str`):
            Which stage.
        first (`int`), done (`int`), total (`int`):
            Number of its answers, steps, ...: at its start, now, and in the end.
        seconds (`float`):
            Time since its first report.
    """

    round: int
    stage: str
    first: int
    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """How many are done in a second since the first report; `None` before the first one."""
        return (self.done - self.first) / self.seconds if self.done > self.first and self.seconds > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds that the rest should take."""
        return None if self.rate is None else (self.total - self.done) / self.rate

    def __str__(self) -> str:
        text = f"{self.done:,} of {self.total:,}"
        return text if self.eta is None else f"{text}, about {duration(self.eta)} to go"


class Pulse:
    """
    The lines of a log about a running stage: one every [`LOG_SECONDS`], even if nothing happens. `clock` gives seconds from any origin.
    """

    def __init__(self, round: int, stage: str, clock: Callable[[], float]):
        self._clock, self._lock = clock, threading.Lock()
        self._at = StageProgress(round, stage, 0, 0, 0, 0.0)
        self._start = self._first_report = clock()
        self._next = self._start + LOG_SECONDS

    @property
    def seconds(self) -> float:
        """How long the stage has been running."""
        return self._clock() - self._start

    def update(self, done: int, total: int) -> None:
        with self._lock:
            if total != self._at.total:  # the first report, or another scorer, which counts its own
                self._first_report, self._at.first = self._clock(), done
            self._at.done, self._at.total = done, total

    def at(self) -> StageProgress:
        """How far the stage is. A total of 0 means that there was no report yet."""
        with self._lock:
            return replace(self._at, seconds=self._clock() - self._first_report)

    def due(self) -> StageProgress | None:
        """How far the stage is if a line is due, else `None`."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + LOG_SECONDS
        return self.at()

    @contextmanager
    def beating(self, say: Callable[[StageProgress], None]) -> Iterator[None]:
        """Call `say` from a thread whenever a line is due."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                due = self.due()
                if due is not None:
                    say(due)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class RunProgress:
    """
    Prints text.

    Args:
        rounds (`int`):
            Rounds of the run.
        console ([`rich.console.Console`], *optional*):
            Where to print; standard output by default.
        quiet (`bool`, *optional*, defaults to `False`):
            Print warnings only.
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            Gives seconds from any origin.
    """

    def __init__(
        self,
        rounds: int,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rounds = rounds
        self.clock = clock
        self.quiet = quiet
        self.console = console or Console(highlight=False)
        self._round_seconds: list[float] = []

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: no markup, no control sequences, no wrapping. Yellow lines are warnings."""
        if self.quiet and style != WARNING:
            return
        self.console.print(printable(text), style=style, markup=False, soft_wrap=True)

    def label(self, number: int, name: str) -> str:
        """What a stage of a round is called."""
        return f"round {number}/{self.rounds}  {name}"

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Callable[[int, int], None]]:
        """
        Show a stage of round `number` while it runs.

        Yields:
            `Callable[[int, int], None]`: to be called with (done, total).
        """
        label, pulse = f"{self.label(number, name):<38}", Pulse(number, name, self.clock)
        if self.console.is_terminal and not self.quiet:
            with Progress(*columns(), console=self.console, transient=True) as bars:
                task = bars.add_task(label + STARTING.get(name, ""), total=None)

                def update(done: int, total: int) -> None:
                    pulse.update(done, total)
                    bars.update(task, description=label, completed=done, total=total)

                yield update
        else:
            with pulse.beating(lambda at: self.say(f"{label}{progress_line(at, pulse.seconds)}")):
                yield pulse.update
        at = pulse.at()
        self.say(f"{label}{f'{at.done:,}' if at.total else '':>8}  {pulse.seconds:6.1f} s")

    def show(self, table: Table) -> None:
        """Print a table; a log gets enough columns for it."""
        if self.quiet:
            return
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, TABLE_WIDTH)
        self.console.print(table)

    def results(self, metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> None:
        """
        Print the table of scores by round and turn, and what else is known of the last round's answers. Arguments as in
        [`~aries.results.tables.score_table`].
        """
        self.show(score_table(metrics, turns, has_sft, kind))
        selecting = selecting_table(metrics, turns, has_sft, kind)
        if selecting is not None:
            self.show(selecting)
        if "correct_score" in metrics[max(metrics)]:  # not in the metrics of earlier versions
            self.show(answers_table(metrics, has_sft))

    def stopped(self, number: int, stage: str, error: str) -> None:
        """An error ended the run. The command line prints it, so nothing is printed here."""

    def end_round(self, number: int, seconds: float) -> None:
        """Print how long the round took and how long the rest should take."""
        self._round_seconds.append(seconds)
        left = (self.rounds - number) * sum(self._round_seconds) / len(self._round_seconds)
        rest = f", about {duration(left)} to go" if number < self.rounds else ""
        self.say(f"round {number}/{self.rounds} done in {duration(seconds)}{rest}\n", style="bold")


class JsonProgress(RunProgress):
    """
    Prints the same as JSON lines: `time`, `level` (`info`, `warning`, `error`), `event` and its fields. Events: `start`, `progress` (every
    [`LOG_SECONDS`]: `done`, `total`, `rate` per second, `eta` in seconds; `null` before they are known) and `end` of a stage, `message`,
    `round`, `metrics`, `stopped`.
    """

    def log(self, event: str, level: str = "info", **fields: Any) -> None:
        if not self.quiet or level != "info":
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            line = json.dumps({"time": now, "level": level, "event": event, **fields})
            self.console.out(line, highlight=False)

    def say(self, text: str, style: str | None = None) -> None:
        self.log("message", "warning" if style == WARNING else "info", text=text.strip())

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Callable[[int, int], None]]:
        pulse = Pulse(number, name, self.clock)
        self.log("start", round=number, stage=name)

        def say(at: StageProgress) -> None:
            counts = {"done": at.done, "total": at.total} if at.total else {"done": None, "total": None}
            self.log("progress", round=number, stage=name, **counts, rate=rounded(at.rate), eta=rounded(at.eta))

        with pulse.beating(say):
            yield pulse.update
        at = pulse.at()
        counts = {"done": at.done, "total": at.total} if at.total else {}
        self.log("end", round=number, stage=name, seconds=round(pulse.seconds, 3), **counts)

    def results(self, metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> None:
        for number, of_round in metrics.items():
            self.log("metrics", round=number, **of_round)

    def stopped(self, number: int, stage: str, error: str) -> None:
        self.log("stopped", "error", round=number, stage=stage, error=error)

    def end_round(self, number: int, seconds: float) -> None:
        self.log("round", round=number, seconds=round(seconds, 3))


def columns() -> tuple[ProgressColumn, ...]:
    """The live bar of a stage."""
    count, elapsed, left = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return SpinnerColumn(), TextColumn("{task.description}"), BarColumn(None), count, elapsed, TextColumn("eta"), left


def progress_line(at: StageProgress, seconds: float) -> str:
    """
    How far a stage is, for a log.

    Example:

    ```python
    >>> progress_line(StageProgress(1, "drafts", first=0, done=90, total=270, seconds=60.0), seconds=65.0)
    '90 of 270, 1.5 a second, about 2 min 00 s to go'
    ```
    """
    if not at.total:
        return f"{STARTING.get(at.stage, 'nothing yet')}, after {duration(seconds)}"
    if at.rate is None:
        return f"{at}, after {duration(seconds)}"
    amount, unit = next(
        ((at.rate * size, unit) for size, unit in ((1, "second"), (60, "minute")) if at.rate * size >= 1),
        (at.rate * 3600, "hour"),
    )
    return f"{at.done:,} of {at.total:,}, {amount:,.3g} {'an' if unit == 'hour' else 'a'} {unit}, about {duration(at.eta)} to go"


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
