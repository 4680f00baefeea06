"""
Refinements: what the next request of a chain is, and what its text adds to the chain. Nothing here generates.

The paper's best strategy is the chain, `y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context; its three others
are here to compare with.
"""

import re
from dataclasses import dataclass

from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..recipe import RecipeError
from .config import RefinementsConfig
from .records import Answer, Chain, Prompt
from .time_limit import time_limit


# For an answer pattern on one text, and for the try-out of a template; both take microseconds. [house]
LONGEST_SECONDS = 10.0


def compile_template(template: str, key: str = "refinements.template", turn: int = 2) -> Template:
    """
    Args:
        template (`str`):
            Jinja2.
        key (`str`, *optional*, defaults to `"refinements.template"`):
            Its key in the recipe, for error messages.
        turn (`int`, *optional*, defaults to `2`):
            The first turn it is used for: with as many drafts as there are then, it is tried out.

    Raises:
        [`RecipeError`]: the template is not valid Jinja2, or uses a variable it is not given.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, loader=BaseLoader())
    try:
        compiled = environment.from_string(template)
    except Exception as error:  # the user's code: whatever it raises is reported with its place
        raise _template_error(key, error) from error
    compiled.name = key
    # Every rendering copies them: of Jinja's `ChainMap`, that takes as long as the rest of it
    compiled.globals = dict(compiled.globals)
    with time_limit(LONGEST_SECONDS, f"`{key}` takes more than {LONGEST_SECONDS:g} seconds to render."):
        for critique in ("critique", ""):  # training rows have none
            refinement_prompt("question", ["draft"] * (turn - 1), compiled, critique)
    return compiled


def _template_error(key: str | None, error: Exception) -> RecipeError:
    return RecipeError(
        f"`{key}`: {type(error).__name__}: {error}. It is Jinja2 with the variables `question`, `draft`, `drafts`, `critique` "
        "and `turn`."
    )


def refinement_prompt(
    prompt: Prompt, drafts: list[str], template: Template, critique: str = "", turn: int | None = None
) -> Prompt:
    """
    The prompt that asks for a better answer: the template z around the question x and its last draft.

    Args:
        prompt (`str` or `list[dict]`):
            Plain text, or messages; of messages, the last user message is the question and the others stay.
        drafts (`list[str]`):
            The answers so far, oldest first.
        template ([`jinja2.Template`]):
            From [`compile_template`].
        critique (`str`, *optional*, defaults to `""`):
            What the policy said of the last draft. Training rows have none.
        turn (`int`, *optional*):
            Turn of the answer asked for. Default: the one after these drafts.

    Raises:
        [`RecipeError`]: the template fails on these texts.

    Example:

    ```python
    >>> refinement_prompt("Sort : 3 1", ["3 1"], compile_template("{{ question }} Draft : {{ draft }}"))
    'Sort : 3 1 Draft : 3 1'
    ```
    """
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    try:
        content = template.render(
            question=question, draft=drafts[-1], drafts=drafts, critique=critique, turn=turn or len(drafts) + 1
        )
    except RecipeError:  # the time is up
        raise
    except Exception as error:  # the user's code, with texts that it was not tried on
        raise _template_error(template.name, error) from error
    return content if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": content}]


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
        if request.is_critique:  # [house]: all of it, where it does not have the form of an answer
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
    match, or nothing in it. And whether it is whole for sure, since the text goes on behind it: then it does not matter that the text
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
    # A pattern may take a line's end for the answer's; other space behind it may be as far as the text came
    return match[1], bool(rest.strip()) or (match.end() > match.end(1) and "\n" in rest)
