"""
Makes text safe for a terminal. Generated answers, columns of a dataset or a server's reply may contain control sequences that move
the cursor, retitle the window or hide what was printed before. In files they stay as they are.
"""

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
