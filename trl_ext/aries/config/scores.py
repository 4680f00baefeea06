"""
Who scores the answers.
"""

import re
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ...recipe_checks import Section, section
from .templates import JUDGE_TEMPLATE, check_judge_template
from .values import EnvName, PathOrId, ServerUrl


def check_weight(weight: float) -> float:
    if weight == 0:
        raise ValueError("must not be 0. Remove the scorer, or give it a weight.")
    return weight


def check_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"becomes part of file names: use letters, digits and `_.-`; got {name!r}.")
    return name


@section
class JudgeConfig(Section):
    """A language model behind an OpenAI-compatible server that compares answers two at a time."""

    base_url: ServerUrl
    """The server's URL up to and including its version, such as `http://localhost:8000/v1`."""
    model: str
    """The model's name there."""
    api_key_env: EnvName | None = None
    """Environment variable that holds the API key. The key itself is never written anywhere."""
    template: Annotated[str, AfterValidator(check_judge_template)] = JUDGE_TEMPLATE
    """What the judge is asked, in Jinja2, with `messages` (the conversation; plain text is one user message),
    `question` (its last message), `answer_a`, `answer_b` and the prompt's other columns. The last `[[A]]`, `[[B]]` or
    `[[C]]` (a tie) of the reply is its verdict. Our own, after the pairwise prompt of MT-Bench."""
    temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature of the reply; `null` leaves it to the server, as some reasoning models require."""
    max_tokens: PositiveInt | None = 1024
    """Longest reply, in tokens; `null` leaves it to the server."""
    max_concurrency: PositiveInt = 8
    """Requests in flight."""
    timeout: PositiveFloat = 120.0
    """Seconds until a request counts as failed."""
    max_retries: NonNegativeInt = 5
    """How often a request that failed or was refused as too many (408, 409, 429, 5xx) is repeated, after 0.5, 1, 2, ...
    seconds or as `Retry-After` says. If that is more than two minutes, the run ends."""


@section
class OneScorer(Section):
    """The keys that `scores` and an entry of `scores.scorers` share."""

    verifier: str | None = None
    """`path/to/file.py:function` with TRL's reward-function signature, `(prompts, completions, **columns) ->
    list[float | None]`, or `trl.rewards:name`. Imported from that file only."""
    reward_model: PathOrId | None = None
    """A sequence-classification model with one output, as a path or Hub id: the paper's reward-model scoring. Its
    score is that output as it is, without a sigmoid."""
    reward_model_revision: str | None = None
    """Branch, tag or commit of the reward model on the Hub."""
    reward_model_backend: Literal["auto", "vllm", "transformers"] = "auto"
    """`"vllm"`, `"transformers"`, or `"auto"`: vLLM unless it does not know the architecture or is not installed."""
    batch_size: PositiveInt = 16
    """Answers per forward of the reward model under transformers. vLLM batches by itself."""
    judge: JudgeConfig | None = None
    """A language model behind a server. The score of an answer is its win rate against the others of its chain (our
    choice)."""
    timeout: PositiveFloat | None = None
    """Seconds for one call of the verifier, with the answers of up to 100 chains. Default: as long as it takes."""

    def kinds(self) -> list[str]:
        """Which of the three kinds of scorers are named."""
        return [kind for kind in ("verifier", "reward_model", "judge") if getattr(self, kind) is not None]

    @model_validator(mode="after")
    def check_kinds(self):
        if len(self.kinds()) > 1:
            raise ValueError(
                f"{' and '.join(f'`{kind}`' for kind in self.kinds())} are given together. Name one of them, or list them under "
                "`scores.scorers`, each with a `weight`."
            )
        if self.timeout is not None and self.verifier is None:
            raise ValueError("`timeout` belongs to a `verifier`. A judge has its own, `judge.timeout`.")
        for key in ("reward_model_revision", "reward_model_backend", "batch_size"):
            if self.reward_model is None and getattr(self, key) != getattr(OneScorer, key):
                raise ValueError(f"`{key}` belongs to a `reward_model`, and none is named beside it.")
        return self


@section
class ScorerConfig(OneScorer):
    """One of several scorers: the keys of `scores` that name it, and its part in the sum."""

    name: Annotated[str, AfterValidator(check_name)] | None = None
    """What its scores are called in `scores.jsonl`; needed if two would be the same. Default: `verifier`, `reward_model` or `judge`."""
    weight: Annotated[float, AfterValidator(check_weight)] = 1.0
    """Its weight in the sum."""

    @model_validator(mode="after")
    def check_named(self):
        if not self.kinds():
            raise ValueError("a scorer names a `verifier`, a `reward_model` or a `judge`; this one does not.")
        self.name = self.name or self.kinds()[0]
        return self


@section
class ScoresConfig(OneScorer):
    """
    Who scores the answers: a verifier, a reward model, a judge, several of them, or nobody if the pairs are rule-based (then the
    evaluation has no scores either, only lengths).
    """

    scorers: list[ScorerConfig] | None = None
    """Several scorers, instead of the keys above. The score is their weighted sum; an answer that one of them leaves
    without a score has none."""

    @model_validator(mode="after")
    def check_scorers(self):
        if self.scorers is None:
            return self
        if self.kinds():
            raise ValueError(
                f"`scores` has both `scorers` and a `{self.kinds()[0]}`. Move it into the list, or drop the list."
            )
        if not self.scorers:
            raise ValueError("`scores.scorers` is empty. List scorers, or leave the key out.")
        names = [scorer.name for scorer in self.scorers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`scores.scorers` has two called {', '.join(twice)}. Give each a `name` of its own.")
        return self

    def each(self) -> list[ScorerConfig]:
        """The scorers, in either form; an empty list if the pairs are rule-based."""
        if self.scorers is not None:
            return self.scorers
        keys = {field.name: getattr(self, field.name) for field in fields(OneScorer)}
        return [ScorerConfig(**keys)] if self.kinds() else []
