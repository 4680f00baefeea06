"""
Watches over user code: a verifier may hang, or end the process that calls it, and the user is told which call did.

In: calls, in the process that scores. Out: an error in the process of the loop.
"""

import faulthandler
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...recipe import RecipeError
from ..children import ChildError
from ..run_dir import RunDir


class Watch:
    """
    Watches calls that may not return.

    Args:
        path (`Path`):
            A file that exists while a call goes on. It says what is called and with what, and, if a time limit ended the process, where
            each thread was. [`what_ended`] reads it.
    """

    def __init__(self, path: Path):
        self._path = path

    @contextmanager
    def call(self, what: str, seconds: float | None) -> Iterator[None]:
        """End the process if what is inside takes longer than this."""
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(what + "\n")
            file.flush()
            if seconds is not None:  # in a thread of C: an expression that backtracks keeps Python's own from running
                faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._path.unlink(missing_ok=True)


def what_ended(path: Path) -> tuple[str, str | None] | None:
    """The call that was going on when a process ended, and where it was if it took too long; `None` if there was none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    what, timeout, frames = text.partition("\nTimeout (")
    if not text:
        return None
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', frames)
    here = [f"{file}:{line}, in `{name}`" for file, line, name in frames if f"({file})" in what]
    return what.strip(), (here or ["code that is not in its file"])[0] if timeout else None


@contextmanager
def ends_explained(run: RunDir, log: Path, made: list[Path]) -> Iterator[None]:
    """
    Around the process that scores: if a verifier ended it, say which call that was.

    Args:
        run ([`~aries.run_dir.RunDir`]):
            The run.
        log (`Path`):
            What the process prints.
        made (`list[Path]`):
            Files that are there when it has done its work.

    Raises:
        [`RecipeError`]: a verifier ended the process, or took longer than its `timeout`.
        [`~aries.children.ChildError`]: a server failed, or the process was killed.
    """
    run.logs.mkdir(exist_ok=True)
    run.verifier_call.unlink(missing_ok=True)
    failure = None
    try:
        yield
    except ChildError as error:
        failure = error
    ended = what_ended(run.verifier_call)
    run.verifier_call.unlink(missing_ok=True)
    if ended is not None:
        what, where = ended
        if where is not None:
            raise RecipeError(
                f"{what}: it took longer than its `timeout`, and was in {where}. Fix it there, or raise `scores.timeout`, in seconds for "
                "one call with the answers of up to 100 chains. What was scored before is kept."
            )
        if failure is None:
            raise RecipeError(
                f"{what}: it ended its process, with exit code 0. Let it return, or raise an error. Its output is in {log}."
            )
        raise ChildError(f"{what}: {failure}") from failure
    if failure is not None:
        raise failure
    if not all(path.exists() for path in made):
        raise ChildError(
            f"the process that scores ended before its work was done, with exit code 0. Its output is in {log}."
        )
