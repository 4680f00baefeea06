"""
Pairs: scored chains in, one TRL preference dataset out, and a count of everything dropped.

A pair gives up to three rows: the direct one, and two refinement rows whose prompt is the refinement template around the
rejected or the chosen draft (https://huggingface.co/papers/2502.05605: each square of its refinement loss is a
preference pair under such a prompt). So any pairwise trainer learns to answer and to refine from the same file.
Refinement rows may also compare each answer with the one that refines it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from jinja2 import Template

from ..config import PairsConfig, SettledConfig
from .faults import FAULTS
from .records import Answer, Chain, as_completion
from .templates import LONGEST_SECONDS, refinement_prompt
from .time_limit import time_limit


# Words up to which texts are compared exactly: with few different words, the time grows with the cube of their number
EXACT_WORDS = 1000


@dataclass
class Pair:
    """A chosen and a rejected answer to the same prompt."""

    chain: Chain
    chosen: Answer
    rejected: Answer
    chosen_score: float | None
    rejected_score: float | None
    neighbors: list[tuple["Pair", str]] = field(default_factory=list)  # of the chain, with its first pair


def best_over_worst(chain: Chain, scores: list[float | None], config: PairsConfig) -> list[Pair | str]:
    """
    The paper's selection with a reward model: the best answer is chosen, the worst rejected. If `pairs_per_prompt` is above 1, the
    next best over the next worst follow, among the answers whose text is in no pair yet. Our choice: an answer cut off by
    `max_tokens` is never chosen; among equals the latest is chosen and the earliest rejected.

    Returns:
        `list[Pair | str]`: `pairs_per_prompt` entries, each a pair or the reason why there is none.
    """
    scored = [(answer, score) for answer, score in zip(chain.answers, scores, strict=True) if score is not None]
    if len(scored) < 2:
        return [chain.stopped or "fewer_than_two_scores"] * config.pairs_per_prompt
    selected = []
    for _ in range(config.pairs_per_prompt):
        # The first pair is tried whatever the texts, so that its drop says what is wrong with them
        if selected and len({answer.text for answer, _ in scored}) < 2:
            selected.append("no_more_distinct_answers")
            continue
        whole = [(answer, score) for answer, score in scored if answer.finish_reason == "stop"]
        if not whole:
            selected.append("all_answers_truncated")
            continue
        chosen, chosen_score = max(whole, key=lambda item: (item[1], item[0].turn))
        rejected, rejected_score = min(scored, key=lambda item: (item[1], item[0].turn))
        pair = Pair(chain, chosen, rejected, chosen_score, rejected_score)
        selected.append(drop_reason(pair, config) or pair)
        scored = [item for item in scored if item[0].text not in (chosen.text, rejected.text)]
    return selected


def neighbors(chain: Chain, scores: list[float | None], config: PairsConfig) -> list[tuple[Pair, str]]:
    """
    What each answer teaches as a draft (our choice). If the next answer scores higher, it is chosen and the draft rejected. If it
    scores lower, the draft is chosen and the next answer rejected. Otherwise a draft that no answer of the chain beats is chosen, and
    the chain's worst answer rejected. What would be dropped as a pair is left out, and so are repeated texts.

    Returns:
        `list[tuple[Pair, str]]`: two answers, and which of them is the draft, `"rejected"` or `"chosen"`.
    """
    scored = [(answer, score) for answer, score in zip(chain.answers, scores, strict=True) if score is not None]
    if not scored:
        return []
    best = max(score for _, score in scored)
    worst = min(scored, key=lambda item: (item[1], item[0].turn))
    by_turn = {answer.turn: (answer, score) for answer, score in scored}
    found = {}
    for answer, score in scored:
        # After an answer without a score, the next one does not refine this draft
        following, following_score = by_turn.get(answer.turn + 1, (None, score))
        if following_score > score:
            pair, draft = Pair(chain, following, answer, following_score, score), "rejected"
        elif following_score < score:
            pair, draft = Pair(chain, answer, following, score, following_score), "chosen"
        elif score == best:
            pair, draft = Pair(chain, answer, worst[0], score, worst[1]), "chosen"
        else:
            continue
        if pair.chosen.finish_reason == "stop" and drop_reason(pair, config) is None:
            found.setdefault((draft, pair.chosen.text, pair.rejected.text), (pair, draft))
    return list(found.values())


def drop_reason(pair: Pair, config: PairsConfig) -> str | None:
    """Why a best-over-worst pair is dropped; `None` if it is kept."""
    if pair.chosen_score - pair.rejected_score <= config.min_margin:
        return "no_margin"
    if pair.chosen.text == pair.rejected.text:
        return "identical_answers"
    if not pair.chosen.text.strip():
        return "empty_answer"
    if config.min_chosen_score is not None and pair.chosen_score < config.min_chosen_score:
        return "chosen_score_too_low"
    if config.max_rejected_score is not None and pair.rejected_score > config.max_rejected_score:
        return "rejected_score_too_high"
    return contrast_drop_reason(pair, config)


def contrast_drop_reason(pair: Pair, config: PairsConfig) -> str | None:
    """
    Whether the chosen answer is much longer than the rejected one, or too much like it. A much shorter one stays, since it teaches not to
    ramble.
    """
    # A product rather than a ratio: an answer may have no tokens
    if config.max_length_ratio is not None and pair.chosen.tokens > config.max_length_ratio * pair.rejected.tokens:
        return "chosen_too_long"
    if config.max_similarity is not None and similarity(pair.chosen.text, pair.rejected.text) > config.max_similarity:
        return "too_similar"
    return None


def rule_based(chain: Chain, scores: list[float | None], config: PairsConfig) -> list[Pair | str]:
    """
    Selection without a reward model. The paper does not spell out its rule. Our choice: if the chain has settled (its last answers agree,
    `pairs.agreement` of them), the last refinement is chosen and the draft rejected, unless these agree too. Scores take no part; the guard
    reads them.

    Returns:
        `list[Pair | str]`: one entry, the pair or the reason why there is none.
    """
    if len(chain.answers) < 2:
        return [chain.stopped or "fewer_than_two_answers"]
    draft, last = chain.answers[0], chain.answers[-1]
    if last.finish_reason != "stop":
        return ["last_answer_truncated"]
    if chain.stopped is not None:
        return [chain.stopped]
    # A draft and one refinement have nothing to settle
    if len(chain.answers) > 2 and not all(agree(a, last, config) for a in chain.answers[-config.agreement : -1]):
        return ["not_settled"]
    if last.text == draft.text:
        return ["identical_answers"]
    if not last.text.strip():
        return ["empty_answer"]
    if config.agreement_pattern is not None and agree(draft, last, config):
        return ["draft_agrees"]
    pair = Pair(chain, last, draft, scores[-1], scores[0])
    return [contrast_drop_reason(pair, config) or pair]


def agree(answer: Answer, other: Answer, config: PairsConfig | SettledConfig) -> bool:
    """Whether two answers say the same: by their texts' similarity, or by what `pairs.agreement_pattern` finds in them."""
    if config.agreement_pattern is None:
        return similarity(answer.text, other.text) >= config.settled_similarity
    found = part(answer.text, config.agreement_pattern)
    return found is not None and found == part(other.text, config.agreement_pattern)


