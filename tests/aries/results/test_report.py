"""
The report: what it says, by hand, of runs made of known answers and scores; that it is there for a run in any state; and that what
models write stays text. How it looks and what a browser makes of it is in test_report_browser.py.
"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.made_run import make_run

from trl_ext.aries.data.records import write_json
from trl_ext.aries.results.compare import cost_rows
from trl_ext.aries.results.pages import decimals, visible
from trl_ext.aries.results.report import figures, headline, report, shown_scores, write_report
from trl_ext.aries.results.report_data import (
    Change,
    change,
    curve,
    drop_table,
    read_run,
    time_table,
    token_table,
    warnings,
)
from trl_ext.aries.results.report_samples import (
    KINDS,
    SHOWN_CHARACTERS,
    choose,
    kind_of,
    samples,
    verdict,
    word_diff,
)
from trl_ext.aries.run_dir import RunDir
from trl_ext.recipe import RecipeError


# Ten prompts, two answers each: 0.3 and 0.5 right at the start; then 0.8 and 0.8, with one spoiled and one set right
BEFORE = [[1.0, 1.0]] * 3 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 5
AFTER = [[1.0, 1.0]] * 7 + [[1.0, 0.0]] + [[0.0, 1.0]] + [[0.0, 0.0]]
TEXTS = [[["one two three", "one three four"]] * 10, [["five", "five"]] * 10]

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</style><style>body{display:none}</style>",
    '<img src="http://127.0.0.1:8099/x.png" onerror="window.pwned = 2">',
    "</title></head><body onload=alert(1)>",
    '" onmouseover="window.pwned = 3',
    "<svg><animate onbegin=alert(1)>",
    "<!-- --><iframe src='http://127.0.0.1:8099/'></iframe>",
    "[a link](javascript:window.pwned=4) **bold** $x^2$ {{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x00 nul",
    "\u202eright to left\u202c and \u2066isolated\u2069",
    "lone \ud800 surrogate",
    "W" * 3000,
    "&lt;already&gt; &amp; escaped",
]


COLOURS = {"none", *(f"var(--{name})" for name in ("muted", "line", "good", "bad"))}
COLOURS |= {f"var(--series-{i})" for i in range(1, 7)}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether what was opened was closed."""

    VOID = {"meta", "link", "path", "use", "rect"}

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "finished", TEXTS, [BEFORE, AFTER]).path


@pytest.fixture(scope="module")
def page(finished) -> Page:
    write_report(finished)
    return Page((finished / "report.html").read_text(encoding="utf-8"))


