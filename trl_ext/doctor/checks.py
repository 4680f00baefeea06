"""A check, and the report that prints it: its state, what was looked at and what was found on one line, and a fix below."""

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
        fix (`str`, *optional*):
            What to do about it.
    """

    state: Literal["ok", "warning", "failed"]
    what: str
    found: str
    fix: str | None = None


class Report:
    """
    Prints checks as they come, without colours if stdout is not a terminal, and counts them.

    Args:
        console ([`~rich.console.Console`], *optional*):
            Where to print. Default: stdout.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.counts = dict.fromkeys(STYLES, 0)

    def add(self, check: Check) -> None:
        self.counts[check.state] += 1
        line = Text(f"{check.state:<8}", style=STYLES[check.state]).append(f" {check.what:<14} ", style="bold")
        self.console.print(line.append(escaped(check.found), style="not bold default"))
        if check.fix:
            self.console.print(Text(f"{'':<9}-> {escaped(check.fix)}"))

    def attempt(self, what: str, step: Callable[..., T], *args: Any) -> T | None:
        """Call a step and return its result; if it raises [`RecipeError`], add a failed check for each line and return `None`."""
        try:
            return step(*args)
        except RecipeError as error:
            for line in str(error).splitlines():
                self.add(Check("failed", what, line))
        return None

    def heading(self, text: str) -> None:
        self.console.print(Text(f"\n{escaped(text)}", style="bold"))

    def detail(self, text: str, indent: int = 9) -> None:
        """Print lines below a check."""
        for line in escaped(text).split("\n"):
            self.console.print(Text(" " * indent + line))

    def end(self) -> int:
        """Print the totals, and return the exit code: 0 if nothing failed."""
        counts = self.counts
        self.console.print(
            Text(
                f"\n{counts['ok']} ok, {counts['warning']} warning{'s' * (counts['warning'] != 1)}, {counts['failed']} failed",
                style="bold",
            )
        )
        return 1 if counts["failed"] else 0


def escaped(text: str) -> str:
    """The text with control characters as escapes: data may hold sequences that a terminal would act on."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def gigabytes(count: float) -> str:
    """`"1.50 GB"`, decimal as in the recipes' arithmetic; smaller ones in MB or KB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"