def part(text: str, pattern: str) -> str | None:
    """What a pattern's group finds in a text, without white space around it; `None` if that is nothing."""
    slow = (
        f"`pairs.agreement_pattern` took more than {LONGEST_SECONDS:g} seconds on a text of {len(text):,} characters. Write it without "
        "repetitions inside repetitions."
    )
    with time_limit(LONGEST_SECONDS, slow):
        match = re.search(pattern, text)
    return (match.group(1) or "").strip() or None if match else None


def similarity(text: str, other: str) -> float:
    """
    Similarity of two texts in [0, 1]: difflib's ratio over their words. In long texts, no match begins with a word that is more than 1 % of
    the text: a policy that has broken down may repeat two words until `max_tokens`.
    """
    texts = text.split(), other.split()
    return SequenceMatcher(None, *texts, autojunk=max(map(len, texts)) > EXACT_WORDS).ratio()


def rule_evidence(chains: int, dropped: dict[str, int]) -> dict[str, Any]:
    """
    What the rule itself says about refining, from the counts of a rule-based round.

    Returns:
        `dict`: `whole`, chains without a fault; `settled`, the share of these whose last answers agree; `changed`, the share of the settled ones
        whose last answer is another than the draft. `None` without such chains.

    Example:

    ```python
    >>> rule_evidence(10, {"prompt_too_long": 2, "not_settled": 4, "identical_answers": 3})
    {'whole': 8, 'settled': 0.5, 'changed': 0.25}
    ```
    """
    whole = chains - sum(count for reason, count in dropped.items() if reason in FAULTS)
    settled = whole - dropped.get("not_settled", 0)
    changed = settled - dropped.get("identical_answers", 0) - dropped.get("draft_agrees", 0)
    return {
        "whole": whole,
        "settled": settled / whole if whole else None,
        "changed": changed / settled if settled else None,
    }


