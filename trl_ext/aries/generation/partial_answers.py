"""
`answers.jsonl.part`: every new answer appends its chain so far, and a killed process is continued from there.

Chains stay in the file. In memory are, of each chain, the place of its last row and, where it stopped before its turns were over, the
reason: a round may have a million chains. Of those in progress, which are few, their answers besides, as they are in the file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..data.records import Chain, cut_torn_line, encode, read_line, read_rows, to_line, write_atomically


class PartialAnswers:
    """
    Args:
        prompts (`Path`):
            The file of prompts.
        answers (`Path`):
            The file that is written once every chain is finished. What a previous process left beside it, in the `.part` file, is
            taken up.
    """

    def __init__(self, prompts: Path, answers: Path):
        self.path = answers.with_name(answers.name + ".part")
        self.finished = 0
        self._prompts = prompts
        self._answers = answers
        self._last_row: dict[str, int] = {}  # by prompt id; the last row of a chain holds all its answers
        self._stopped: dict[str, str] = {}  # likewise
        self._encoded: dict[str, list[str]] = {}  # of chains in progress: each answer as it is in the file
        self._end = 0
        if self.path.exists():
            cut_torn_line(self.path)
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    self._last_row[read_line(self.path, number, line)["prompt_id"]] = self._end
                    self._end += len(line)

    def chains(self) -> Iterator[Chain]:
        """The chains to answer, new or begun, in the order of the prompts."""
        with open(self.path, "rb") as file:
            for prompt in read_rows(self._prompts):
                line = self._line(file, prompt["prompt_id"])
                if line:
                    yield Chain.from_row(json.loads(line), prompt["prompt"])
                else:
                    yield Chain(prompt["prompt_id"], prompt["prompt"])

    def add(self, file: BinaryIO, chains: list[Chain]) -> None:
        """Append chains that have a new answer. They are in the file, and not in a buffer, when this returns."""
        for chain in chains:
            line = chain.to_line(self._encoded_answers(chain)).encode("utf-8")
            file.write(line)
            self._last_row[chain.prompt_id] = self._end
            self._end += len(line)
        file.flush()

    def _encoded_answers(self, chain: Chain) -> list[str]:
        """Each answer is encoded once, and not again with every later one; the last one may have a critique now."""
        encoded = self._encoded.setdefault(chain.prompt_id, [])
        del encoded[max(len(chain.answers) - 1, 0) :]
        encoded += [encode(answer.to_row()) for answer in chain.answers[len(encoded) :]]
        return encoded

    def finish(self, chain: Chain) -> None:
        """A chain has all its answers. Why it stopped may have come after its last row."""
        self._encoded.pop(chain.prompt_id, None)
        if chain.stopped is not None:
            self._stopped[chain.prompt_id] = chain.stopped
        self.finished += 1

    def close(self) -> None:
        """All chains are finished: write them in the order of their prompts."""
        with open(self.path, "rb") as file:
            write_atomically(self._answers, self._final_lines(file))
        self.path.unlink()

    def _final_lines(self, file: BinaryIO) -> Iterator[str]:
        for prompt in read_rows(self._prompts):
            prompt_id = prompt["prompt_id"]
            line = self._line(file, prompt_id)
            if prompt_id in self._stopped:
                row = json.loads(line) if line else Chain(prompt_id, prompt["prompt"]).to_row()
                line = to_line(row | {"stopped": self._stopped[prompt_id]})
            yield line

    def _line(self, file: BinaryIO, prompt_id: str) -> str:
        """The last row of a chain, empty for one that is not begun."""
        if prompt_id not in self._last_row:
            return ""
        file.seek(self._last_row[prompt_id])
        return file.readline().decode("utf-8")
