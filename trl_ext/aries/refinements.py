"""
Refinements: what the next request of a chain is. `y_{k+1} ~ π(·|x, y_k, z)`, with only the last answer in context.
"""

from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..recipe import RecipeError
from .records import Chain, Prompt


def compile_template(template: str) -> Template:
    """
    Raises:
        [`RecipeError`]: the template is not valid Jinja2, or uses a variable it is not given.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, loader=BaseLoader())
    try:
        compiled = environment.from_string(template)
        compiled.render(question="question", draft="draft", drafts=["draft"])
    except Exception as error:  # the user's code: whatever it raises is reported with its place
        raise RecipeError(
            f"`refinements.template`: {type(error).__name__}: {error}. It is Jinja2 with the variables `question`, `draft` and `drafts`."
        ) from error
    return compiled


def refinement_prompt(prompt: Prompt, drafts: list[str], template: Template) -> Prompt:
    """
    The prompt that asks for a better answer: the template z around the question x and its last draft.

    Args:
        prompt (`str` or `list[dict]`):
            Plain text, or messages; of messages, the last user message is the question and the others stay.
        drafts (`list[str]`):
            The answers so far, oldest first.
        template ([`jinja2.Template`]):
            From [`compile_template`].

    Example:

    ```python
    >>> refinement_prompt("Sort : 3 1", ["3 1"], compile_template("{{ question }} Draft : {{ draft }}"))
    'Sort : 3 1 Draft : 3 1'
    ```
    """
    if isinstance(prompt, str):
        return template.render(question=prompt, draft=drafts[-1], drafts=drafts)
    question = prompt[-1]["content"]
    request = {**prompt[-1], "content": template.render(question=question, draft=drafts[-1], drafts=drafts)}
    return [*prompt[:-1], request]


def next_prompt(chain: Chain, template: Template) -> Prompt:
    """The prompt of the chain's next request: the question itself, then a refinement of the last answer."""
    if not chain.answers:
        return chain.prompt
    return refinement_prompt(chain.prompt, [answer.text for answer in chain.answers], template)
