"""
What is checked while a run goes on, and when it stops.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from ...recipe_checks import Section, section
from .values import PositiveShare


@section
class ParityConfig(Section):
    """
    A check, before a round uses its answers, that they come from the policy: the engine's log-probabilities of answers that it
    samples are compared with the trainer's. The same answers give the KL to the initial policy.
    """

    samples: NonNegativeInt = 64
    """Answers to evaluation prompts, at temperature 1, in every start of the engine. With `0` there is no check and no
    KL."""
    tolerance: PositiveFloat | None = None
    """Largest difference in nats per token, as the root mean square. Default: by the engine's data type, 0.01 for
    float32 and 0.2 for 16 bits."""


@section
class HealthConfig(Section):
    """
    When a run stops rather than go on with what is left of its data or of its policy. `null` switches a bound off. The bounds on the
    policy see a collapse, but not that its answers get worse otherwise: that is `on_setback`.
    """

    max_dropped: Annotated[float, Field(ge=0, lt=1)] | None = 0.5
    """Largest share of rows that cannot be used: SFT rows without an answer, prompts that are too long, chains without
    two whole, scored answers, training rows whose prompt fills `max_length`. Pairs that a rule of `pairs` leaves out
    do not count. Generation is checked from its first 64 chains on."""
    max_kl: PositiveFloat | None = 1.5
    """Largest KL of a round's policy to the initial policy, in nats per token. Measured if `parity.samples` is not 0.
    Our choice, from `docs/evidence/real`: on a model of 270M parameters, nine rounds that improved have 0.23 to 1.01, and a
    policy that only repeats itself has 2. It does not see a policy that gets worse close to where it began."""
    min_length: PositiveShare | None = 0.1
    """Smallest mean length of the direct evaluation answers, as a ratio to round 0's."""
    min_diversity: PositiveShare | None = 0.1
    """Smallest `distinct_2` of the direct evaluation answers, as a ratio to round 0's."""
    on_setback: Literal["warn", "stop", "roll_back"] = "warn"
    """What happens when a turn's answers lose against the same turn's of the round before, or of round 0, beyond the interval:
    `"warn"` says so and goes on, `"stop"` ends the run, `"roll_back"` goes on from the policy of the round before, with half
    the learning rate (our choice)."""
