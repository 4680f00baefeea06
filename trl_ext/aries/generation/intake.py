"""
Intake: checks from the first chains on whether what a stage generates can be used, instead of after hours of work.

In: chains as they finish. Out: an error, or a note, that counts what is wrong, shows an example and says what to set. The bound is
`health.max_dropped`, as it is for a whole round (`pairs.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ...recipe_values import show
from ..config import DraftsConfig, HealthConfig
from ..data.faults import fault, share_finding
from ..data.records import Chain


# Enough to estimate a share: if it is 0.37, 1 of 80 such samples is above a bound of 0.5. Our choice
FIRST_CHAINS = 64


class Intake:
    """
    Args:
        health ([`~aries.config.HealthConfig`] or `None`):
            Its `max_dropped`, or the default one.
        selection (`str`):
            `pairs.selection`, which says what a chain needs.
        drafts ([`~aries.config.DraftsConfig`]):
            How drafts were sampled, for the advice.
        tell (`Callable[[str], None]`):
            Called with the first finding; it may raise it.
    """

    def __init__(self, health: HealthConfig | None, selection: str, drafts: DraftsConfig, tell: Callable[[str], None]):
        self._health, self._selection, self._drafts, self._tell = health, selection, drafts, tell
        self._begun = 0
        self._first: set[str] = set()
        self._faults: Counter[str] = Counter()
        self._of_first: Counter[str] = Counter()
        self._examples: dict[str, Chain] = {}  # the first of each fault
        self._told = False

    def begun(self, chains: Iterable[Chain]) -> Iterator[Chain]:
        """Passes chains on to be answered."""
        for chain in chains:
            self._begun += 1
            if self._begun <= FIRST_CHAINS:
                self._first.add(chain.prompt_id)
            yield chain

    def look(self, chain: Chain) -> None:
        """
        Count a finished chain. Short chains finish first, so the share is over all that were begun: if the faults are too many now, the
        rest cannot change that.
        """
        reason = fault(chain, self._selection)
        if reason is None or self._told:
            return
        self._faults[reason] += 1
        self._of_first[reason] += chain.prompt_id in self._first
        self._examples.setdefault(reason, chain)
        finding = share_finding("first chains", self._of_first, FIRST_CHAINS, self._health)
        if finding is None and self._begun > FIRST_CHAINS:
            finding = share_finding("chains so far", self._faults, self._begun, self._health)
        if finding is not None:
            self._told = True
            [(most_common, _)] = self._faults.most_common(1)
            self._tell(f"{finding}. {self.example(self._examples[most_common], most_common)}")

    def example(self, chain: Chain, reason: str) -> str:
        """An example, and what to do about it."""
        generated = [*chain.unanswered, *chain.answers]
        if not generated:
            return f"For example, {chain.prompt_id} and `drafts.max_tokens` together exceed `generation.max_model_len`. Lower the first key, or raise the second."
        answer = generated[0] if reason == "no_answer_found" else generated[-1]
        cut_off = answer.finish_reason == "length"
        how = f"cut off after {answer.tokens:,} tokens" if cut_off else f"ended after {answer.tokens:,} tokens"
        text = answer.text if answer.full_text is None else answer.full_text
        shown = f"For example, an answer to {chain.prompt_id} is {show(text)}, {how}. "
        if reason == "prompt_too_long":
            return f"{shown}Its refinement has no room in `generation.max_model_len`. Raise it, or lower `refinements.max_tokens`."
        if cut_off:
            stop = (
                ""
                if self._drafts.stop
                else ', or say what ends an answer: `drafts.stop: ["\\n"]`, as a base model may need'
            )
            return f"{shown}Raise `drafts.max_tokens`, now {self._drafts.max_tokens}{stop}."
        if reason == "no_answer_found":
            return f"{shown}`generation.answer_pattern` finds no answer in it. Write one that does."
        return f"{shown}Look at the prompts with `trl-ext doctor --config`, and at `drafts.stop`: the first token may end an answer."
