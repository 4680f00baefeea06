"""Runs side by side, of known scores: differences by hand, and when there are none."""

import re

import pytest
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS, Page, flat_text
from tests.made_run import make_run

from trl_ext.aries.results.compare import compare, obstacle, shortened
from trl_ext.aries.results.report_data import change, read_run
from trl_ext.aries.scoring.evaluation import of_turn
from trl_ext.recipe import RecipeError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """
    A gets from 0.3 to 0.8 on y1 in its first round, B stays where it was, with another learning rate, and goes on; C answered other
    prompts.
    """
    path = tmp_path_factory.mktemp("runs")
    training = {"training": {"trainer": "tdpo", "learning_rate": 1e-6}}
    a = make_run(path / "a", TEXTS, [BEFORE, AFTER])
    b = make_run(path / "b", [TEXTS[0]] * 2, [BEFORE, BEFORE], rounds=2, settings=training)
    c = make_run(path / "c", TEXTS, [BEFORE, AFTER], prompt="Another question?")
    return a, b, c


def compared(runs, capsys) -> str:
    assert compare([run.path for run in runs]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(len(line) for line in out.splitlines() if line[:1] in "┏│") <= 100
    return out


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_differences_by_hand(runs, capsys):
    """B − A: 0 at the start, where every prompt is equal; in round 1, 0.3 − 0.8 on y1 and 0.5 − 0.8 on y2."""
    out = compared(runs[:2], capsys)
    found = rows(out)
    assert found[:4] == [
        ["before round 1, A", "0.300", "0.500"],
        ["B", "0.300", "0.500"],
        ["B − A", "+0.000", "+0.000"],
        ["", "[-0.163, 0.163]", "[-0.163, 0.163]"],  # z / 12: ten ties, and two halves of either sign
    ]
    assert found[4:7] == [["round 1, A", "0.800", "0.800"], ["B", "0.300", "0.500"], ["B − A", "-0.500", "-0.300"]]
    low, high = change(of_turn(AFTER, 1), of_turn(BEFORE, 1), samples=200, seed=42).interval  # as in the report
    assert found[7][1] == f"[{low:.3f}, {high:.3f}]"

    # What differs, and what does not
    assert ["training.learning_rate", "-", "1e-06"] in found
    assert ["rounds", "1", "2"] in found
    assert not [row for row in found if row[0] in ("output_dir", "seed", "versions.trl")]
    assert ["drafts and refinements", "1 min 00 s", "1 min 00 s"] in found
    assert ["tokens of evaluation", "80", "120"] in found  # 10 × (3 + 3) and 10 × (1 + 1) tokens, or twice the former


def test_three_runs_in_a_terminal_and_on_a_page(runs, capsys, tmp_path):
    """The third answered other prompts: its scores stand beside the others, without a difference."""
    output = tmp_path / "compared.html"
    assert compare([run.path for run in runs], output) == 0
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found[:5]] == ["before round 1, A", "B", "C", "B − A", ""]
    assert ["rounds", "1", "2", "1"] in found
    page = Page(output.read_text(encoding="utf-8"))
    text = flat_text(page)
    assert re.search(r"round 1 ?A ?0.800 0.800 B 0.300 0.500 C 0.800 0.800 B − A −0.500 \[−0.\d+, −0.\d+\]", text)
    assert "training.learning_rate - 1e-06 -" in text and "C − A" not in text
    assert sum(tag == "svg" for tag, _ in page.elements) == 2 and page.open == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_what_is_not_compared(tmp_path, runs):
    """Other prompts, another verifier of the same name, a judge, no scores."""
    a, b, c = (read_run(run.path) for run in runs)
    assert obstacle(a, b) is None and "0 in common" in obstacle(a, c)
    b.resolved["scores"]["timeout"] = 30.0
    del b.resolved["scores"]["reward_model_backend"]  # as before this key existed
    assert obstacle(a, b) is None, "the scores are the same"
    b.resolved["inputs"]["scores.verifier"] = "0" * 64
    assert "scorers" in obstacle(a, b)
    judge = {"scores": {"judge": {"base_url": "http://judge/v1", "model": "m"}}}
    judged = make_run(tmp_path / "judged", TEXTS, [BEFORE, AFTER], settings=judge)
    assert "judge" in obstacle(a, read_run(judged.path))
    c.rounds = []
    assert "not been evaluated" in obstacle(a, c)


def test_runs_without_scores(tmp_path, capsys):
    runs = [make_run(tmp_path / name, TEXTS, [BEFORE, AFTER]) for name in "ab"]
    for run in runs:
        for number in (0, 1):
            run.round(number).metrics.unlink()
    out = compared(runs, capsys)
    assert "no scores" in out and not any("before round 1" in row[0] for row in rows(out))
    assert compare([run.path for run in runs], tmp_path / "compared.html") == 0


def test_errors_and_long_values(tmp_path, runs):
    with pytest.raises(RecipeError, match="nowhere is not a run directory"):
        compare([runs[0].path, tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="got 1"):
        compare([runs[0].path])
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(RecipeError, match="mine.html"):
        compare([run.path for run in runs], tmp_path / "mine.html")
    assert shortened("a" * 30 + "b" * 31 + "c" * 30) == "a" * 24 + "…" + "c" * 24