def flat_text(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


# What it says


def test_the_answer_by_hand(page):
    """y1: 3 of 10 right, then 8 of 10, and 5 set right by training: +0.5. y2: 5, then 8: +0.3. Refining: 8 and 8."""
    text = flat_text(page)
    answer = (
        "the direct answers of round 1 score higher than at the start, and its refined answers show no clear change"
    )
    assert f"In part: {answer}." in text
    change = r"0.300 → 0.800 \+0.500 \[0.\d+, 0.\d+\] Higher: the interval lies above 0. y1, initial model to round 1, 10 prompts."
    assert re.search(change, text)
    assert "0.500 → 0.800 +0.300" in text
    assert re.search(
        r"0.800 → 0.800 \+0.000 \[−0.\d+, 0.\d+\] No clear change: the interval contains 0. y1 to y2, round 1", text
    )
    assert re.search(r"round 1 0.800 ?\[0.490, 0.943\] 0.800 ?\[", text)  # Wilson's
    assert "Accuracy on 10 held-out prompts" in text  # all scores are 0 or 1


@pytest.mark.parametrize(
    ("direct", "refined", "answer"),
    [
        ("higher", "higher", "Yes: the direct and the refined answers of r score higher"),
        ("higher", None, "Yes: the direct answers of r score higher"),
        ("unclear", "unclear", "Not measurably, on 100 prompts: the direct and the refined answers"),
        ("unclear", "lower", "No: the refined answers of r score lower than at the start, and its direct answers"),
        ("lower", "unclear", "No: the direct answers of r score lower than at the start, and its refined answers"),
        ("unclear", "higher", "In part: the refined answers of r score higher than at the start, and its direct"),
        ("higher", "lower", "In part: the direct answers of r score higher than at the start, but its refined"),
    ],
)
def test_the_answer_does_not_contradict_itself(direct, refined, answer):
    run = SimpleNamespace(judged=False, evaluated=[SimpleNamespace(name="r")])
    intervals = {"higher": [0.1, 0.2], "unclear": [-0.1, 0.2], "lower": [-0.2, -0.1]}
    compared = {
        name: kind and Change(0.0, intervals[kind], 100) for name, kind in (("direct", direct), ("refined", refined))
    }
    assert headline(run, compared).startswith(answer)


def test_right_is_decided_for_the_run(tmp_path):
    """Scores of 0 and 1 before round 1 and others after it, as earlier versions wrote them: refining is shown by better and worse."""
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    metrics = json.loads(run.round(1).metrics.read_text())
    metrics["correct_score"] = None
    for turn in metrics["turns"]:
        turn |= {"correct": None, "flips": None}
    run.round(1).metrics.write_text(json.dumps(metrics))
    record = read_run(run.path)
    assert [turn["flips"] for round_ in record.evaluated for turn in round_.metrics["turns"]] == [None] * 4
    write_report(run.path)
    page = Page(run.report.read_text(encoding="utf-8"))
    text = flat_text(page)
    assert "better (up) and worse (down)" in text
    assert not re.search("wrong → right|(wrong|right) [01]", text)
    assert "Mean score on 10" in text


def test_what_selects_is_drawn_below_what_judges(tmp_path):
    """Goodhart's curve. By hand: each point of either has its value on hovering; without `evaluation.scores` there is no such figure."""
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    write_report(run.path)
    assert "selecting-and-judging" not in run.report.read_text(encoding="utf-8")
    for number, score in enumerate((1.25, 7.75)):
        metrics = json.loads(run.round(number).metrics.read_text())
        turns = range(1, len(metrics["turns"]) + 1)
        metrics["selecting"] = [{"turn": turn, "score": score, "interval": None, "scored": 4} for turn in turns]
        write_json(run.round(number).metrics, metrics)
    write_report(run.path)
    page = run.report.read_text(encoding="utf-8")
    figure = page[page.index("selecting-and-judging") :].partition("</svg>")[0]
    for hover in ("start, y1: 1.250, 4 answers", "round 1, y1: 7.750, 4 answers"):
        assert hover in figure
    assert figure.count("round 1, y1: ") == 2


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path):
    finished = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER]).path
    write_report(finished)
    write_report(finished)  # our own
    (finished / "report.html").write_text("mine")
    with pytest.raises(RecipeError, match="report.html was not written by trl-ext"):
        write_report(finished)
    assert (finished / "report.html").read_text() == "mine"


def test_a_change_is_paired():
    """
    B is A plus 0.1 on every prompt: the difference is the same whichever prompts are drawn, so its interval has no width, however
    far the scores of the prompts are apart. Prompts without both scores are left out.
    """
    a = [0.0, 5.0, -3.0, None, 1.0]
    b = [score and score + 0.1 for score in a]
    b[0] = 0.1
    found = change(a, [*b[:4], None], samples=100, seed=0)
    assert found.prompts == 3
    assert [found.difference, *found.interval] == pytest.approx([0.1] * 3)
    assert found.verdict == "higher"
    assert change([1.0], [None], samples=10, seed=0) is None
    assert change([1.0], [1.0], samples=10, seed=0).verdict == "unknown"


def test_pairs_training_and_time(finished, page):
    run = read_run(finished)
    assert drop_table(run) == [
        {"reason": "no_margin", "rounds": [2]},
        {"reason": "all_answers_truncated", "rounds": [1]},
    ]
    assert curve(run, "loss") == [("round 1", [1, 2, 3], pytest.approx([0.6, 0.5, 0.4]))]
    times = time_table(run)
    assert [(stage["name"], stage["total"]) for stage in times["stages"]] == [
        ("drafts and refinements", 60.0),
        ("training (tdpo)", 30.0),
    ]
    text = flat_text(page)
    assert "1 min 00 s 1 min 00 s 67%" in text and "1 min 30 s of work" in text
    assert "some/model · tdpo · 1 round" in text
    assert "trl 1.16.0" in text and "0123456789" in text and "abc123" in text


def test_health_and_rows_left_out_of_the_sft(tmp_path):
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    write_json(run.round(0).sft_drops, {"sft_rows": 7, "dropped": {"empty_completion": 2}})
    measured = {"kl_per_token": 0.25, "length_ratio": 0.875, "diversity_ratio": None}
    write_json(run.round(1).health, {"decision": "set_aside", "findings": ["x"], **measured})
    write_report(run.path)
    text = flat_text(Page(run.report.read_text(encoding="utf-8")))
    assert "2 empty_completion." in text
    assert "round 1 set aside 0.250 0.875 –" in text


