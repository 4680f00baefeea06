"""SFT rows: which can be trained on, which are dropped and counted, and which end the run."""

import pytest
from jinja2 import Template

from trl_ext.aries.data.sft import sft_row, usable_sft_rows
from trl_ext.recipe import RecipeError


QUESTION = [{"role": "user", "content": "2 + 2?"}]


def answer(content):
    return [{"role": "assistant", "content": content}]


def test_rows_without_an_answer_are_dropped_and_counted():
    """A draft that equals its completion stays: it teaches to leave alone what is right."""
    good = [
        {"prompt": "2 + 2?", "completion": " 4"},
        {"prompt": "2 + 2?", "completion": "4", "draft": "4"},
        {"prompt": "2 + 2?", "completion": "4", "draft": None},
    ]
    empty = [{"prompt": "2 + 2?", "completion": text} for text in ("", " \n", None)]
    assert usable_sft_rows([*empty, *good], "sft.jsonl") == (good, {"empty_completion": 3})
    messages = [{"prompt": QUESTION, "completion": answer(content)} for content in ("", "4", None)]
    messages += [{"prompt": QUESTION, "completion": []}]
    assert usable_sft_rows(messages, "sft.jsonl") == ([messages[1]], {"empty_completion": 3})


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a"}, r"`completion`.*\['prompt'\]"),
        ({"prompt": " ", "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": answer("b")}, "`completion`"),
        ({"prompt": "a", "completion": 4}, "`completion`"),
        ({"prompt": QUESTION, "completion": [{"text": "b"}]}, "`completion`"),
        ({"prompt": "a", "completion": "b", "draft": 3}, "`draft`"),
    ],
)
def test_rows_of_another_form_end_the_run(row, column):
    rows = [{"prompt": "a", "completion": "b"}, row]
    with pytest.raises(RecipeError, match=f"`sft.dataset`: sft.jsonl, row 2: .*{column}"):
        usable_sft_rows(rows, "sft.jsonl")


def test_a_draft_is_rendered_into_the_prompt():
    template = Template("{{ question }} Draft: {{ draft }}")
    assert sft_row({"prompt": "x", "completion": "c", "draft": "d"}, template) == {
        "prompt": "x Draft: d",
        "completion": "c",
    }
    assert sft_row({"prompt": "x", "completion": "c"}, template) == {"prompt": "x", "completion": "c"}
