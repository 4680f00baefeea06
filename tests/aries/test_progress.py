"""The tables, as they are printed to a log."""

import io
import json
import re

import pytest
from rich.console import Console

from trl_ext.aries.evaluation import evaluation_metrics
from trl_ext.aries.progress import JsonProgress, RunProgress, answers_table, score_table
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
    [(1.0, "[0.150, 0.850]", "[0.510, 1.000]"), (-30.0, "[-30.00, 0.000]", "[-30.00, -30.00]")],
)
def test_four_turns_fit_on_100_columns(scale, wide, narrow):
    """Scores 0, 0, 1, 1 and 1, 1, 1, 1: Wilson's intervals. Of 0, 0, -30, -30 all resamples are equal with 1/16 > 2.5 %: [-30, 0]."""
    initial = [[0.0] * 4, [0.0] * 4, [scale] * 4, [scale] * 4]
    later = [[scale] * 4] * 4
    metrics = {0: metrics_of(initial), 10: metrics_of(later, initial)}
    lines = printed(score_table(metrics, 4, has_sft=False, kind="held-out"), answers_table(metrics, has_sft=False))
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
    lines = printed(score_table({0: old}, 2, has_sft=True, kind="held-out"))
    assert lines[0].strip() == "Mean score of each answer on 10 held-out prompts"
    assert any("0.500 ± 0.020 (n=9)" in line and "0.500 (n=9)" in line for line in lines)


def ran(progress: RunProgress) -> str:
    """What a stage, a warning, a message, a table and a round print."""
    progress.console = Console(file=io.StringIO(), width=80, highlight=False)
    with progress.stage(1, "training (dpo)") as update:
        update(3, 12)
        update(12, 12)
    progress.say("look out", style="yellow")
    progress.say("by the way")
    progress.results({0: metrics_of([[1.0], [0.0]])}, 1, has_sft=False, kind="held-out")
    progress.end_round(1, 61.0)
    return progress.console.file.getvalue()


def test_a_log_has_one_line_per_stage_and_no_control_characters():
    text = ran(RunProgress(2))
    assert re.search(r"^round 1/2  training \(dpo\) +12 +0.0 s$", text, flags=re.MULTILINE)
    assert "round 1/2 done in 1 min 01 s, about 1 min 01 s to go" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_quiet_prints_warnings_alone():
    assert ran(RunProgress(2, quiet=True)) == "look out\n"


def test_json_lines(monkeypatch):
    monkeypatch.setattr("trl_ext.aries.progress.PROGRESS_SECONDS", 0.0)
    lines = [json.loads(line) for line in ran(JsonProgress(2)).splitlines()]
    assert [line["event"] for line in lines] == [
        "start",
        "progress",
        "progress",
        "end",
        "message",
        "message",
        "metrics",
        "round",
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", line["time"]) for line in lines)
    assert [line["level"] for line in lines] == ["info"] * 4 + ["warning"] + ["info"] * 3
    assert (lines[1]["done"], lines[1]["total"], lines[1]["stage"]) == (3, 12, "training (dpo)")
    assert (lines[3]["done"], lines[3]["round"]) == (12, 1) and lines[3]["seconds"] >= 0
    assert lines[6]["turns"][0]["score"] == 0.5 and lines[7]["seconds"] == 61.0
    quiet = JsonProgress(2, quiet=True)
    (line,) = (json.loads(line) for line in ran(quiet).splitlines())
    assert (line["level"], line["text"]) == ("warning", "look out")
    quiet.stopped(2, "guard", "\x1b[31mwhy\n")
    last = quiet.console.file.getvalue().splitlines()[-1]
    assert "\x1b" not in last and json.loads(last)["error"] == "\x1b[31mwhy\n"
