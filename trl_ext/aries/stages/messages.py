"""
Messages: what the loop tells the process of a stage. The rest, such as the recipe's settings, is in the run directory.

Nothing heavy is imported here: the loop makes these, and each module beside this one is the entry point of a process that gets one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipe import Recipe


@dataclass
class AnsweringMessage:
    """The policy of round `answering` answers the evaluation prompts and those of the next round."""

    run: Path
    answering: int


@dataclass
class RewardModelMessage(AnsweringMessage):
    """Its answers are scored by the reward model of this name, in this section of the recipe."""

    section: str
    name: str


@dataclass
class RoundMessage:
    """A round is trained, or tracked; number 0 is the SFT, or the policy before round 1."""

    run: Path
    number: int


@dataclass
class ReportMessage:
    run: Path
    running: bool  # whether the run goes on


@dataclass
class CheckScorersMessage:
    """Prompts of each file that the scorers are tried on, by their places; the run has not taken any yet."""

    run: Path
    files: list[dict[str, dict[str, Any]]]


@dataclass
class PreflightMessage:
    """The recipe as it was written, for errors that name its lines, and whether its prompts are messages."""

    run: Path
    recipe: Path | None
    mapping: dict[str, Any]
    locations: list[tuple[tuple[str | int, ...], str]]  # JSON has no tuples for keys
    conversational: bool

    @classmethod
    def of(cls, run: Path, recipe: Recipe, conversational: bool) -> "PreflightMessage":
        return cls(run, recipe.path, recipe.mapping, list(recipe.locations.items()), conversational)

    def read_recipe(self) -> Recipe:
        return Recipe(self.recipe, self.mapping, dict(self.locations))
