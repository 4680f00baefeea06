"""
What the sections on generation refuse, by name and with a way out, and what they resolve to.
"""

import pytest
from tests.aries.tiny_run import MINIMAL

from trl_ext.aries.config import AriesConfig, DraftsConfig, sampling_by_turn
from trl_ext.aries.config.templates import EVALUATION_TEMPLATE, TEMPLATES
from trl_ext.recipe import Recipe, RecipeError, parse_section


def parse(**sections) -> AriesConfig:
    """A whole recipe with these sections."""
    return parse_section(Recipe(None, {**MINIMAL, **sections}, {}), AriesConfig)


DRAFTS = "{% for draft in drafts %}{{ draft }}{% endfor %}"


@pytest.mark.parametrize(
    ("refinements", "message"),
    [
        ({"strategy": "chains"}, r"`refinements.strategy` must be one of 'chain'.*Did you mean `chain`"),
        ({"turns": 1}, "`refinements.turns` must be at least 2"),
        ({"template": "Improve it."}, "`refinements.template` never mentions `draft`.*Write {{ draft }}"),
        ({"template": "{{ draft"}, "`refinements.template` is not valid Jinja2"),
        (
            {"template": "{{ draft }} {% if turn > 3 %}{{ hint }}{% endif %}"},
            "`refinements.template` uses `hint`, and its variables are `question`, `draft`",
        ),
        (
            {"template": "{{ draft }} {{ critique }}"},
            "`refinements.template` mentions `critique`.*chain` has none.*strategy: self_evaluation",
        ),
        (
            {"strategy": "few_shot", "template": "{{ draft }}"},
            "`refinements.template` never mentions `drafts`.*{% for draft in drafts %}.*strategy: chain",
        ),
        (
            {"strategy": "self_evaluation", "template": "{{ draft }}"},
            "`refinements.template` never mentions `critique`.*{{ critique }}",
        ),
        (
            {"turns": 3, "template": ["{{ draft }}", "Improve it."]},
            r"`refinements.template\[1\]` never mentions `draft`",
        ),
        (
            {"template": ["{{ draft }}"]},
            "`refinements.template` is a list of 1, and a chain of 4 turns has 3 refinements. Give one value",
        ),
        ({"temperature": [0.5, 0.7]}, "`refinements.temperature` is a list of 2, and a chain of 4 turns has 3"),
        ({"evaluation_template": "{{ draft }}"}, "`refinements.evaluation_template` .*strategy: self_evaluation"),
        (
            {"strategy": "self_evaluation", "evaluation_template": "Judge it."},
            "`refinements.evaluation_template` never mentions `draft`",
        ),
        (
            {"strategy": "self_evaluation", "evaluation_template": "{{ draft }}{{ critique }}"},
            "`refinements.evaluation_template` mentions `critique`",
        ),
        ({"temperature": -0.1}, "`refinements.temperature` must be at least 0; 0 is greedy"),
        ({"turns": 3, "top_p": [1.0, 1.5]}, r"`refinements.top_p\[1\]` must be in \(0, 1\]"),
        ({"top_k": -2}, "`refinements.top_k` must be at least 1, or 0: off"),
        ({"max_tokens": 0}, "`refinements.max_tokens` must be positive"),
        ({"temperature": "hot"}, "`refinements.temperature` must be a number or a list of numbers"),
        (
            {"turns": 3, "max_tokens": [64, 2048]},
            r"`refinements.max_tokens\[1\]` \(2048\) leaves no room for a prompt in `generation.max_model_len` \(2048\)",
        ),
    ],
)
def test_refinements_are_refused_by_name(refinements, message):
    with pytest.raises(RecipeError, match=message):
        parse(refinements=refinements)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"</think>(.*", "`generation.answer_pattern` is not a regular expression.*single quotes"),
        (r"</think>.*", r"`generation.answer_pattern` has 0 groups. Put \( \) around the answer"),
        (r"(a|b)(.*)", r"`generation.answer_pattern` has 2 groups.*\(\?: \)"),
    ],
)
def test_answer_patterns_are_refused_by_name(pattern, message):
    with pytest.raises(RecipeError, match=message):
        parse(generation={"answer_pattern": pattern})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_generator_takes_are_refused(seed):
    with pytest.raises(RecipeError, match="`seed` must be at least 0 and below 2"):
        parse(seed=seed)


