"""
Templates of refinements: a prompt and its draft in, the prompt that asks for a better answer out.
"""

from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...recipe import RecipeError
from .records import Prompt
from .time_limit import time_limit


# Limit for one search with an answer pattern, and for trying out a template; our choice. Both take microseconds
LONGEST_SECONDS = 10.0


def compile_template(template: str, key: str = "refinements.template", turn: int = 2) -> Template:
    """
    Args:
        template (`str`):
            Jinja2.
        key (`str`, *optional*, defaults to `"refinements.template"`):
            Its key in the recipe, for error messages.
        turn (`int`, *optional*, defaults to `2`):
            The first turn it is used for. It is tried out with as many drafts as there are then.

    Raises:
        [`RecipeError`]: the template is not valid Jinja2, fails, or uses a variable that does not exist.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, loader=BaseLoader())
    try:
        compiled = environment.from_string(template)
    except Exception as error:  # the user's code: whatever it raises is reported with its place
        raise _template_error(key, error) from error
    compiled.name = key
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
            Plain text, or messages: the last one is the question, and the others stay.
        drafts (`list[str]`):
            The answers so far, oldest first.
        template ([`jinja2.Template`]):
            From [`compile_template`].
        critique (`str`, *optional*, defaults to `""`):
            What the policy said about the last draft. Training rows have none.
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
