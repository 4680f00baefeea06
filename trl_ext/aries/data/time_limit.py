"""
A bound on code that a recipe brings: a regular expression or a template may take longer than anyone waits.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ...recipe import RecipeError


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """
    End what runs inside after so many seconds, by a signal: it needs the main thread, and takes effect where Python looks for
    signals, which its regular expressions do while they search.

    Raises:
        [`RecipeError`]: with this message, when the time is up.
    """

    def expired(signum, frame):
        raise RecipeError(message)

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
