"""
The work directory of a refinement by itself, `OUTPUT.work/`: what is between the prompts and the output, from which a killed command continues.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from ...outputs import check_new
from ...recipe import RecipeError
from ..config import RefineConfig
from ..data.disk import writing
from ..data.prompts import Prompts
from ..data.records import read_json, to_line, write_json, write_jsonl
from ..run_dir import FIRST_FILES, OPERATIONAL_KEYS, RunDir, acquire, differing_keys, lookup, with_defaults


@dataclass
class RefineMessage:
    """What a process of `stages/refine.py` does: `"probe"`, `"answers"`, `"check"`, `"scores"`, or the reward model of a name."""

    work: Path
    step: str
    name: str | None = None


class WorkDir(RunDir):
    """
    What is between the prompts and the output. The only change w.r.t. [`RunDir`] is that there are no rounds: it has one file of answers.

    Args:
        path (`Path`):
            The directory.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.prompts = path / "prompts.jsonl"
        self.answers = path / "answers.jsonl"
        self.scores = path / "scores.jsonl"
        self.probe = path / "parity_probe.json"
        self.complete = path / "complete"  # from when the output is written

    def read_config(self) -> RefineConfig:
        return TypeAdapter(RefineConfig).validate_python(read_json(self.resolved))

    @contextmanager
    def begun(self, config: RefineConfig, prompts: Prompts) -> Iterator[None]:
        """
        Make the directory, or continue it, with its lock held.

        Raises:
            [`RecipeError`]: it was begun with other settings or prompts, holds other files, another process is using it, or it cannot be
                made.
        """
        if not self.resolved.exists() and self.path.is_dir() and {p.name for p in self.path.iterdir()} - FIRST_FILES:
            check_new(self.path)
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise RecipeError(f"`--output`: cannot write {self.path}: {error.strerror}.") from error
        with writing(self.path), open(self.lock, "w") as lock:
            self._claim(lock, json.loads(json.dumps(asdict(config))), prompts)
            yield

    def _claim(self, lock: IO, settings: dict[str, Any], prompts: Prompts) -> None:
        if not acquire(lock):
            raise RecipeError(f"{self.path} is in use by another process. Wait for it, or name another `--output`.")
        begun = read_json(self.resolved)
        if begun is not None:
            changed = differing_keys(with_defaults(begun, RefineConfig), settings) - OPERATIONAL_KEYS - {"select"}
            found = [key for key in sorted(changed) if not key.startswith("scores")]  # what was generated stays
            details = [f"{key}: {lookup(begun, key)!r} -> {lookup(settings, key)!r}" for key in found]
            if self.prompts.exists() and not self._has(prompts):
                details.append("the prompts")
            if details:
                lines = "\n".join(f"  {line}" for line in details)
                raise RecipeError(
                    f"{self.path} was begun with other settings or prompts:\n{lines}\nGo back to the old ones to continue, name another "
                    "`--output`, or remove the directory."
                )
        write_json(self.resolved, settings)  # first: a directory that has it is ours
        if not self.prompts.exists():
            write_jsonl(self.prompts, prompts)

    def _has(self, prompts: Prompts) -> bool:
        with open(self.prompts, encoding="utf-8") as file:
            return all(line == known for line, known in zip_longest(map(to_line, prompts), file))