def test_drafts_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"`drafts.top_p` must be in \(0, 1\]; 1 is off"):
        parse(drafts={"top_p": 0.0})


def test_rules_about_the_last_answer_need_one():
    with pytest.raises(RecipeError, match="`pairs.selection: rule_based`.*strategy: parallel.*best_over_worst"):
        parse(refinements={"strategy": "parallel"}, pairs={"selection": "rule_based"})


@pytest.mark.parametrize("strategy", TEMPLATES)
def test_what_is_not_written_is_the_strategys_own(strategy):
    refinements = parse(refinements={"strategy": strategy}).refinements
    assert refinements.template == TEMPLATES[strategy]
    assert refinements.evaluation_template == (EVALUATION_TEMPLATE if strategy == "self_evaluation" else None)


@pytest.mark.parametrize(
    "refinements",
    [
        {"template": "{{ question }} {% for d in drafts %}{{ d }}{% endfor %}"},
        {"template": "{{ draft }} {% for i in range(turn) %}.{% endfor %}"},
        {"strategy": "few_shot", "template": DRAFTS},
        {"strategy": "self_evaluation", "template": DRAFTS + "{{ critique }}"},
    ],
)
def test_templates_that_are_taken(refinements):
    parse(refinements=refinements)


def test_refinements_are_sampled_as_the_drafts_unless_they_say_otherwise():
    drafts = {"temperature": 0.9, "top_p": 0.8, "top_k": 5, "max_tokens": 7}
    assert sampling_by_turn(parse(drafts=drafts)) == [DraftsConfig(**drafts)] * 4
    refinements = {"turns": 3, "temperature": 0.5, "top_p": 1, "top_k": 0, "max_tokens": [9, 11]}
    assert sampling_by_turn(parse(drafts=drafts, refinements=refinements)) == [
        DraftsConfig(**drafts),
        DraftsConfig(temperature=0.5, top_p=1.0, top_k=0, max_tokens=9),
        DraftsConfig(temperature=0.5, top_p=1.0, top_k=0, max_tokens=11),
    ]


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("drafts", {"stop": [""]}, "`drafts.stop` has an empty text"),
        ("drafts", {"stop": "\\n"}, "`drafts.stop` has a backslash and a letter.*in double quotes"),
        ("drafts", {"min_p": 1.5}, r"`drafts.min_p` must be in \[0, 1\]"),
        ("drafts", {"repetition_penalty": 0.0}, "`drafts.repetition_penalty` must be positive"),
        ("drafts", {"stop_token_ids": [-1]}, "`drafts.stop_token_ids` must be at least 0"),
        ("refinements", {"stop": ["a", ""]}, "`refinements.stop` has an empty text"),
        ("refinements", {"min_p": [0.1, 0.2]}, "`refinements.min_p` is a list of 2, and a chain of 4 turns has 3"),
        (
            "refinements",
            {"repetition_penalty": [1.0, 1.0, 0.0]},
            r"`refinements.repetition_penalty\[2\]` must be positive",
        ),
    ],
)
def test_what_ends_and_shapes_answers(section, settings, message):
    with pytest.raises(RecipeError, match=message):
        parse(**{section: settings})


def test_what_ends_an_answer_holds_for_refinements_unless_they_say_otherwise():
    drafts = {"stop": "\n", "stop_token_ids": [7], "min_p": 0.1, "repetition_penalty": 1.1}
    for refinements, expected in (
        ({}, (["\n"], [7], 0.1, 1.1)),
        ({"stop": ["\n\n", "Q:"], "min_p": 0.2}, (["\n\n", "Q:"], [7], 0.2, 1.1)),
        ({"stop": [], "stop_token_ids": [], "repetition_penalty": [1.0, 1.1, 1.2]}, ([], [], 0.1, 1.2)),
    ):
        *_, last = sampling_by_turn(parse(drafts=drafts, refinements=refinements))
        assert (last.stop, last.stop_token_ids, last.min_p, last.repetition_penalty) == expected
