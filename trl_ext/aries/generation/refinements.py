"""
Refinements: what the next request of a chain is, and what its text adds to the chain. Nothing here generates.

The paper's best strategy is the chain, `y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context; its three others
are here to compare with.
"""

import re
from dataclasses import dataclass

from ..config import RefinementsConfig
from ..data.records import Answer, Chain, Prompt
from ..data.templates import LONGEST_SECONDS, compile_template, refinement_prompt
from ..data.time_limit import time_limit


@dataclass
class Request:
    """What a chain asks for next."""

    prompt: Prompt
    turn: int  # of the answer it asks for, or, for a critique, of the refinement the critique is for
    is_critique: bool = False


class Strategy:
    """
    The requests of a chain, one at a time: also parallel samples are asked for one after the other. Other chains fill the
    engine meanwhile, and a later sample finds its prompt in the prefix cache.

    Args:
        config ([`RefinementsConfig`]):
            The recipe's section.
        answer_pattern (`str`, *optional*):
            `generation.answer_pattern`: finds the answer in a generated text.
        learn (`str`, *optional*, defaults to `"answer"`):
            `pairs.learn`: which of the two must be whole.
    """

    def __init__(self, config: RefinementsConfig, answer_pattern: str | None = None, learn: str = "answer"):
        self.name = config.strategy
        self.turns = config.turns
        if isinstance(config.template, str):
            self.templates = [compile_template(config.template)] * (config.turns - 1)
        else:
            self.templates = [
                compile_template(template, f"refinements.template[{index}]", turn=index + 2)
                for index, template in enumerate(config.template)
            ]
        if self.name == "self_evaluation":
            self.evaluation_template = compile_template(config.evaluation_template, "refinements.evaluation_template")
        self.answer_pattern = None if answer_pattern is None else re.compile(answer_pattern)
        self.learns_answer = learn == "answer"

    def next_request(self, chain: Chain) -> Request | None:
        """The question itself, then what the strategy makes of the answers so far; `None` when the chain is finished."""
        turn = len(chain.answers) + len(chain.unanswered) + 1
        if turn > self.turns:
            return None
        if self.name == "parallel":  # whatever became of the other samples
            return Request(chain.prompt, turn)
        if chain.stopped is not None:
            return None
        if turn == 1:
            return Request(chain.prompt, turn)
        drafts = [answer.text for answer in chain.answers]
        critique = chain.answers[-1].critique
        if self.name == "self_evaluation" and critique is None:
            prompt = refinement_prompt(chain.prompt, drafts, self.evaluation_template)
            return Request(prompt, turn, is_critique=True)
        return Request(refinement_prompt(chain.prompt, drafts, self.templates[turn - 2], critique or ""), turn)

    def give_up(self, chain: Chain, request: Request) -> None:
        """Leave out the answer to a request that no engine could answer, and what would come after it."""
        chain.unanswered.append(Answer(request.turn, "", 0, "error"))
        chain.stopped = "request_failed"

    def add(self, chain: Chain, request: Request, text: str, tokens: int, finish_reason: str) -> None:
        """Add what was generated for a request to its chain: an answer, a critique, or a text without an answer."""
        found, is_whole = find_answer(text, self.answer_pattern)
        if request.is_critique:  # all of it if the pattern finds no answer in it; our choice
            chain.answers[-1].critique = (found or text).strip()
            return
        full_text = None if self.answer_pattern is None else text
        if found is None:
            chain.unanswered.append(Answer(request.turn, "", tokens, finish_reason, full_text))
            chain.stopped = "no_answer_found"
            return
        if is_whole and self.learns_answer:
            finish_reason = "stop"
        # Plain-text prompts are continued: the space before the first word belongs to the answer
        found = found if isinstance(chain.prompt, str) else found.strip()
        chain.answers.append(Answer(len(chain.answers) + 1, found, tokens, finish_reason, full_text))


def find_answer(text: str, pattern: re.Pattern | None) -> tuple[str | None, bool]:
    """
    The answer in a generated text: all of it without a pattern, else the group of the first match; `None` if there is no
    match, or nothing in it. And whether it is certainly complete: if the text goes on after it, it does not matter that the text
    itself was cut off.

    Raises:
        [`RecipeError`]: the search takes too long.

    Example:

    ```python
    >>> find_answer("<think>3 is more</think> 1 3", re.compile(r"(?s)</think>\\s*(.*)"))
    ('1 3', False)
    >>> find_answer("So it is #### 13. The ques", re.compile(r"#### (\\d+)"))
    ('13', True)
    ```
    """
    if pattern is None:
        return text, False
    slow = (
        f"`generation.answer_pattern` took more than {LONGEST_SECONDS:g} seconds on a text of {len(text):,} characters, so it "
        "tries the same characters again and again: write no repetition of a repetition, such as `(?:a+)+`."
    )
    with time_limit(LONGEST_SECONDS, slow):
        match = pattern.search(text)
    if not match or not match[1] or not match[1].strip():
        return None, False
    rest = text[match.end(1) :]
    # The end of a line may end the answer; after any other space, the text may just have been cut off
    return match[1], bool(rest.strip()) or (match.end() > match.end(1) and "\n" in rest)