def test_tokens_per_second_and_memory_by_hand(tmp_path):
    """
    Round 1 of 1 took 60 s to generate 3 × 20 tokens of evaluations, its own and round 0's, and 540 more; its training read 900 tokens in 30 s.
    Of two trainings, 2 GB and 3 GB, the larger one counts.
    """
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    for number, tokens in enumerate([(0, 0, 40), (240, 300, 20)]):
        write_json(
            run.round(number).cost,
            {
                "generated_tokens": dict(zip(("drafts", "refinements", "evaluation"), tokens, strict=True)),
                "stages": [],
            },
        )
    history = json.loads((run.round(1).training / "log_history.json").read_text())
    history = [
        history[0] | {"num_tokens": 300.0},
        history[1] | {"num_tokens": 900.0},
        history[-1] | {"train_runtime": 30.0},
    ]
    write_json(run.round(1).training / "log_history.json", history)
    for peak in (2e9, 3e9):
        run.log_event(event="end", round=1, stage="training (tdpo)", seconds=1.0, peak_memory=int(peak))
    record = read_run(run.path)
    before, after = token_table(record)
    assert (before["generated_per_second"], before["trained_per_second"]) == (None, None)
    assert (after["generated_per_second"], after["trained_per_second"]) == (10.0, 30.0)
    times = time_table(record)
    assert times["peaks"] == ["peak_memory"]
    assert [stage["peak_memory"] for stage in times["stages"]] == [None, 3e9]
    write_report(run.path)
    text = flat_text(Page(run.report.read_text(encoding="utf-8")))
    assert "3.0 GB" in text and "generated per second" in text


def test_discarded_answers_were_generated_too(tmp_path):
    """As round 0 was rolled back, 600 answers' tokens of round 1 were generated twice, in 2 × 60 s: with the evaluations, 1200 in 120 s."""
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    tokens = {"drafts": 240, "refinements": 300, "evaluation": 20, "discarded": 600}
    for number, found in enumerate([{"drafts": 0, "refinements": 0, "evaluation": 40}, tokens]):
        write_json(run.round(number).cost, {"generated_tokens": found, "stages": []})
    for event in ({"event": "start"}, {"event": "end", "seconds": 60.0}):
        run.log_event(round=1, stage="drafts and refinements", **event)
    assert [row["generated_per_second"] for row in token_table(read_run(run.path))] == [None, 10.0]
    assert cost_rows([read_run(run.path)])["tokens discarded by rolling back"] == ["600"]
    write_report(run.path)
    assert "discarded" in flat_text(Page(run.report.read_text(encoding="utf-8")))


def test_curves_go_on_from_round_to_round(tmp_path):
    run = read_run(make_run(tmp_path / "run", [TEXTS[0]] * 3, [BEFORE] * 3).path)
    assert [steps for _, steps, _ in curve(run, "loss")] == [[1, 2, 3], [4, 5, 6]]
    assert curve(run, "nothing") == []


def test_what_to_keep_in_mind(tmp_path):
    """Answers that grew, a guard's decision, a judge's score, and a note of the log are said."""
    texts = [[["a b", "a b"]] * 10, [["a b c d", "a b"]] * 10]
    scores = {"judge": {"base_url": "http://judge/v1", "model": "m"}}
    run = make_run(tmp_path / "run", texts, [BEFORE, AFTER], settings={"scores": scores})
    guard = run.round(1).guard
    guard.write_text(json.dumps(json.loads(guard.read_text()) | {"decision": "warned"}))
    run.log_event(event="note", round=1, stage="scores", note="3 replies without a verdict")
    said = " ".join(warnings(read_run(run.path)))
    for part in (
        "grew from 2 to 4 tokens",
        "Round 1: the chosen answers",
        "turns, not rounds",
        "3 replies without a verdict",
    ):
        assert part in said

    # A judge's scores do not say whether training made the answers better, and the page does not either
    write_report(run.path)
    text = flat_text(Page(run.report.read_text(encoding="utf-8")))
    assert "not whether one policy is better than another" in text
    assert "What refining adds" in text and "Answering directly" not in text and "After refining" not in text


