"""Evaluation prompts that are trained on, and rows that are there twice. Oracle: counts by hand."""

import json
import re

import pytest
from tests.aries.tiny_run import MINIMAL
from tests.made_run import make_run

from trl_ext.aries.checks.overlap import count_overlap, overlap_lines, prompts_kind
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.inputs import check_sources
from trl_ext.aries.manifest import round_facts
from trl_ext.aries.results.report import write_report
from trl_ext.aries.results.report_data import read_run
from trl_ext.recipe import Recipe, RecipeError, parse_section


def rows(*prompts, **columns) -> list[dict]:
    return [{"prompt": prompt, **columns} for prompt in prompts]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_counts_by_hand():
    """
    Of four evaluation prompts, "b" is trained on exactly and "C  c" but for case and space; "d" is an SFT prompt. "b" is there twice in the
    prompts and "A" repeats "a". The draft makes one of two SFT rows another one.
    """
    prompts = rows("a", "A", "b", "b", "c c")
    evaluation = rows("b", "C  c", "d", "e")
    sft = [*rows("d", completion="x"), *rows("d", completion="x", draft="y"), *rows("D", completion="X")]
    assert count_overlap(prompts, evaluation, sft) == {
        "evaluation_prompts": 4,
        "in_prompts": {"exactly": 1, "folded": 2},
        "in_sft": {"exactly": 1, "folded": 1},
        "repeated_prompts": {"exactly": 1, "folded": 2},
        "repeated_evaluation_prompts": {"exactly": 0, "folded": 0},
        "repeated_sft_rows": {"exactly": 0, "folded": 1},
    }


def test_messages():
    """A conversation is all its turns, and one message of the user's is the text that it holds."""
    system = {"role": "system", "content": "be brief"}
    prompts = rows([system, *user("a")], user("b"), user("half \ud83d"))
    found = count_overlap(prompts, rows([system, *user("A")], user("a"), "b"), [])
    assert found["in_prompts"] == {"exactly": 1, "folded": 2}
    assert count_overlap([], [], [])["in_prompts"] == {"exactly": 0, "folded": 0}


def test_it_is_said_and_held_out_is_not(tmp_path):
    """In a note, in the manifest, and in the report, which is of a run whose prompts are held out otherwise."""
    run = make_run(tmp_path / "run", [[["a", "b"]] * 10] * 2, [[[0.0, 1.0]] * 10] * 2)
    assert prompts_kind(run) == "held-out"
    write_report(run.path)
    assert "held-out prompts" in run.report.read_text(encoding="utf-8")

    found = count_overlap(rows("a", "a"), rows("A", "b"), [])
    run.overlap.write_text(json.dumps(found))
    leak, repeats = overlap_lines(found)
    assert leak.startswith("1 of 2 evaluation prompts are also among the training prompts (0 of them exactly")
    assert repeats == "1 training prompts repeat an earlier one (1 exactly)"
    assert prompts_kind(run) == "evaluation"
    write_report(run.path)
    text = run.report.read_text(encoding="utf-8")
    assert "held-out" not in text and "Accuracy on 10 evaluation prompts" in re.sub(r"\s+", " ", text)
    config = parse_section(
        Recipe(None, {key: value for key, value in read_run(run.path).resolved.items() if key != "inputs"}, {}),
        AriesConfig,
    )
    assert round_facts(run, config, 0)["overlap"] == found
    run.overlap.unlink()  # of an earlier version: nobody has looked
    assert prompts_kind(run) == "evaluation"


def config(**changes) -> AriesConfig:
    return parse_section(Recipe(None, MINIMAL | changes, {}), AriesConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": {"dataset": "a.jsonl", "split": "train[:90%]"}},
            "`prompts`: `split: train.:90%.` has no effect on a.jsonl",
        ),
        (
            {"prompts": {"dataset": "a.jsonl"}},
            "`prompts` and `evaluation` both name a.jsonl, and a file has no splits",
        ),
        (
            {"prompts": {"datasets": [{"path": "b.jsonl"}, {"path": "./a.jsonl"}]}},
            "`prompts` and `evaluation` both name ./a.jsonl",
        ),
        ({"sft": {"dataset": "a.jsonl"}}, "`sft` and `evaluation` both name a.jsonl"),
        (
            {"prompts": {"dataset": "o/d"}, "evaluation": {"dataset": "o/d", "split": "train"}},
            "both name o/d, split 'train'",
        ),
        ({"prompts": {"dataset": "o/d"}, "evaluation": {"dataset": "o/d"}}, None),
        ({"prompts": {"dataset": "o/d"}, "evaluation": {"dataset": "o/d", "split": "train[90%:]"}}, None),
        ({"prompts": {"dataset": "b.jsonl"}, "sft": {"dataset": "b.jsonl"}}, None),
    ],
)
def test_one_source_for_learning_and_evaluating(tmp_path, monkeypatch, changes, message):
    """A file has one split, whatever `split` says; two splits of a dataset are two sources, and SFT may see the prompts."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    recipe = config(**{"evaluation": {"dataset": "a.jsonl"}, **changes})
    if message is None:
        check_sources(recipe)
    else:
        with pytest.raises(RecipeError, match=message):
            check_sources(recipe)
