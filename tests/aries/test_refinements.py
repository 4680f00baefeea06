import pytest

from trl_ext.aries.config import REFINEMENT_TEMPLATE
from trl_ext.aries.records import Answer, Chain
from trl_ext.aries.refinements import compile_template, next_prompt, refinement_prompt
from trl_ext.recipe import RecipeError


TEMPLATE = compile_template("{{ question }} Draft : {{ draft }} .")


def test_plain_text():
    assert refinement_prompt("Sort : 3 1", ["3 1"], TEMPLATE) == "Sort : 3 1 Draft : 3 1 ."


def test_messages_keep_their_history_and_only_the_last_user_message_changes():
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Sort : 3 1"},
    ]
    prompt = refinement_prompt(history, ["3 1"], TEMPLATE)
    assert prompt[:3] == history[:3]
    assert prompt[3] == {"role": "user", "content": "Sort : 3 1 Draft : 3 1 ."}
    assert history[3]["content"] == "Sort : 3 1"  # the chain's own prompt is untouched


def test_a_chain_asks_the_question_first_and_then_shows_only_its_last_answer():
    """The paper's chain of self-refinement: y_{k+1} ~ π(·|x, y_k, z)."""
    chain = Chain("a", "x")
    assert next_prompt(chain, TEMPLATE) == "x"
    chain.answers.append(Answer(1, "y1", 1, "stop"))
    assert next_prompt(chain, TEMPLATE) == "x Draft : y1 ."
    chain.answers.append(Answer(2, "y2", 1, "stop"))
    assert next_prompt(chain, TEMPLATE) == "x Draft : y2 ."


def test_all_drafts_are_there_for_templates_that_want_them():
    template = compile_template("{% for d in drafts %}{{ loop.index }}={{ d }};{% endfor %}{{ draft }}")
    assert refinement_prompt("x", ["a", "b"], template) == "1=a;2=b;b"


def test_generated_text_is_data_not_template():
    assert refinement_prompt("{{ 7 * 7 }}", ["{% raw %}<b>"], TEMPLATE) == "{{ 7 * 7 }} Draft : {% raw %}<b> ."


def test_the_default_template_holds_question_and_draft():
    prompt = refinement_prompt("QUESTION", ["DRAFT"], compile_template(REFINEMENT_TEMPLATE))
    assert "QUESTION" in prompt and "DRAFT" in prompt


@pytest.mark.parametrize("template", ["{{ draft", "{{ darft }}", "{{ draft.__class__.__mro__ }}", "{% include 'x' %}"])
def test_bad_templates_are_refused_by_name(template):
    with pytest.raises(RecipeError, match=r"refinements\.template.*question.*draft"):
        compile_template(template)
