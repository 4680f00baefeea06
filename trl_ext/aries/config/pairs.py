"""
How scored chains become preference pairs.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from ...recipe_checks import Section, section
from .values import Share, check_pattern


@section
class PairsConfig(Section):
    """How chains become preference pairs."""

    selection: Literal["best_over_worst", "rule_based"] = "best_over_worst"
    """`"best_over_worst"` (the paper's reward-model scoring: highest score chosen, lowest rejected) or `"rule_based"`
    (no scores: the last refinement chosen, the draft rejected, if the chain has settled; the paper names it, the rule
    is our choice)."""
    min_margin: NonNegativeFloat = 0.0
    """The chosen score must exceed the rejected one by more than this."""
    min_chosen_score: float | None = None
    """Lowest score of a chosen answer. With a 0/1 verifier, a margin already means right over wrong."""
    max_rejected_score: float | None = None
    """Highest score of a rejected answer."""
    pairs_per_prompt: PositiveInt = 1
    """For `"best_over_worst"`, pairs of a chain: the best answer over the worst, then the next best over the next
    worst, no text twice (our choice)."""
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """The chosen answer may have at most this many times the tokens of the rejected one. Much shorter ones stay."""
    max_similarity: Share | None = None
    """The chosen and the rejected answer may be at most this similar (difflib's ratio of their words). Default: any two
    that are not the same."""
    agreement: Annotated[int, Field(ge=2)] = 2
    """For `"rule_based"`, how many of the last answers must agree for a chain to have settled. Relatives of the paper ask
    for three; two is our choice."""
    settled_similarity: Share = 0.9
    """For `"rule_based"`, how similar answers that agree must be at least (difflib's ratio of their words; our
    choice)."""
    agreement_pattern: Annotated[str, AfterValidator(check_pattern)] | None = None
    """For `"rule_based"`, a regular expression with one group, such as `'####\\s*(.*)'`: answers agree if it finds the
    same in them, whatever else they say, instead of by `settled_similarity`. A chain whose draft agrees with the last
    answer gives no pair."""
    min_settled: Share | None = None
    """For `"rule_based"`, how much of round 1's share of settled chains a later round must have: with `0.9` and 80 % in
    round 1, at least 72 %. Below it, refining goes astray, and `guard` decides about the round."""
    min_changed: Share | None = None
    """For `"rule_based"`, the same of the share of settled chains whose last answer is another than the draft. Below it,
    refining adds less than it did, and `guard` decides about the round. `0.95` has stopped the rule in
    time ([measured](evidence/small/by_rule.md))."""
    direct_weight: NonNegativeInt = 1
    """How often an epoch shows a pair's direct row. `0` leaves it out (our choice)."""
    refinement_weight: NonNegativeInt = 1
    """How often an epoch shows each refinement row. `0` leaves them out (our choice). `16` is the weight that the code of
    the paper's relatives amounts to."""
    refinement_rows: Literal["pair", "neighbors", "both"] = "pair"
    """Which answers the refinement rows compare: `"pair"` (the paper's), those of the pair; `"neighbors"`, each answer and
    [the one that refines it](aries.md#refinement-rows); or `"both"` (our choice)."""
    drafts: Literal["both", "rejected", "chosen"] = "both"
    """Which drafts the refinement rows have. With `"rejected"`, no row teaches to leave a draft as it is (our choice)."""
    earlier_rounds: NonNegativeInt = 0
    """How many of the rounds before it a round learns refining from too. Their refinement rows are shown beside its own: drafts
    of policies that left more to refine (our choice)."""
    learn: Literal["answer", "full_text"] = "answer"
    """With `generation.answer_pattern`, what a training row holds: `"answer"`, or `"full_text"`, all that was
    generated, including a thinking model's thought. The answer is refined and scored in either case."""
    guard: Literal["stop", "skip", "warn"] = "stop"
    """What happens to a round whose chosen answers do not score higher than its rejected ones on average: `"stop"`
    ends the run before training, `"skip"` leaves the round untrained and goes on to the next one, `"warn"` trains on
    it all the same. Without `evaluation.scores` it cannot judge a `"best_over_worst"` round, which is selected by the same
    scores and passes by construction (our choice)."""
    guard_samples: NonNegativeInt = 200
    """With `evaluation.scores`, how many chains of a round those scorers score too, for the guard: the first ones, in the
    random order of the prompts. `0` leaves the guard with the scores of `scores` (our choice)."""

    @model_validator(mode="after")
    def check_pairs(self):
        if self.refinement_rows != "pair" and self.selection != "best_over_worst":
            raise ValueError(
                f"`pairs.refinement_rows: {self.refinement_rows}` compares answers by score: it needs `pairs.selection: "
                "best_over_worst`. The rule has `pair`."
            )
        if self.pairs_per_prompt > 1 and self.selection != "best_over_worst":
            raise ValueError(
                "`pairs.pairs_per_prompt` above 1 ranks the answers by score: it needs `pairs.selection: best_over_worst`. The "
                "rule has one pair per chain."
            )
        for key in ("min_margin", "min_chosen_score", "max_rejected_score"):
            if getattr(self, key) != getattr(PairsConfig, key) and self.selection != "best_over_worst":
                raise ValueError(
                    f"`pairs.{key}` is about scores, by which the rule does not select: it needs `pairs.selection: best_over_worst`."
                )
        for key in ("min_settled", "min_changed", "agreement_pattern"):
            if getattr(self, key) is not None and self.selection != "rule_based":
                raise ValueError(f"`pairs.{key}` is about the rule: it needs `pairs.selection: rule_based`.")
        if self.earlier_rounds and not self.refinement_weight:
            raise ValueError(
                "`pairs.earlier_rounds` repeats refinement rows, and `pairs.refinement_weight: 0` makes none."
            )
        if self.direct_weight == self.refinement_weight == 0:
            raise ValueError(
                "`pairs.direct_weight` and `pairs.refinement_weight` are both 0, so there is nothing to train on."
            )
        return self
