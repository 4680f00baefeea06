"""
What a run prints: one live bar with an ETA per stage on a terminal, one line per stage in a log, and the closing table.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.table import Table


class RunProgress:
    """
    Args:
        rounds (`int`):
            Rounds of the run.
        console ([`rich.console.Console`], *optional*):
            Where to print; standard output by default.
    """

    def __init__(self, rounds: int, console: Console | None = None):
        self.rounds = rounds
        self.console = console or Console(highlight=False)
        self._round_seconds: list[float] = []

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: no markup read from paths or generated text, no wrapping."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[Callable[[int, int], None]]:
        """
        Show a stage of round `number` while it runs.

        Yields:
            `Callable[[int, int], None]`: to be called with (done, total).
        """
        label = f"round {number}/{self.rounds}  {name}"
        start = time.monotonic()
        last = {"done": 0, "total": None}
        if self.console.is_terminal:
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
            yield lambda done, total: last.update(done=done, total=total)
        count = "" if last["total"] is None else f"{last['done']:>7,}"
        self.say(f"{label:<38}{count:>8}  {time.monotonic() - start:6.1f} s")

    def end_round(self, number: int, seconds: float) -> None:
        """Say how long the round took and how long the rest should take."""
        self._round_seconds.append(seconds)
        left = (self.rounds - number) * sum(self._round_seconds) / len(self._round_seconds)
        rest = f", about {duration(left)} to go" if number < self.rounds else ""
        self.say(f"round {number}/{self.rounds} done in {duration(seconds)}{rest}\n", style="bold")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def score_table(metrics: dict[int, dict[str, Any]], turns: int, has_sft: bool) -> Table:
    """
    Rounds down, answers y1..y_turns across: mean score ± standard error on the evaluation prompts.

    Args:
        metrics (`dict[int, dict]`):
            Of each evaluated round, from [`~aries.evaluation.evaluation_metrics`].
        turns (`int`):
            Answers per chain.
        has_sft (`bool`):
            Whether round 0 is the policy after SFT or the model as it came.
    """
    prompts = max((m["prompts"] for m in metrics.values()), default=0)
    table = Table(title=f"Mean score of each answer on {prompts} held-out prompts", title_justify="left")
    table.add_column("policy")
    for turn in range(1, turns + 1):
        table.add_column(f"y{turn}" + (" (direct)" if turn == 1 else ""), justify="right")
    for number, round_metrics in sorted(metrics.items()):
        name = ("after SFT" if has_sft else "initial model") if number == 0 else f"round {number}"
        table.add_row(name, *(score_cell(turn, round_metrics["prompts"]) for turn in round_metrics["turns"]))
    return table


def score_cell(turn: dict[str, Any], prompts: int) -> str:
    """Mean ± standard error, and of how many answers where not every prompt has a scored one."""
    if turn["score"] is None:
        return "-"
    error = "" if turn["standard_error"] is None else f" ± {turn['standard_error']:.3f}"
    count = "" if turn["scored"] == prompts else f" (n={turn['scored']})"
    return f"{turn['score']:.3f}{error}{count}"
