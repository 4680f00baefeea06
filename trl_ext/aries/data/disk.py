"""
A disk that is full or read-only: an error that names the place and what to do.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...recipe import RecipeError
from ..children import ChildError


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
# How libraries that do not write through Python report it: safetensors, torch, Arrow
FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large", "file write failed")


class DiskError(ChildError):
    """The disk is full or read-only. Incomplete files have no final name, so the same command continues."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Turn an error of the disk into one that names what was being written.

    Args:
        path (`Path`):
            The file or directory, for errors that do not name it.

    Raises:
        [`DiskError`]: the disk is full or may not be written to. Other errors pass unchanged.
    """
    try:
        yield
    except (RecipeError, ChildError):
        raise
    except Exception as error:
        fix = disk_fix(error)
        if fix is None:
            raise
        where = error.filename if isinstance(error, OSError) and error.filename else path
        what = (isinstance(error, OSError) and error.strerror) or error
        raise DiskError(
            f"cannot write {where}: {what}. {fix}, and run the same command again: what is finished is kept."
        ) from error


def disk_fix(error: Exception) -> str | None:
    """What to do about an error of the disk; `None` for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or (number is None and any(words in str(error) for words in FULL_WORDS)):
        return "Free space there"
    return "Allow writing there" if number in READ_ONLY else None
