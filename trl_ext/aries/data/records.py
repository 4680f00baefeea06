"""
Rows on disk: JSON lines, written whole or appended, and read back with the place named when they are broken.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from json.encoder import c_make_encoder, encode_basestring
from pathlib import Path
from typing import Any, TypeVar

from ...recipe import RecipeError
from .disk import writing


Prompt = str | list[dict[str, Any]]  # plain text, or messages
T = TypeVar("T")

_DECODER = json.JSONDecoder()
# Bytes to look back at once for the end of the last whole line
_TAIL = 2**16


@dataclass
class Answer:
    """One answer y_k of a chain."""

    turn: int  # 1 is the draft
    text: str
    tokens: int
    finish_reason: str  # "stop", or "length" for a truncated answer
    full_text: str | None = None  # all that was generated, where `text` is what `answer_pattern` found in it
    critique: str | None = None  # what the policy said of this answer before refining it

    def to_row(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass
class Chain:
    """A prompt and its answers so far, y1 -> y2 -> ..."""

    prompt_id: str
    prompt: Prompt
    answers: list[Answer] = field(default_factory=list)
    stopped: str | None = None  # why there are fewer answers than turns
    unanswered: list[Answer] = field(default_factory=list)  # generated texts in which no answer was found

    def to_row(self) -> dict[str, Any]:
        row = {"prompt_id": self.prompt_id, "answers": [a.to_row() for a in self.answers], "stopped": self.stopped}
        return row | ({"unanswered": [a.to_row() for a in self.unanswered]} if self.unanswered else {})

    def to_line(self, answers: list[str]) -> str:
        """The line of [`to_row`], around answers that are encoded already."""
        stopped = "null" if self.stopped is None else encode(self.stopped)
        line = f'{{"prompt_id": {encode(self.prompt_id)}, "answers": [{", ".join(answers)}], "stopped": {stopped}'
        if self.unanswered:
            line += f', "unanswered": {encode([a.to_row() for a in self.unanswered])}'
        return line + "}\n"

    @classmethod
    def from_row(cls, row: dict[str, Any], prompt: Prompt) -> "Chain":
        answers, unanswered = ([Answer(**a) for a in rows] for rows in (row["answers"], row.get("unanswered", [])))
        return cls(row["prompt_id"], prompt, answers, row["stopped"], unanswered)


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """An answer in the format of its prompt: text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def read_jsonl(path: Path, to_write: bool = False) -> list[dict[str, Any]]:
    """
    Args:
        path (`Path`):
            The file.
        to_write (`bool`, *optional*, defaults to `False`):
            Whether the rows will be written again. Then an escaped half of a character, which JSON allows and no text file can
            hold, is an error.

    Raises:
        [`RecipeError`]: a line is not a JSON object in UTF-8; the message names file and line.
    """
    return list(read_rows(path, to_write))


def read_rows(path: Path, to_write: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of [`read_jsonl`] one by one, for files that need not fit into memory."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield read_line(path, number, line, to_write)


def read_line(path: Path, number: int, line: bytes, to_write: bool = False) -> dict[str, Any]:
    """One row of [`read_jsonl`]."""
    try:
        text = line.decode("utf-8")
        row = decode(text)
        if to_write and "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise RecipeError(f"{path}:{number}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        what = "the line is empty" if not line.strip() else f"not valid JSON ({getattr(error, 'msg', error)})"
        raise RecipeError(f"{path}:{number}: {what}. Each line must be a JSON object.") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
    return row


def decode(line: str) -> Any:
    """`json.loads`, which spends half of its time on a short line with looking for white space before and behind it."""
    try:
        value, end = _DECODER.raw_decode(line)
    except ValueError:
        return json.loads(line)  # there is some before it, or the error says what is wrong
    return json.loads(line) if line[end:].strip(" \t\n\r") else value


def encoder(sort_keys: bool = False) -> Callable[[Any], str]:
    """
    `json.dumps` with `ensure_ascii=False` and, for the dates in a dataset's columns, `default=str`, as a function that is made once:
    `JSONEncoder.encode` makes the same encoder anew for every value, which takes longer than to encode a short row.
    """
    # The first argument would find values that contain themselves, before they are a RecursionError; none comes out of a file
    chunks = c_make_encoder(None, str, encode_basestring, None, ": ", ", ", sort_keys, False, True)
    return lambda value: "".join(chunks(value, 0))


encode = encoder()


def to_line(row: dict[str, Any]) -> str:
    return encode(row) + "\n"


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """
    Write `path` so that it exists whole or not at all.

    Raises:
        [`~aries.data.disk.DiskError`]: the disk is full. The space that was taken is given back.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """
    Append to a file of lines, after cutting off a last one that an earlier process left half written.

    Raises:
        [`~aries.data.disk.DiskError`]: the disk is full.
    """
    with writing(path):
        if path.exists():
            cut_torn_line(path)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without its end."""
    with open(path, "rb") as file:
        size = whole = file.seek(0, os.SEEK_END)
        while whole > 0:
            start = max(whole - _TAIL, 0)
            file.seek(start)
            end = file.read(whole - start).rfind(b"\n") + 1
            whole = start + end
            if end > 0:
                break
    if whole < size:
        os.truncate(path, whole)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, of which one at a time is in memory, and count them."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield to_line(row)

    write_atomically(path, lines())
    return count


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, [json.dumps(value, ensure_ascii=False, indent=2) + "\n"])


def read_json(path: Path) -> Any:
    """What a JSON file holds, `None` if there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path}: not valid JSON ({error}).") from error


def recover_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read back a file that was being appended to, and cut off its last line if it was torn."""
    if not path.exists():
        return
    cut_torn_line(path)
    yield from read_rows(path)


def sha256(path: Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256 of a file, or of the files of a directory, all or these, names included."""
    digest = hashlib.sha256()
    if files is None:
        files = (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in sorted(files):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
