"""
What each strategy asks for next, by hand: an engine that answers from a script writes down every prompt it is given.
"""

import re
import signal

import pytest

from trl_ext.aries.config import RefinementsConfig
from trl_ext.aries.config.templates import (
    EVALUATION_TEMPLATE,
    FEW_SHOT_TEMPLATE,
    REFINEMENT_TEMPLATE,
    SELF_EVALUATION_TEMPLATE,
    TEMPLATES,
    was_default,
)
from trl_ext.aries.data import templates
from trl_ext.aries.data.records import Chain
from trl_ext.aries.data.templates import compile_template, refinement_prompt
from trl_ext.aries.generation import refinements
from trl_ext.aries.generation.chains import run_chains
from trl_ext.aries.generation.refinements import Strategy, find_answer
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


def test_all_drafts_are_there_for_templates_that_want_them():
    template = compile_template("{% for d in drafts %}{{ loop.index }}={{ d }};{% endfor %}{{ draft }}")
    assert refinement_prompt("x", ["a", "b"], template) == "1=a;2=b;b"


def test_generated_text_is_data_not_template():
    assert refinement_prompt("{{ 7 * 7 }}", ["{% raw %}<b>"], TEMPLATE) == "{{ 7 * 7 }} Draft : {% raw %}<b> ."


def test_a_pattern_that_does_not_end_is_stopped_with_the_way_out(monkeypatch):
    """2^40 ways to split forty letters among the two repetitions: years, on the first answer that does not end in `b`."""
    with monkeypatch.context() as impatient:
        impatient.setattr(refinements, "LONGEST_SECONDS", 0.2)
        with pytest.raises(
            RecipeError, match="`generation.answer_pattern` took more than 0.2 seconds on a text of 41 char.*write no"
        ):
            find_answer("a" * 40 + "c", re.compile("((?:a+)+)b"))
    assert find_answer("a" * 40 + "b", re.compile("((?:a+)+)b"))[0] == "a" * 40, "the next one is not stopped"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "LONGEST_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ draft }}"
    with pytest.raises(RecipeError, match="`refinements.template` takes more than 0.2 seconds to render"):
        compile_template(endless)


def test_a_template_that_fails_on_a_draft_is_named():
    template = compile_template("{{ draft[0] }}", key="refinements.template[1]")
    with pytest.raises(
        RecipeError, match=r"`refinements.template\[1\]`: UndefinedError: .*It is Jinja2 with the variables"
    ):
        refinement_prompt("x", [""], template)


@pytest.mark.parametrize(
    "attack", ["{{ draft.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"]
)
def test_a_template_reaches_no_internals_and_no_files(attack):
    with pytest.raises(RecipeError, match="`refinements.template`: (SecurityError|TemplateNotFound)"):
        compile_template(attack + "{{ draft }}")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), EVALUATION_TEMPLATE])
def test_the_default_templates_hold_question_and_draft(template):
    prompt = refinement_prompt("QUESTION", ["DRAFT"], compile_template(template))
    assert "QUESTION" in prompt and "DRAFT" in prompt
    assert not was_default(template), "it is the default"


def test_the_default_templates_hold_what_their_strategy_adds():
    prompt = refinement_prompt("x", ["FIRST", "SECOND"], compile_template(FEW_SHOT_TEMPLATE))
    assert "Attempt 1:\n\nFIRST\n\nAttempt 2:\n\nSECOND\n\nIf one of" in prompt
    template = compile_template(SELF_EVALUATION_TEMPLATE)
    assert "the draft:\n\nTOO SHORT\n\nIf the draft" in refinement_prompt("x", ["a"], template, critique="TOO SHORT")
    # Training rows have no critique: what is left is the chain's template
    assert refinement_prompt("x", ["a"], template) == refinement_prompt(
        "x", ["a"], compile_template(REFINEMENT_TEMPLATE)
    )


@pytest.mark.parametrize("template", ["{{ draft", "{{ darft }}", "{{ draft.__class__.__mro__ }}", "{% include 'x' %}"])
def test_bad_templates_are_refused_by_name(template):
    with pytest.raises(RecipeError, match=r"refinements\.template.*question.*draft"):
        compile_template(template)


# The strategies


class ScriptedEngine:
    """Answers a chain's requests with texts from a list, one request per step, and writes down what was asked."""

    def __init__(self, strategy: Strategy, texts: list[str]):
        self.strategy = strategy
        self.texts = iter(texts)
        self.asked: list[tuple] = []  # prompt, turn, and whether it asked for a critique
        self.running: list[tuple] = []

    def submit(self, chain: Chain) -> bool:
        request = self.strategy.next_request(chain)
        if request is None:
            return False
        self.asked.append((request.prompt, request.turn, request.is_critique))
        self.running.append((chain, request))
        return True

    def step(self) -> list[Chain]:
        chain, request = self.running.pop(0)
        self.strategy.add(chain, request, next(self.texts), tokens=1, finish_reason="stop")
        return [chain]