def test_the_same_run_gives_the_same_page(finished, page):
    """But for the time at which it was written."""
    html = []
    for _ in range(2):
        write_report(finished)
        html.append(re.sub(r"Written \S+ \S+", "", (finished / "report.html").read_text(encoding="utf-8")))
    assert html[0] == html[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.0, "0.000"), (0.5, "0.500"), (-12.3456, "−12.35"), (0.00123, "0.00123"), (12345.6, "12,346")],
)
def test_numbers(value, expected):
    assert decimals(value) == expected


# Samples


def test_kinds_by_hand():
    """Refining before training; with a score that is right from 1 on, 0.2 and 0.4 are both wrong."""
    cases = [
        ([1.0, 1.0], [1.0, 0.0], "worse after refining"),
        ([1.0, 1.0], [0.0, 1.0], "better after refining"),
        ([1.0, 1.0], [0.0, 0.0], "worse after training"),
        ([0.0, 1.0], [1.0, 1.0], "better after training"),
        ([0.2, 0.2], [0.4, 0.4], "no change"),
        ([], [1.0, 1.0], "no change"),
        ([1.0, 1.0], [None, None], "not scored"),
        ([1.0, 1.0], [], "not scored"),
    ]
    assert [kind_of(first, last, 1.0) for first, last, _ in cases] == [kind for *_, kind in cases]
    assert kind_of([0.2, 0.2], [0.4, 0.4], None) == "better after training"


def test_every_kind_is_shown_and_the_choice_is_seeded():
    kinds = ["no change"] * 90 + ["worse after refining"] * 2 + ["better after training"] * 8
    chosen = choose(kinds, seed=1, count=9)
    assert chosen == choose(kinds, seed=1, count=9) != choose(kinds, seed=2, count=9)
    assert [kinds[i] for i in chosen] == ["worse after refining"] * 2 + ["better after training"] * 4 + [
        "no change"
    ] * 3
    assert len(set(choose(["no change"] * 5, seed=1))) == 5
    assert set(kinds) <= set(KINDS)


def test_samples_of_a_run(finished):
    found = samples(read_run(finished))
    assert found["kinds"] == {
        "worse after refining": 1,
        "better after refining": 1,
        "better after training": 4,
        "no change": 4,
    }
    sample = found["shown"][0]
    assert (sample["prompt_id"], sample["kind"]) == ("eval-7", "worse after refining")
    before, after = sample["policies"]
    assert [before["name"], after["name"]] == ["initial model", "round 1"]
    assert before["answers"][1]["parts"] == [("same", "one"), ("old", " two"), ("same", " three"), ("new", " four")]
    assert after["answers"][1]["unchanged"] and after["answers"][1]["verdict"] == "wrong"


def test_verdicts_by_hand():
    """Right from a score on; without one, compared with the answer before."""
    assert [verdict(score, 0.5, 1.0) for score in (1.0, 0.9, None)] == ["right", "wrong", None]
    assert [verdict(score, 0.5, None) for score in (0.6, 0.5, 0.4, None)] == ["better", None, "worse", None]
    assert verdict(0.6, None, None) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a b c", "a x c"),
        ("", "new"),
        ("gone", ""),
        ("3 3 5 9", "3 5 9 9"),
        ("漢字 を書く", "漢字を 読む"),
        ("f(x)=1;\n  y", "f(x)=2;\n\ty z"),
    ],
)
def test_a_diff_holds_both_texts(before, after):
    """Without what is old it is the new text; without what is new, the old one but for white space."""
    parts = word_diff(before, after)
    assert "".join(text for kind, text in parts if kind != "old") == after
    assert "".join("".join(text for kind, text in parts if kind != "new").split()) == "".join(before.split())
    assert all(one[0] != other[0] for one, other in pairwise(parts))
    assert any(kind == "same" for kind, _ in parts) == bool(set(before.split()) & set(after.split())) or "漢" in before


def test_nothing_acts_unseen():
    assert visible("a\x00b\x1b[0m\x7f\x9b\r\nc\td\r") == r"a\x00b\x1b[0m\x7f\x9b" + "\nc\td" + r"\x0d"
    assert visible("\u202ex\u202c \ud800 \u200b") == r"\u202ex\u202c \ud800 \u200b"
    assert visible("\U000e0041") == r"\U000e0041"
    assert visible("naïve 漢字 👩\u200d💻 עברית") == "naïve 漢字 👩\u200d💻 עברית"


