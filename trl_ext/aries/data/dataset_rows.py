"""
Rows of a dataset that stay on disk: any of them by its number, none of them kept.
"""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ...recipe import RecipeError
from .records import blocks, read_line


# Rows that Arrow makes Python objects of in one call
ROWS_AT_ONCE = 1000


class DatasetRows(Protocol):
    """What [`JsonLines`] and [`ArrowRows`] have in common."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def take(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The rows with these numbers, from 0, in this order."""


class JsonLines:
    """
    The rows of a `.jsonl` file, of which only the places are kept: eight bytes each.

    Args:
        path (`Path`):
            The file. Every line is read once, so that a bad one shows now.
        columns (`list[str]`, *optional*):
            Columns to keep. Default: all.

    Raises:
        [`RecipeError`]: a line is not a JSON object in UTF-8; the message names file and line.
    """

    def __init__(self, path: Path, columns: list[str] | None = None):
        self._path = path
        self._columns = columns
        self._places = array("q")
        self._version = self._read_version()
        place = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                read_line(path, number, line, to_write=True)
                self._places.append(place)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.take(range(len(self)))

    def take(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """
        Raises:
            [`RecipeError`]: the file is not the one it was.
        """
        with open(self._path, "rb") as file:
            if self._read_version() != self._version:
                raise RecipeError(
                    f"{self._path} has changed since the run read it. Put back what it was, or set another `output_dir`."
                )
            for number in numbers:
                file.seek(self._places[number])
                row = read_line(self._path, number + 1, file.readline())
                if self._columns is not None:
                    row = {column: row[column] for column in self._columns if column in row}
                yield row

    def _read_version(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_size, status.st_mtime_ns


class ArrowRows:
    """
    The rows of a `datasets.Dataset`, which maps its files into memory instead of reading them.

    Args:
        dataset (`datasets.Dataset`):
            The dataset.
    """

    def __init__(self, dataset: "datasets.Dataset"):  # noqa: F821
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.take(range(len(self)))

    def take(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        for block in blocks(numbers, ROWS_AT_ONCE):
            yield from self._dataset.select(block).to_list()
