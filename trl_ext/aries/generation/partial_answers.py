"""
`answers.jsonl.part`: every new answer appends its chain so far, and a killed process is continued from there.

Chains stay in the file. Memory has the place of each chain's last row: a round may have a million chains.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..data.records import Chain, cut_torn_line, parse_line, read_rows, to_line


class PartialAnswers:
    """
    Args:
        prompts (`Path`):
            The file of prompts.
        path (`Path`):
            The `.part` file. What a previous process left is continued, without an incomplete last line.
        file (`BinaryIO`):
            The same, open for reading and appending.
    """

    def __init__(self, prompts: Path, path: Path, file: BinaryIO):
        self.finished = 0
        self._prompts = prompts
        self._file = file
        self._last_row: dict[str, int] = {}  # its place, by prompt id; it holds all answers of the chain
        cut_torn_line(path)
        file.seek(0)
        place = 0
        for number, line in enumerate(file, start=1):
            self._last_row[parse_line(path, number, line)["prompt_id"]] = place
            place += len(line)

    def chains(self) -> Iterator[Chain]:
        """The chains to answer, new or begun, in the order of the prompts."""
        for prompt in read_rows(self._prompts):
            line = self._line(prompt["prompt_id"])
            if line:
                yield Chain.from_row(json.loads(line), prompt["prompt"])
            else:
                yield Chain(prompt["prompt_id"], prompt["prompt"])

    def add(self, chains: list[Chain]) -> None:
        """Append chains that have a new answer. They are in the file, and not in a buffer, when this returns."""
        place = self._file.seek(0, os.SEEK_END)
        for chain in chains:
            self._last_row[chain.prompt_id] = place
            place += self._file.write(to_line(chain.to_row()).encode("utf-8"))
        self._file.flush()

    def finish(self, chain: Chain) -> None:
        """Note a chain that has all its answers. The reason why it stopped may come after its last row."""
        if chain.stopped is not None:
            line = self._line(chain.prompt_id)
            if not line or json.loads(line)["stopped"] != chain.stopped:
                self.add([chain])
        self.finished += 1

    def final_lines(self) -> Iterator[str]:
        """The last row of every chain, in the order of the prompts."""
        return (self._line(prompt["prompt_id"]) for prompt in read_rows(self._prompts))

    def _line(self, prompt_id: str) -> str:
        """The last row of a chain, empty for one that has not begun."""
        if prompt_id not in self._last_row:
            return ""
        self._file.seek(self._last_row[prompt_id])
        return self._file.readline().decode("utf-8")