def play(texts: list[str], prompt="x", answer_pattern: str | None = None, **config) -> tuple[list[tuple], Chain]:
    """What one chain asked for, and the chain."""
    engine = ScriptedEngine(Strategy(RefinementsConfig(**config), answer_pattern), texts)
    finished: list[Chain] = []
    run_chains(engine, [Chain("p", prompt)], 1, lambda chains: None, finished.append)
    [chain] = finished
    assert next(engine.texts, None) is None, "every text was asked for"
    return engine.asked, chain


def test_a_chain_asks_the_question_first_and_then_shows_only_its_last_answer():
    """The paper's chain of self-refinement: y_{k+1} ~ π(·|x, y_k, z)."""
    asked, chain = play(["y1", "y2", "y3"], turns=3, template="{{ question }} Draft : {{ draft }}")
    assert asked == [("x", 1, False), ("x Draft : y1", 2, False), ("x Draft : y2", 3, False)]
    assert [(a.turn, a.text) for a in chain.answers] == [(1, "y1"), (2, "y2"), (3, "y3")]


def test_parallel_samples_are_all_of_the_prompt():
    asked, chain = play(["y1", "y2", "y3"], strategy="parallel", turns=3)
    assert asked == [("x", 1, False), ("x", 2, False), ("x", 3, False)]
    assert [(a.turn, a.text) for a in chain.answers] == [(1, "y1"), (2, "y2"), (3, "y3")]


def test_few_shot_shows_all_earlier_answers():
    template = "{{ question }}{% for draft in drafts %} {{ loop.index }}={{ draft }}{% endfor %}"
    asked, _ = play(["y1", "y2", "y3"], strategy="few_shot", turns=3, template=template)
    assert asked == [("x", 1, False), ("x 1=y1", 2, False), ("x 1=y1 2=y2", 3, False)]


def test_self_evaluation_judges_its_last_answer_before_refining_it():
    asked, chain = play(
        ["y1", " c1\n", "y2", "", "y3"],
        strategy="self_evaluation",
        turns=3,
        template="{{ question }} {{ draft }} ({{ critique }}) {{ turn }}",
        evaluation_template="Judge {{ draft }} {{ turn }}",
    )
    assert asked == [
        ("x", 1, False),
        ("Judge y1 2", 2, True),
        ("x y1 (c1) 2", 2, False),
        ("Judge y2 3", 3, True),
        ("x y2 () 3", 3, False),  # an empty critique is one, and is not asked for again
    ]
    assert [(a.turn, a.text, a.critique) for a in chain.answers] == [(1, "y1", "c1"), (2, "y2", ""), (3, "y3", None)]


def test_a_template_for_each_turn():
    templates = ["first {{ draft }}", "{{ turn }} {{ draft }}"]
    asked, _ = play(["y1", "y2", "y3"], turns=3, template=templates)
    assert [prompt for prompt, *_ in asked] == ["x", "first y1", "3 y2"]


def test_a_template_is_tried_out_with_the_drafts_of_its_turn_and_without_a_critique():
    """Training rows have no critique, and a run must not find out after its first generation."""
    Strategy(RefinementsConfig(strategy="few_shot", turns=3, template=["{{ drafts[0] }}", "{{ drafts[1] }}"]))
    with pytest.raises(RecipeError, match=r"`refinements.template\[0\]`: UndefinedError"):
        Strategy(RefinementsConfig(strategy="few_shot", turns=3, template=["{{ drafts[1] }}", "{{ drafts[1] }}"]))
    with pytest.raises(RecipeError, match="`refinements.template`: UndefinedError"):
        Strategy(RefinementsConfig(strategy="self_evaluation", template="{{ draft }}{{ critique.split()[0] }}."))
    with pytest.raises(RecipeError, match="`refinements.evaluation_template`: ZeroDivisionError"):
        Strategy(RefinementsConfig(strategy="self_evaluation", evaluation_template="{{ draft }}{{ 1 / 0 }}"))


@pytest.mark.parametrize("strategy", TEMPLATES)
def test_every_strategy_keeps_the_system_message_and_the_history(strategy):
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    texts = ["y1", "c1", "y2"] if strategy == "self_evaluation" else ["y1", "y2"]
    asked, _ = play(texts, [*history, {"role": "user", "content": "QUESTION"}], strategy=strategy, turns=2)
    for prompt, turn, _ in asked:
        assert prompt[:-1] == history and prompt[-1]["role"] == "user" and "QUESTION" in prompt[-1]["content"]
        assert ("y1" in prompt[-1]["content"]) == (turn == 2 and strategy != "parallel")