def test_what_is_cut_is_counted(tmp_path):
    long = "x" * (SHOWN_CHARACTERS + 1234)
    run = make_run(tmp_path / "run", [[[long, "short"]] * 2], [[[1.0, 1.0]] * 2], rounds=1)
    write_report(run.path)
    html = run.report.read_text()
    assert (
        "1,234 more characters, in evaluation.jsonl" in html and long not in html and long[:SHOWN_CHARACTERS] in html
    )


# What models write stays text


def hostile_run(path: Path) -> RunDir:
    """Answers, prompts, columns, a note and an error made of [`HOSTILE`]."""
    # Half a character cannot be written to a file of answers; an error may quote one
    texts = [[[text.replace("\ud800", ""), "more"] for text in HOSTILE]] * 2
    scores = [[[0.0, 1.0]] * len(HOSTILE)] * 2
    columns = {"<b>column</b>": HOSTILE[0], "solution": HOSTILE[1]}
    run = make_run(
        path, texts, [[row[:] for row in of] for of in scores], rounds=3, prompt="".join(HOSTILE[:9]), columns=columns
    )
    run.log_event(event="note", round=1, stage="scores", note=HOSTILE[2])
    run.log_event(event="stopped", round=2, stage="</title><script>", error="\n".join(HOSTILE))
    run.recipe.write_text("# " + "".join(HOSTILE[:9]), encoding="utf-8")
    return run


