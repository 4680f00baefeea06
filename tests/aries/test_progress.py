"""The tables, as they are printed to a log."""

import io

import pytest
from rich.console import Console

from trl_ext.aries.evaluation import evaluation_metrics
from trl_ext.aries.progress import RunProgress, answers_table, score_table
from trl_ext.aries.records import Answer, Chain


def printed(*tables) -> list[str]:
    progress = RunProgress(3, Console(file=io.StringIO(), width=80, highlight=False))
    for table in tables:
        progress.show(table)
    return progress.console.file.getvalue().splitlines()


def metrics_of(scores: list[list[float]], initial: list[list[float]] | None = None) -> dict:
    chains = [
        Chain(str(i), "x", [Answer(k, f"answer {k}", 1234, "stop") for k in range(1, len(row) + 1)])
        for i, row in enumerate(scores)
    ]
    return evaluation_metrics(chains, scores, len(scores[0]), initial=initial)


@pytest.mark.parametrize(
    ("scale", "wide", "narrow"),
    [(1.0, "[0.000, 1.000]", "[1.000, 1.000]"), (-30.0, "[-30.00, 0.000]", "[-30.00, -30.00]")],
)
def test_four_turns_fit_on_100_columns(scale, wide, narrow):
    """Scores 0, 0, 1, 1: mean 1/2, and for 4 prompts the interval is [0, 1]: P(all equal) = 1/16 > 2.5 %."""
    initial = [[0.0] * 4, [0.0] * 4, [scale] * 4, [scale] * 4]
    later = [[scale] * 4] * 4
    metrics = {0: metrics_of(initial), 10: metrics_of(later, initial)}
    lines = printed(score_table(metrics, 4, has_sft=False), answers_table(metrics, has_sft=False))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert text.count(wide) == 4 and text.count(narrow) == 4
    assert text.count(f" {scale / 2:.3f} ") >= 4
    assert "initial model" in text and "round 10" in text and "with 95 % interval" in text


def test_answers_of_the_last_round():
    """Two of four prompts were wrong and are right: wins 2, ties 2, so 0.75. y2 spoils one. Tokens 1234 now and then."""
    initial = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    metrics = {0: metrics_of(initial), 1: metrics_of([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]], initial)}
    lines = printed(answers_table(metrics, has_sft=True))
    assert lines[0].strip() == "Answer by answer: round 1"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│ y" in line]
    assert rows == [
        ["y1", "0.750", "-", "-", "-", "1234 (1234)", "0%"],
        ["y2", "0.625", "0, 1", "0, 1", "0%", "1234 (1234)", "0%"],
    ]


def test_metrics_of_earlier_versions():
    turn = {"score": 0.5, "standard_error": 0.02, "scored": 9, "answers": 10, "tokens": 4.0, "truncated": 0}
    old = {"prompts": 10, "turns": [{"turn": 1, **turn}, {"turn": 2, **turn, "standard_error": None}]}
    lines = printed(score_table({0: old}, 2, has_sft=True))
    assert lines[0].strip() == "Mean score of each answer on 10 held-out prompts"
    assert any("0.500 ± 0.020 (n=9)" in line and "0.500 (n=9)" in line for line in lines)
