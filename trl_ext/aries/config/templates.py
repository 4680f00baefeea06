"""
The Jinja2 templates of a run: ours, and what a recipe's own must hold.

The templates z of refinements are given `question` (the last user message, or the whole plain-text prompt), `draft` (the answer to
improve), `drafts` (all answers so far, oldest first), `critique` (what the policy said about the draft; empty in training rows and without a
critique) and `turn` (the turn of the answer asked for).

The paper's templates are not available to us. Sherlock (https://huggingface.co/papers/2505.22651), which modifies the paper's, has the question
and an example response in its template, and asks for a more helpful response: clearer, more accurate, soundly and step by step reasoned, and to
the point, by refining the example or by writing a new one. Ours say the same in our own words. The templates of the other strategies, and
the request to reply with the answer only, are our choice.
"""

import hashlib

from jinja2 import Environment
from jinja2.meta import find_undeclared_variables


VARIABLES = ("question", "draft", "drafts", "critique", "turn")

DRAFTED = """\
Below are a question and a draft of an answer to it. Write a more helpful answer than the draft: clearer, more accurate, and \
soundly reasoned. Work through the question step by step, and leave out what has nothing to do with it.

Question:

{{ question }}

Draft:

{{ draft }}

"""
ENDING = "If the draft is good enough to build on, improve it; if it is not, write a new answer. Reply with your answer only."

REFINEMENT_TEMPLATE = DRAFTED + ENDING

FEW_SHOT_TEMPLATE = """\
Below are a question and attempts at an answer to it, the latest last. Write a more helpful answer than the attempts: clearer, \
more accurate, and soundly reasoned. Work through the question step by step, and leave out what has nothing to do with it.

Question:

{{ question }}

{% for draft in drafts %}Attempt {{ loop.index }}:

{{ draft }}

{% endfor %}If one of the attempts is good enough to build on, improve it; if none is, write a new answer. Reply with your answer \
only."""

# The same as the refinement template if there is no critique
CRITICIZED = """\
{% if critique %}An assessment of the draft:

{{ critique }}

{% endif %}"""
SELF_EVALUATION_TEMPLATE = DRAFTED + CRITICIZED + ENDING

EVALUATION_TEMPLATE = """\
{{ question }}

Here is a draft of an answer:

{{ draft }}

Assess the draft: say what is right in it, what is wrong, and what is missing. Do not write a new answer."""

# Each strategy's own. Parallel sampling asks for no refinements, but its training rows do
TEMPLATES = {
    "chain": REFINEMENT_TEMPLATE,
    "parallel": REFINEMENT_TEMPLATE,
    "few_shot": FEW_SHOT_TEMPLATE,
    "self_evaluation": SELF_EVALUATION_TEMPLATE,
}

# The beginnings of the SHA-256 of what [`TEMPLATES`] had before: a run that was begun with one of them keeps it
EARLIER_DEFAULTS = ("d243b610e56b469d", "939df58a38e016ab", "fbf0c02e2121b8ac")

# After the pairwise prompt of MT-Bench (https://huggingface.co/papers/2306.05685)
JUDGE_TEMPLATE = """\
Compare two answers to the last message of a conversation. Judge how correct, helpful and complete they are. Neither their \
order nor their length may count.

[Conversation]
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
[Answer A]
{{ answer_a }}

[Answer B]
{{ answer_b }}

Explain your judgement in a few sentences. Then end with the verdict alone: [[A]] if answer A is better, [[B]] if answer B is \
better, [[C]] for a tie."""


def was_default(template: str) -> bool:
    """Whether an earlier version had this as a default template."""
    return hashlib.sha256(template.encode("utf-8")).hexdigest()[:16] in EARLIER_DEFAULTS


def check_refinement_template(name: str, template: str, strategy: str) -> None:
    """
    Raises:
        [`ValueError`]: the template, a recipe's key `name`, does not hold what the strategy puts in it.
    """
    variables = template_variables(name, template)
    if strategy == "few_shot" and "drafts" not in variables:
        raise ValueError(
            f"`{name}` never mentions `drafts`, and `refinements.strategy: few_shot` shows all earlier answers. Write "
            "{% for draft in drafts %}{{ draft }}{% endfor %} where they go, or set `refinements.strategy: chain`."
        )
    if not variables & {"draft", "drafts"}:
        raise ValueError(
            f"`{name}` never mentions `draft`, so there is nothing to refine. Write {{{{ draft }}}} where the draft goes."
        )
    if strategy == "self_evaluation" and "critique" not in variables:
        raise ValueError(
            f"`{name}` never mentions `critique`, so judging the draft would change nothing. Write {{% if critique %}}"
            "{{ critique }}{% endif %} where the critique goes, or set `refinements.strategy: chain`."
        )
    if strategy != "self_evaluation" and "critique" in variables:
        raise ValueError(
            f"`{name}` mentions `critique`, and `refinements.strategy: {strategy}` has none. Remove it, or set "
            "`refinements.strategy: self_evaluation`."
        )


def check_evaluation_template(name: str, template: str) -> None:
    """
    Raises:
        [`ValueError`]: the template does not show the draft, or asks for the critique that it is to produce.
    """
    variables = template_variables(name, template)
    if not variables & {"draft", "drafts"}:
        raise ValueError(
            f"`{name}` never mentions `draft`, so there is nothing to judge. Write {{{{ draft }}}} where the draft goes."
        )
    if "critique" in variables:
        raise ValueError(f"`{name}` mentions `critique`, which is what it asks for. Remove it.")


def check_judge_template(template: str) -> str:
    """
    Raises:
        [`ValueError`]: the template does not show both answers. It may use any column of the prompts.
    """
    missing = {"answer_a", "answer_b"} - parse(template)
    if missing:
        raise ValueError(
            f"never mentions {' and '.join(f'`{name}`' for name in sorted(missing))}. Write {{{{ answer_a }}}} and "
            "{{ answer_b }} where the answers go."
        )
    return template


def template_variables(name: str, template: str) -> set[str]:
    """
    The variables that a template of a refinement uses.

    Raises:
        [`ValueError`]: it is not valid Jinja2, or uses one it is not given.
    """
    try:
        variables = parse(template)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from error
    unknown = sorted(variables - set(VARIABLES) - Environment().globals.keys())
    if unknown:
        raise ValueError(
            f"`{name}` uses {', '.join(f'`{variable}`' for variable in unknown)}, and its variables are "
            f"{', '.join(f'`{variable}`' for variable in VARIABLES)}."
        )
    return variables


def parse(template: str) -> set[str]:
    """The names that a template does not define itself."""
    environment = Environment()
    try:
        environment.from_string(template)  # an unknown filter shows here
        return find_undeclared_variables(environment.parse(template))
    except Exception as error:  # the user's code: Jinja2 passes on the errors of Python's compiler
        raise ValueError(f"is not valid Jinja2: {str(error).rstrip('.')}.") from error
