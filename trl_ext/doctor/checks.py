"""What a check says: one line with its state, what was looked at and what was found, and the way out below it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.text import Text

from ..recipe import RecipeError


T = TypeVar("T")

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass
class Check:
    """
    Args:
        state (`str`):
            `"ok"`, `"warning"` or `"failed"`.
        what, found (`str`):
            What was looked at, and what there is.
        way_out (`str`, *optional*):
            What to do about it.
    """

    state: Literal["ok", "warning", "failed"]
    what: str
    found: str
    way_out: str | None = None


class Report:
    """
    Prints checks as they come, in plain lines where stdout is no terminal, and counts them.

    Args:
        console ([`~rich.console.Console`], *optional*):
            Where to. Default: stdout.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.counts = dict.fromkeys(STYLES, 0)

    def add(self, check: Check) -> None:
        self.counts[check.state] += 1
        line = Text(f"{check.state:<8}", style=STYLES[check.state]).append(f" {check.what:<14} ", style="bold")
        self.console.print(line.append(printable(check.found), style="not bold default"))
        if check.way_out:
            self.console.print(Text(f"{'':<9}-> {printable(check.way_out)}"))

    def attempt(self, what: str, step: Callable[..., T], *args: Any) -> T | None:
        """What a step returns; where it finds bad input, a failed check for each line of the message, and `None`."""
        try:
            return step(*args)
        except RecipeError as error:
            for line in str(error).splitlines():
                self.add(Check("failed", what, line))
        return None

    def heading(self, text: str) -> None:
        self.console.print(Text(f"\n{printable(text)}", style="bold"))

    def detail(self, text: str, indent: int = 9) -> None:
        """Lines below a check."""
        for line in printable(text).split("\n"):
            self.console.print(Text(" " * indent + line))

    def end(self) -> int:
        """The last line; the exit code is 0 where nothing failed."""
        counts = self.counts
        self.console.print(
            Text(f"\n{counts['ok']} ok, {counts['warning']} to look at, {counts['failed']} failed", style="bold")
        )
        return 1 if counts["failed"] else 0


def printable(text: str) -> str:
    """The text without what a terminal would act on: data may hold escape sequences."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def gigabytes(count: float) -> str:
    """`"1.50 GB"`, decimal as in the recipes' arithmetic; smaller ones in MB or KB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"
