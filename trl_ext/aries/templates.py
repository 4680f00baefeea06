"""
The templates z of refinements, and what a recipe's own may say.

They are Jinja2. The paper's templates are not available to us: these are [house]. `question` is the last user message (or
the whole plain-text prompt), `draft` the answer to improve, `drafts` all answers so far, oldest first, `critique` what the
policy said of the draft (empty in training rows, and where nobody judged), `turn` the turn of the answer asked for.
"""

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables


VARIABLES = ("question", "draft", "drafts", "critique", "turn")

REFINEMENT_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

Write a better answer to the question: keep what is right in the draft, correct what is wrong, and add what is missing. \
Reply with the improved answer only."""

FEW_SHOT_TEMPLATE = """\
{{ question }}

Here are attempts at an answer, the latest last:

{% for draft in drafts %}Attempt {{ loop.index }}:

{{ draft }}

{% endfor %}Write a better answer to the question: keep what is right in the attempts, correct what is wrong, and add what \
is missing. Reply with the improved answer only."""

# Without a critique, the refinement template as it is
SELF_EVALUATION_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

{% if critique %}Here is an assessment of the draft:

{{ critique }}

{% endif %}Write a better answer to the question: keep what is right in the draft, correct what is wrong, and add what is \
missing. Reply with the improved answer only."""

EVALUATION_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

Assess the draft: say what is right in it, what is wrong, and what is missing. Do not write a new answer."""

# Of each strategy. Parallel sampling asks for no refinements, but its training rows do
TEMPLATES = {
    "chain": REFINEMENT_TEMPLATE,
    "parallel": REFINEMENT_TEMPLATE,
    "few_shot": FEW_SHOT_TEMPLATE,
    "self_evaluation": SELF_EVALUATION_TEMPLATE,
}


def check_refinement_template(key: str, template: str, strategy: str) -> None:
    """
    Raises:
        [`ValueError`]: the template does not hold what the strategy puts in it.
    """
    variables = template_variables(key, template)
    if strategy == "few_shot" and "drafts" not in variables:
        raise ValueError(
            f"`{key}` never mentions `drafts`, and `refinements.strategy: few_shot` shows all earlier answers. Write "
            "{% for draft in drafts %}{{ draft }}{% endfor %} where they go, or set `refinements.strategy: chain`."
        )
    if not variables & {"draft", "drafts"}:
        raise ValueError(
            f"`{key}` never mentions `draft`, so there is nothing to refine. Write {{{{ draft }}}} where the draft goes."
        )
    if strategy == "self_evaluation" and "critique" not in variables:
        raise ValueError(
            f"`{key}` never mentions `critique`, so judging the draft would change nothing. Write {{% if critique %}}"
            "{{ critique }}{% endif %} where the critique goes, or set `refinements.strategy: chain`."
        )
    if strategy != "self_evaluation" and "critique" in variables:
        raise ValueError(
            f"`{key}` mentions `critique`, and `refinements.strategy: {strategy}` has none. Remove it, or set "
            "`refinements.strategy: self_evaluation`."
        )


def check_evaluation_template(key: str, template: str) -> None:
    """
    Raises:
        [`ValueError`]: the template does not show the draft, or asks for a critique that is yet to be written.
    """
    variables = template_variables(key, template)
    if not variables & {"draft", "drafts"}:
        raise ValueError(
            f"`{key}` never mentions `draft`, so there is nothing to judge. Write {{{{ draft }}}} where the draft goes."
        )
    if "critique" in variables:
        raise ValueError(f"`{key}` mentions `critique`, which is what it asks for. Remove it.")


def template_variables(key: str, template: str) -> set[str]:
    """
    The variables that a template uses.

    Raises:
        [`ValueError`]: it is not valid Jinja2, or uses one it is not given.
    """
    environment = Environment()
    try:
        variables = find_undeclared_variables(environment.parse(template))
    except Exception as error:  # the user's code: besides its own errors Jinja2 has those of Python's compiler
        raise ValueError(f"`{key}` is not valid Jinja2: {error}.") from error
    unknown = sorted(variables - set(VARIABLES) - environment.globals.keys())
    if unknown:
        raise ValueError(
            f"`{key}` uses {', '.join(f'`{name}`' for name in unknown)}, and its variables are "
            f"{', '.join(f'`{name}`' for name in VARIABLES)}."
        )
    return variables