# Answers in texts


THINKING = r"(?s)</think>\s*(.*)"


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" all of it ", None, " all of it "),
        ("", None, ""),
        ("<think>hm\nhm</think>\n\n1\n2", THINKING, "1\n2"),
        ("<think>hm, and then max_tokens", THINKING, None),
        ("<think>hm</think> \n", THINKING, None),
        ("a) 1 b) 2", r"(?:a|b)\) (\d)", "1"),  # the first match
        ("a", r"a(b)?", None),
    ],
)
def test_find_answer(text, pattern, answer):
    assert find_answer(text, pattern and re.compile(pattern))[0] == answer


@pytest.mark.parametrize(
    ("text", "pattern", "is_whole"),
    [
        ("It is #### 42", r"#### (\d+)", False),  # it may have become 421
        ("It is #### 42.", r"#### (\d+)", True),
        ("It is #### 42 ", r"#### (\d+)", False),  # it may have become 42 000
        ("It is \\boxed{42}", r"\\boxed\{(.*?)\}", True),
        ("A: 42\n", r"A: (.*)\n", True),
        ("A: 42\nQ: and", r"A: (.*)", True),
        ("A: 42  ", r"A: (.*?)\s*$", False),
        ("<think>hm</think> 1\n2", THINKING, False),
        ("whatever", None, False),
    ],
)
@pytest.mark.parametrize("learn", ["answer", "full_text"])
def test_an_answer_behind_which_the_text_goes_on_is_whole(text, pattern, is_whole, learn):
    """Though the text was cut off at `max_tokens`. A text that is learned is not whole by its answer."""
    strategy = Strategy(RefinementsConfig(), pattern, learn)
    chain = Chain("p", "x")
    strategy.add(chain, strategy.next_request(chain), text, 8, "length")
    assert chain.answers[0].finish_reason == ("stop" if is_whole and learn == "answer" else "length")


def test_what_goes_on_is_the_answer_and_the_row_keeps_the_text():
    texts = ["<think>a</think> y1", "<think>b</think> c1", "<think>c</think>y2"]
    asked, chain = play(
        texts,
        [{"role": "user", "content": "x"}],
        THINKING,
        strategy="self_evaluation",
        turns=2,
        template="{{ draft }}|{{ critique }}",
        evaluation_template="{{ draft }}?",
    )
    assert [prompt[0]["content"] for prompt, *_ in asked] == ["x", "y1?", "y1|c1"]
    assert chain.to_row()["answers"] == [
        {"turn": 1, "text": "y1", "tokens": 1, "finish_reason": "stop", "full_text": texts[0], "critique": "c1"},
        {"turn": 2, "text": "y2", "tokens": 1, "finish_reason": "stop", "full_text": texts[2]},
    ]
    assert Chain.from_row(chain.to_row(), chain.prompt) == chain


def test_a_critique_need_not_have_the_form_of_an_answer():
    _, chain = play(["A: 1", "it is wrong", "A: 2"], answer_pattern=r"A: (\d)", strategy="self_evaluation", turns=2)
    assert [(a.text, a.critique) for a in chain.answers] == [("1", "it is wrong"), ("2", None)]


def test_a_text_without_an_answer_ends_its_chain():
    """It is kept beside the answers, never among them: nothing scores, chooses or refines it."""
    asked, chain = play(["A: 1", "no idea"], answer_pattern=r"A: (\d)", turns=4)
    assert len(asked) == 2
    assert chain.to_row() == {
        "prompt_id": "p",
        "answers": [{"turn": 1, "text": "1", "tokens": 1, "finish_reason": "stop", "full_text": "A: 1"}],
        "stopped": "no_answer_found",
        "unanswered": [{"turn": 2, "text": "", "tokens": 1, "finish_reason": "stop", "full_text": "no idea"}],
    }
    assert Chain.from_row(chain.to_row(), "x") == chain


def test_parallel_samples_do_not_depend_on_one_without_an_answer():
    """As many samples are drawn as there are turns; those with an answer are numbered through."""
    asked, chain = play(["no idea", "A: 2", "?", "A: 4"], answer_pattern=r"A: (\d)", strategy="parallel", turns=4)
    assert [turn for _, turn, _ in asked] == [1, 2, 3, 4]
    assert [(a.turn, a.text) for a in chain.answers] == [(1, "2"), (2, "4")]
    assert [a.turn for a in chain.unanswered] == [1, 3] and chain.stopped == "no_answer_found"
