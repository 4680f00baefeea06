"""
A time limit for a recipe's own regular expressions and templates, which may take longer than anyone waits.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ...recipe import RecipeError


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """
    End the block after so many seconds, by a signal. This works in the main thread only. Python handles signals between
    instructions and, in regular expressions, during the search.

    Raises:
        [`RecipeError`]: the time is up; the message is `message`.
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
