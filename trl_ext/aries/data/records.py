"""
Rows on disk: JSON lines, written whole or appended, and read back. Errors name file and line.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ...recipe import RecipeError
from .disk import writing


Prompt = str | list[dict[str, Any]]  # plain text, or messages
T = TypeVar("T")


@dataclass
class Answer:
    """One answer y_k of a chain."""

    turn: int  # 1 is the draft
    text: str
    tokens: int
    finish_reason: str  # "stop", or "length" for a truncated answer
    full_text: str | None = None  # all that was generated, if `text` is what `answer_pattern` found in it
    critique: str | None = None  # what the policy said about this answer before refining it

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

    @classmethod
    def from_row(cls, row: dict[str, Any], prompt: Prompt) -> "Chain":
        answers, unanswered = ([Answer(**a) for a in rows] for rows in (row["answers"], row.get("unanswered", [])))
        return cls(row["prompt_id"], prompt, answers, row["stopped"], unanswered)


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """An answer in the format of its prompt: text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def encode(value: Any, sort_keys: bool = False) -> str:
    """JSON on one line. Dates, which a dataset's columns may hold, become text."""
    return json.dumps(value, ensure_ascii=False, default=str, sort_keys=sort_keys)


def to_line(row: dict[str, Any]) -> str:
    return encode(row) + "\n"


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """
    The row in a line of a file.

    Raises:
        [`RecipeError`]: it is not a JSON object in UTF-8; the message names file and line.
    """
    try:
        # A file may begin with a byte-order mark
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeError as error:
        raise RecipeError(f"{path}:{number}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        what = "the line is empty" if not line.strip() else f"not valid JSON ({getattr(error, 'msg', error)})"
        raise RecipeError(f"{path}:{number}: {what}. Each line must be a JSON object.") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
    return row


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """
    The rows of a file, one at a time.

    Raises:
        [`RecipeError`]: a line is not a JSON object in UTF-8; the message names file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield parse_line(path, number, line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of [`read_rows`]."""
    return list(read_rows(path))


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def write_atomically(path: Path, lines: Iterable[str]) -> int:
    """
    Write `path` so that it exists whole or not at all, one line in memory at a time.

    Returns:
        `int`: the number of lines.

    Raises:
        [`~aries.data.disk.DiskError`]: the disk is full. The space that was taken is given back.
    """
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                for line in lines:
                    count += 1
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return count


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as [`write_atomically`] does, and count them."""
    return write_atomically(path, map(to_line, rows))


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


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """
    Append to a file of lines, after cutting off a last one that an earlier process left half written.

    Raises:
        [`~aries.data.disk.DiskError`]: the disk is full.
    """
    with writing(path):
        cut_torn_line(path)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)


def cut_torn_line(path: Path) -> None:
    """Cut off an incomplete last line. The file need not exist."""
    if not path.exists():
        return
    whole = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                os.truncate(path, whole)
                break
            whole += len(line)


def recover_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read back a file that was being appended to, without an incomplete last line. If it does not exist, there are no rows."""
    cut_torn_line(path)
    return read_rows(path) if path.exists() else iter(())


def sha256(path: Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256 of a file, or of a directory's files with their names: all of them, or `files`."""
    digest = hashlib.sha256()
    if files is None:
        files = (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in sorted(files):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()
