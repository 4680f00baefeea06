"""
What reaches a terminal.

Generated answers, columns of a dataset or a server's reply may contain control sequences that move the cursor, retitle the window or hide what
was printed before; they are taken out. In files they stay as they are. What other libraries say about themselves is left out by their own
switches, if nobody has to act on it.
"""

import logging
import re


# ECMA-48: strings such as a window's title (OSC, DCS, ...) up to their end, then sequences that end in a letter (CSI), then
# two-character escapes
_SEQUENCES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
# C0 without tab and newline, DEL, and C1
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """
    Remove terminal control sequences and control characters from a text. Newlines and tabs stay.

    Example:

    ```python
    >>> printable("\\x1b[2J\\x1b]0;title\\x07safe\\rtext")
    'safetext'
    ```
    """
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))


def quiet_imports() -> None:
    """
    Leave out what libraries say as they are imported: bitsandbytes misses a kernel for 4-bit inference on CPUs, and does without. A level that
    somebody has set stays.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


def no_weight_bars() -> None:
    """Leave out transformers' bars for loading and writing weights. Those of downloads, datasets and trainings stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads = not are_progress_bars_disabled()
    disable_progress_bar()  # and the Hub's
    if downloads:
        enable_progress_bars()