def test_hostile_text_is_text(tmp_path, finished, page):
    """The page has the same kinds of elements and attributes as that of a harmless run, and shows all of it as text."""
    run = hostile_run(tmp_path / "run")
    write_report(run.path)
    html = run.report.read_bytes().decode("utf-8")
    hostile = Page(html)
    assert {tag for tag, _ in hostile.elements} - {tag for tag, _ in page.elements} <= {"pre", "ins", "del", "bdi"}
    attributes = {name for _, attrs in hostile.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on")} and "src" not in attributes
    links = {attrs[name] for _, attrs in hostile.elements for name in ("href", "xlink:href") if name in attrs}
    assert all(link.startswith("#") or link == "data:," for link in links)
    for text in HOSTILE:
        assert re.sub(r"\s+", " ", visible(text)) in flat_text(hostile), text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", html)
    assert hostile.open == []


def test_the_page_stands_alone(page, finished):
    """Nothing to load, nothing to run, a policy that would forbid it; one of each id."""
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|@import|url\((?!#)", html)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not {tag for tag, _ in page.elements} & {"img", "iframe", "object", "embed", "video", "audio", "form"}
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    referred = {
        attrs[name].lstrip("#") for _, attrs in page.elements for name in ("href", "xlink:href") if name in attrs
    }
    assert referred - {"data:,"} <= set(ids)
    assert page.open == []


def test_values_appear_on_hovering(finished):
    """The points of a figure have their numbers as titles."""
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "<title>round 1, y1: 0.800 [0.490, 0.943], 10 answers</title></circle>" in html
    assert "<title>r1, y2: 1 wrong to right, 1 right to wrong</title></rect>" in html
    assert "<title>loss, round 1, step 3: 0.400</title></circle>" in html


def test_empty_figures_are_left_out(tmp_path):
    """Nothing that refining changed, no KL, one policy, scores of 0 and 1: what is left is the score by turn."""
    run = make_run(tmp_path / "run", [TEXTS[1]], [[[1.0, 1.0], [0.0, 0.0]] * 5], rounds=1)
    record = read_run(run.path)
    drawn = figures(record, {0: record.evaluated[0].metrics["turns"]}, "accuracy")
    assert [name for name, figure in drawn.items() if figure] == ["score_by_turn"]


def test_the_spread_of_scores(tmp_path):
    """Scores of 0 and 1 are said by their mean; others are shown turn by turn, also those that all prompts but one have."""
    assert shown_scores(read_run(make_run(tmp_path / "binary", TEXTS, [BEFORE, AFTER]).path)) == {}
    graded = [[[0.1 * i, None if i == 3 else 0.2 * i] for i in range(10)], AFTER]
    run = read_run(make_run(tmp_path / "graded", TEXTS, graded).path)
    assert shown_scores(run)["initial model"][1][:4] == [0.0, 0.2, 0.4, None]
    write_report(run.path)
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<title>y1, 0.000 to 0.090: initial model 1, round 1 2</title></rect>" in html


def test_figures_follow_the_colours_of_the_page(page, finished):
    """Every colour of a figure is a variable, each figure has a title, each table its heads."""
    html = (finished / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(figures) >= 7
    for figure in figures:
        assert set(re.findall(r"(?:fill|stroke): (?!url)([^;\"]+)", figure)) <= COLOURS, figure
        assert re.search(r'<svg role="img" aria-labelledby="([\w-]+)"[^>]*><title id="\1">\S', figure)
        assert "<text" in figure
    tables = re.findall(r"<table [^>]*aria-label=.*?</table>", html, flags=re.DOTALL)
    assert len(tables) >= 8 and all('<th scope="' in table for table in tables)


# Runs in any state


@pytest.mark.parametrize("kept", range(7))
def test_a_run_that_got_so_far(tmp_path, finished, kept):
    """A run whose last files are missing, from the end back to nothing but its settings, has a report all the same."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "report.html").unlink(missing_ok=True)
    run = RunDir(path)
    first, last = run.round(0), run.round(1)
    made = [first.metrics, last.drops, last.guard, last.training / "log_history.json", last.metrics, last.manifest]
    for file in made[kept:]:
        file.unlink()
    if kept == 0:
        run.events.unlink()
        for evaluated in (0, 1):
            shutil.rmtree(run.round(evaluated).path)
    report(path)
    page = Page(run.report.read_text(encoding="utf-8"))
    text = flat_text(page)
    links = {attrs["href"].lstrip("#") for tag, attrs in page.elements if tag == "a"}
    assert links <= {attrs.get("id") for _, attrs in page.elements} and len(links) == (7 if kept == 0 else 10)
    assert ("No policy has been evaluated yet." in text) == (kept == 0)
    assert ("No pairs have been made yet." in text) == (kept <= 1)
    assert ("Nothing has been trained yet." in text) == (kept <= 3)
    assert ("Finished" in text) == (kept == 6)
    assert ("The run did not finish" in text) == (kept < 6)


def test_a_page_of_a_run_that_goes_on_loads_itself_again(tmp_path, page):
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER], rounds=2)
    refresh = []
    for running in (True, False):
        write_report(run.path, running)
        elements = Page(run.report.read_text(encoding="utf-8")).elements
        refresh.append(any(attrs.get("http-equiv") == "refresh" for _, attrs in elements))
    assert refresh == [True, False]


def test_a_run_that_stopped_says_why(tmp_path):
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER], rounds=2)
    run.log_event(event="stopped", round=2, stage="guard", error="round 2 would train the policy away\nTry ...")
    write_report(run.path)
    text = flat_text(Page(run.report.read_text()))
    assert "The run stopped in round 2, guard" in text and "round 2 would train the policy away Try ..." in text


def test_metrics_of_earlier_versions(tmp_path):
    """Version 0.1.0 wrote neither intervals nor comparisons, and no cost."""
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    kept = ("turn", "score", "standard_error", "scored", "answers", "tokens", "truncated")
    for n in (0, 1):
        metrics = json.loads(run.round(n).metrics.read_text())
        turns = [{key: turn[key] for key in kept} for turn in metrics["turns"]]
        run.round(n).metrics.write_text(json.dumps({"prompts": 10, "turns": turns}))
        run.round(n).cost.unlink()
    write_report(run.path)
    assert "± 0.153" in flat_text(Page(run.report.read_text()))  # √(0.3 · 0.7 / 9)
    assert np.isclose(np.sqrt(0.3 * 0.7 / 9), 0.153, atol=5e-4)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(RecipeError, match="nowhere is not a run directory: it has no resolved.json"):
        write_report(tmp_path / "nowhere")
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    run.round(1).guard.write_text("{")
    with pytest.raises(RecipeError, match=r"round_01/guard.json: not valid JSON"):
        write_report(run.path)


def test_without_matplotlib(finished):
    """The error says what to install; the page that is there stays."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; from trl_ext.cli import main; "
        "sys.exit(main(['aries', 'report', sys.argv[1]]))"
    )
    before = (finished / "report.html").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the report needs matplotlib (the extra `report`): `pip install matplotlib`.\n"
    assert (finished / "report.html").read_bytes() == before


def test_it_loads_neither_torch_nor_vllm(finished):
    code = (
        "import sys; from trl_ext.cli import main; main(['aries', 'report', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'vllm', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{finished / 'report.html'} (")
