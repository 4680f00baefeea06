"""
What a run prints. On a terminal, a live bar with an ETA for each stage; in a log, a line when a stage ends and one a minute until
then; with `--log_format json`, one JSON object per line. Also the tables at the end.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.table import Table

from ...terminal import printable


# Columns of a table in a log, which has no width
TABLE_WIDTH = 100
# Style of the lines that `--quiet` prints too
WARNING = "yellow"
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
        self._began: float | None = None
        self._next = clock() + LOG_SECONDS

    def update(self, done: int, total: int) -> None:
        with self._lock:
            if self._began is None or total != self._at.total:  # another scorer, which counts its own
                self._began, self._at.first = self._clock(), done
            self._at.done, self._at.total = done, total

    def due(self) -> StageProgress | None:
        """How far the stage is if a line is due, else `None`. A total of 0 means that there was no report yet."""
        with self._lock:
            now = self._clock()
            if now < self._next:
                return None
            self._next = now + LOG_SECONDS
            self._at.seconds = 0.0 if self._began is None else now - self._began
            return replace(self._at)

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

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Callable[[int, int], None]]:
        """
        Show a stage of round `number` while it runs.

        Yields:
            `Callable[[int, int], None]`: to be called with (done, total).
        """
        label = f"round {number}/{self.rounds}  {name}"
        start = self.clock()
        last = {"done": 0, "total": None}
        if self.console.is_terminal and not self.quiet:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                Eta(),
            )
            with Progress(*columns, console=self.console, transient=True) as bars:
                task = bars.add_task(f"{label:<38}", total=None)

                def update(done: int, total: int) -> None:
                    last.update(done=done, total=total)
                    bars.update(task, completed=done, total=total)

                yield update
        else:
            pulse = Pulse(number, name, self.clock)

            def note(done: int, total: int) -> None:
                last.update(done=done, total=total)
                pulse.update(done, total)

            with pulse.beating(lambda at: self.say(f"{label:<38}{progress_line(at, self.clock() - start)}")):
                yield note
        count = "" if last["total"] is None else f"{last['done']:>7,}"
        self.say(f"{label:<38}{count:>8}  {self.clock() - start:6.1f} s")

    def show(self, table: Table) -> None:
        """Print a table; a log gets enough columns for it."""
        if self.quiet:
            return
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, TABLE_WIDTH)
        self.console.print(table)

    def results(self, metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> None:
        """
        Print the table of scores by round and turn, and what else is known of the last round's answers. Arguments as in [`score_table`].
        """
        self.show(score_table(metrics, turns, has_sft, kind))
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
        start = self.clock()
        last: dict[str, int] = {}
        pulse = Pulse(number, name, self.clock)
        self.log("start", round=number, stage=name)

        def update(done: int, total: int) -> None:
            last.update(done=done, total=total)
            pulse.update(done, total)

        def say(at: StageProgress) -> None:
            done, total = (at.done, at.total) if at.total else (None, None)
            self.log(
                "progress",
                round=number,
                stage=name,
                done=done,
                total=total,
                rate=rounded(at.rate),
                eta=rounded(at.eta),
            )

        with pulse.beating(say):
            yield update
        self.log("end", round=number, stage=name, seconds=round(self.clock() - start, 3), **last)

    def results(self, metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> None:
        for number, of_round in metrics.items():
            self.log("metrics", round=number, **of_round)

    def stopped(self, number: int, stage: str, error: str) -> None:
        self.log("stopped", "error", round=number, stage=stage, error=error)

    def end_round(self, number: int, seconds: float) -> None:
        self.log("round", round=number, seconds=round(seconds, 3))


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
        return f"nothing yet, after {duration(seconds)}"
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


def score_table(metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool, kind: str) -> Table:
    """
    Mean scores on the evaluation prompts with 95 % intervals: rounds down, answers y1, y2, ... across. Four turns fit on 100 columns.

    Args:
        metrics (`dict[int, dict]`):
            Metrics of each evaluated round, from [`~aries.scoring.evaluation.evaluation_metrics`].
        turns (`int`):
            Answers per chain.
        has_sft (`bool`):
            Whether round 0 is the policy after SFT or the model as it came.
        kind (`str`):
            What to call the prompts, from [`~aries.checks.overlap.prompts_kind`].
    """
    prompts = max((m["prompts"] for m in metrics.values()), default=0)
    interval = (
        ", with 95 % interval" if any("interval" in turn for m in metrics.values() for turn in m["turns"]) else ""
    )
    table = Table(title=f"Mean score of each answer on {prompts} {kind} prompts{interval}", title_justify="left")
    table.add_column("policy")
    for turn in range(1, turns + 1):
        table.add_column(f"y{turn}" + (" (direct)" if turn == 1 else ""), justify="right")
    for number, round_metrics in sorted(metrics.items()):
        cells = (score_cell(turn, round_metrics["prompts"]) for turn in round_metrics["turns"])
        table.add_row(policy_name(number, has_sft), *cells)
    return table


def score_cell(turn: dict[str, Any], prompts: int) -> str:
    """
    The mean, its number of answers if some prompts have none, and on a second line the interval; ± standard error for version 0.1.0.
    """
    if turn["score"] is None:
        return "-"
    count = "" if turn["scored"] == prompts else f" (n={turn['scored']})"
    if "interval" not in turn:
        error = "" if turn["standard_error"] is None else f" ± {turn['standard_error']:.3f}"
        return f"{turn['score']:.3f}{error}{count}"
    return f"{turn['score']:.3f}{count}{interval_line(turn['interval'])}"


def answers_table(metrics: dict[int, dict[str, Any]], has_sft: bool) -> Table:
    """
    What a mean score does not say about the last evaluated round, answers down: win rate over round 0, changes by refining, lengths
    compared with round 0's. Arguments as in [`score_table`].
    """
    last = max(metrics)
    table = Table(title=f"Answer by answer: {policy_name(last, has_sft)}", title_justify="left")
    table.add_column("answer")
    for name in ("win rate\nover round 0", "refining\nbetter, worse", "wrong→right,\nright→wrong", "left\nas it was"):
        table.add_column(name, justify="right")
    table.add_column("tokens" if last == 0 else "tokens\n(round 0)", justify="right")
    table.add_column("cut off", justify="right")
    initial = metrics[0]["turns"] if last > 0 and 0 in metrics else [{"tokens": None}] * len(metrics[last]["turns"])
    for turn, first in zip(metrics[last]["turns"], initial, strict=True):
        wins, changed, flipped = turn["win_rate_round_0"], turn["changes"], turn["flips"]
        table.add_row(
            f"y{turn['turn']}",
            "-" if wins is None else f"{wins['win_rate']:.3f}{interval_line(wins['interval'])}",
            "-" if changed is None else f"{changed['improved']}, {changed['worsened']}",
            "-" if flipped is None else f"{flipped['wrong_to_right']}, {flipped['right_to_wrong']}",
            "-" if turn["identical"] is None else f"{turn['identical']:.0%}",
            ("-" if turn["tokens"] is None else f"{turn['tokens']:.0f}")
            + ("" if first["tokens"] is None else f" ({first['tokens']:.0f})"),
            "-" if turn["truncated_share"] is None else f"{turn['truncated_share']:.0%}",
        )
    return table


def policy_name(number: int, has_sft: bool) -> str:
    return ("after SFT" if has_sft else "initial model") if number == 0 else f"round {number}"


def interval_line(interval: list[float] | None) -> str:
    """The interval on a line of its own, with three decimals, or two from 10 so that a reward model's scores fit."""
    if interval is None:
        return ""
    low, high = (f"{bound:.{3 if abs(bound) < 10 else 2}f}" for bound in interval)
    return f"\n[{low}, {high}]"
