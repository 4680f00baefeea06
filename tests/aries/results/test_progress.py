"""The tables, as they are printed to a log."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from trl_ext.aries.data.records import Answer, Chain
from trl_ext.aries.results.progress import JsonProgress, Pulse, RunProgress, StageProgress, progress_line
from trl_ext.aries.results.tables import answers_table, score_table
from trl_ext.aries.scoring.evaluation import evaluation_metrics


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
    assert re.search(r"^round 1/2  training \(dpo\) +12 +\d+\.\d s$", text, flags=re.MULTILINE)
    assert "round 1/2 done in 1 min 01 s, about 1 min 01 s to go" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_quiet_prints_warnings_alone():
    assert ran(RunProgress(2, quiet=True)) == "look out\n"


def test_json_lines():
    lines = [json.loads(line) for line in ran(JsonProgress(2)).splitlines()]
    assert [line["event"] for line in lines] == [
        "start",
        "end",
        "message",
        "message",
        "metrics",
        "round",
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", line["time"]) for line in lines)
    assert [line["level"] for line in lines] == ["info"] * 2 + ["warning"] + ["info"] * 3
    assert (lines[1]["done"], lines[1]["total"], lines[1]["stage"]) == (12, 12, "training (dpo)")
    assert lines[1]["round"] == 1 and lines[1]["seconds"] >= 0
    assert lines[4]["turns"][0]["score"] == 0.5 and lines[5]["seconds"] == 61.0
    quiet = JsonProgress(2, quiet=True)
    (line,) = (json.loads(line) for line in ran(quiet).splitlines())
    assert (line["level"], line["text"]) == ("warning", "look out")
    quiet.stopped(2, "guard", "\x1b[31mwhy\n")
    last = quiet.console.file.getvalue().splitlines()[-1]
    assert "\x1b" not in last and json.loads(last)["error"] == "\x1b[31mwhy\n"


class Clock:
    """Goes where it is put."""

    now = 1000.0

    def __call__(self):
        return self.now


def test_a_line_is_due_every_minute_and_says_how_it_goes():
    """After a start of 30 s, 20 that were there, and 40 more in 90 s: 4 in 9 s, so 140 in 315 s."""
    clock = Clock()
    pulse = Pulse(1, "drafts", clock)
    clock.now += 30
    pulse.update(20, 200)
    assert pulse.due() is None
    clock.now += 30
    assert progress_line(pulse.due(), 60) == "20 of 200, after 1 min 00 s"
    assert pulse.due() is None
    pulse.update(60, 200)
    clock.now += 60
    at = pulse.due()
    assert (at.rate, at.eta) == (pytest.approx(40 / 90), pytest.approx(315))
    assert progress_line(at, 120) == "60 of 200, 26.7 a minute, about 5 min 15 s to go"
    pulse.update(1, 7)  # another scorer counts from the beginning
    clock.now += 60
    assert progress_line(pulse.due(), 180) == "1 of 7, after 3 min 00 s"


def test_a_stage_of_which_nothing_is_heard():
    clock = Clock()
    pulse = Pulse(0, "check", clock)
    clock.now += 61
    assert progress_line(pulse.due(), 61) == "nothing yet, after 1 min 01 s"
    pulse = Pulse(0, "drafts and refinements", clock)
    clock.now += 61
    assert progress_line(pulse.due(), 61) == "the engine is starting, after 1 min 01 s"
    pulse.update(0, 40)
    assert progress_line(pulse.at(), 70) == "0 of 40, after 1 min 10 s"


@pytest.mark.parametrize(
    ("done", "seconds", "expected"),
    [(901, 60.0, "15 a second"), (91, 60.0, "1.5 a second"), (2, 60.0, "1 a minute"), (2, 1800.0, "2 an hour")],
)
def test_rates_are_in_units_that_suit_them(done, seconds, expected):
    assert expected in progress_line(StageProgress(1, "sft", 1, done, 10_000, seconds), seconds)


def minutes_of(progress: RunProgress, clock: Clock) -> list[str]:
    """What a stage prints on its own, of which two minutes pass with a report before each."""
    progress.console = Console(file=io.StringIO(), width=80, highlight=False)
    lines = progress.console.file.getvalue
    with progress.stage(1, "drafts") as update:
        for done in (0, 90):
            before = lines().count("\n")
            update(done, 270)
            clock.now += 60
            while lines().count("\n") == before:  # the clock is ours, the thread is its own
                time.sleep(0.001)
    return lines().splitlines()


def test_a_log_without_a_terminal_shows_that_a_stage_goes_on(monkeypatch):
    """90 in the 120 s since the first report: 0.75 a second, and 240 s for the 180 to go."""
    monkeypatch.setattr("trl_ext.aries.results.progress.BEAT_SECONDS", 0.001)
    clock = Clock()
    lines = minutes_of(RunProgress(2, clock=clock), clock)
    assert [" ".join(line.split()) for line in lines] == [
        "round 1/2 drafts 0 of 270, after 1 min 00 s",
        "round 1/2 drafts 90 of 270, 45 a minute, about 4 min 00 s to go",
        "round 1/2 drafts 90 120.0 s",
    ]
    clock = Clock()
    start, *progress, end = map(json.loads, minutes_of(JsonProgress(2, clock=clock), clock))
    keys = ("round", "stage", "done", "total", "rate", "eta")
    assert [[line[key] for key in keys] for line in progress] == [
        [1, "drafts", 0, 270, None, None],
        [1, "drafts", 90, 270, 0.75, 240.0],
    ]
    assert {line["event"] for line in progress} == {"progress"} and end["seconds"] == 120.0