SELECTIONS = {"best_over_worst": best_over_worst, "rule_based": rule_based}


class Selection:
    """
    Iterates over the pairs of all chains, up to `pairs_per_prompt` each, and counts those that could not be made.

    Args:
        scored (iterable of `tuple[Chain, list[float | None]]`):
            Chains with the scores of their answers.
        config ([`~aries.config.PairsConfig`]):
            The recipe's section.

    Attributes:
        chains (`int`), pairs (`int`), dropped (`dict[str, int]`):
            Counts so far, the last one by reason. Pairs and drops add up to `pairs_per_prompt` for each chain.
    """

    def __init__(self, scored: Iterable[tuple[Chain, list[float | None]]], config: PairsConfig):
        self._scored = scored
        self._config = config
        self._dropped: Counter[str] = Counter()
        self.chains = self.pairs = 0

    @property
    def dropped(self) -> dict[str, int]:
        return dict(sorted(self._dropped.items()))

    def __iter__(self) -> Iterator[Pair]:
        select = SELECTIONS[self._config.selection]
        for chain, scores in self._scored:
            self.chains += 1
            found = neighbors(chain, scores, self._config) if self._config.refinement_rows != "pair" else []
            for selected in select(chain, scores, self._config):
                if isinstance(selected, Pair):
                    self.pairs += 1
                    selected.neighbors, found = found, []
                    yield selected
                else:
                    self._dropped[selected] += 1


def select_pairs(
    chains: list[Chain], scores: list[list[float | None]], config: PairsConfig
) -> tuple[list[Pair], dict[str, int]]:
    """All pairs of a [`Selection`], and what it dropped."""
    selection = Selection(zip(chains, scores, strict=True), config)
    return list(selection), selection.dropped


def learned_text(answer: Answer, learn: str) -> str:
    """What a training row takes from an answer: its text, or with `learn="full_text"` all that was generated."""
    return answer.full_text if learn == "full_text" and answer.full_text is not None else answer.text


def preference_rows(pair: Pair, template: Template, config: PairsConfig) -> list[dict[str, Any]]:
    """
    The rows of a pair in a TRL preference dataset.

    Returns:
        `list[dict]`: rows with `prompt`, `chosen`, `rejected`; `turn` (0 for direct answering, 1 for refining), `draft`
        (which answer is refined: "rejected", "chosen", or `None`), `weight` (how often an epoch shows the row), and
        where they come from: `prompt_id`, `chosen_turn`, `rejected_turn`, `chosen_score`, `rejected_score`.
    """
    rows = []
    if config.direct_weight:
        rows.append(preference_row(pair, None, template, config))
    if config.refinement_weight:
        refined = [] if config.refinement_rows == "neighbors" else [(pair, "rejected"), (pair, "chosen")]
        known = (pair.chosen.text, pair.rejected.text) if refined else None
        refined += [(two, draft) for two, draft in pair.neighbors if (two.chosen.text, two.rejected.text) != known]
        rows += [
            preference_row(two, draft, template, config) for two, draft in refined if config.drafts in ("both", draft)
        ]
    return rows


def preference_row(pair: Pair, draft: str | None, template: Template, config: PairsConfig) -> dict[str, Any]:
    """The row of a pair that asks to refine its `draft`, or to answer directly."""
    prompt = pair.chain.prompt
    asked = prompt if draft is None else refinement_prompt(prompt, [getattr(pair, draft).text], template)
    return {
        "prompt": asked,
        "chosen": as_completion(prompt, learned_text(pair.chosen, config.learn)),
        "rejected": as_completion(prompt, learned_text(pair.rejected, config.learn)),
        "turn": 0 if draft is None else 1,
        "draft": draft,
        "weight": config.direct_weight if draft is None else config.refinement_weight,
        "prompt_id": pair.chain.prompt_id,
        "chosen_turn": pair.chosen.turn,
        "rejected_turn": pair.rejected.turn,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
    }
