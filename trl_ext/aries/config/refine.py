"""
Refinement by itself, without a run: what `trl-ext aries refine` and `trl_ext.refine` are told. The sections are a recipe's.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from ...recipe_checks import Section, section
from .data import Source
from .generation import DraftsConfig, GenerationConfig, RefinementsConfig, check_room
from .pairs import PairsConfig
from .scores import ScoresConfig
from .values import PathOrId, Share, check_pattern


@section
class RefineModelConfig(Section):
    """The model that answers and refines."""

    model_name_or_path: PathOrId
    """A path, or an id on the Hub. Also `--model`."""
    model_revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Whether the model may run its own code."""


@section
class RefinePromptsConfig(Source):
    """
    Prompts to answer. A row has `prompt` (text, or messages that end with the user's) and any columns that the scorer asks for.
    """

    split: str = "train"
    """Split of a directory or a Hub dataset; a file has one."""


@section
class SettledConfig(Section):
    """When a chain has settled, for `select: rule`."""

    agreement: Annotated[int, Field(ge=2)] = PairsConfig.agreement
    """How many answers in a row must agree (our choice)."""
    settled_similarity: Share = PairsConfig.settled_similarity
    """How similar answers that agree must be at least (difflib's ratio of their words; our choice)."""
    agreement_pattern: Annotated[str, AfterValidator(check_pattern)] | None = None
    """A regular expression with one group: answers agree if it finds the same in them, instead of by `settled_similarity`."""


@section
class RefineConfig(Section):
    """Answers of a model to prompts, refined turn by turn, and the choice of one of each chain."""

    model: RefineModelConfig
    adapter: PathOrId | None = None
    """A LoRA adapter on the model, as a path or an id on the Hub."""
    prompts: RefinePromptsConfig | None = None
    """Needed on the command line; in Python, prompts may also be a list."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    drafts: DraftsConfig = field(default_factory=DraftsConfig)
    refinements: RefinementsConfig = field(default_factory=RefinementsConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    pairs: SettledConfig = field(default_factory=SettledConfig)
    select: Literal["last", "all", "scores", "rule"] = "last"
    """Which answer of a chain is chosen."""
    seed: NonNegativeInt = 42
    """Seed of every sampled answer, with the prompt and the turn."""

    @property
    def trust_remote_code(self) -> bool:
        return self.model.trust_remote_code

    @model_validator(mode="after")
    def check_generation(self):
        check_room(self.generation, self.drafts, self.refinements)
        return self

    @model_validator(mode="after")
    def check_select(self):
        if self.select == "scores" and not self.scores.each():
            raise ValueError(
                "`select` asks for the best answer, and `scores` names nobody who scores. Write `--select verifier path/to/file.py:function` "
                "or `--select reward_model NAME`, or give `--scores.judge.base_url` and `--scores.judge.model`."
            )
        if self.select == "rule" and self.refinements.strategy == "parallel":
            raise ValueError(
                "`select: rule` looks for an answer that is like the one it refines, and with `refinements.strategy: parallel` all are "
                "samples of one prompt. Select by scores, or set another strategy."
            )
        return self
