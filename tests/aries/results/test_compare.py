"""Two runs side by side, of known scores: differences by hand, and when there are none."""

import json
import re

import pytest
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS
from tests.made_run import make_run

from trl_ext.aries.results.compare import compare, shown
from trl_ext.recipe import RecipeError


@pytest.fixture
def runs(tmp_path):
    """A gets from 0.3 to 0.8 on y1 in its first round, B stays where it was, with another learning rate, and goes on."""
    a = make_run(tmp_path / "a", TEXTS, [BEFORE, AFTER])
    training = {"training": {"trainer": "tdpo", "learning_rate": 1e-6}}
    b = make_run(tmp_path / "b", [TEXTS[0]] * 2, [BEFORE, BEFORE], rounds=2, settings=training)
    return a, b


def compared(runs, capsys) -> str:
    assert compare(*(run.path for run in runs)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(len(line) for line in out.splitlines() if line[:1] in "┏│") <= 100
    return out


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_differences_by_hand(runs, capsys):
    """B − A: 0 at the start, where every prompt is equal; in round 1, 0.3 − 0.8 on y1 and 0.5 − 0.8 on y2."""
    out = compared(runs, capsys)
    found = rows(out)
    assert found[:4] == [
        ["before round 1, A", "0.300", "0.500"],
        ["B", "0.300", "0.500"],
        ["B − A", "+0.000", "+0.000"],
        ["", "[-0.163, 0.163]", "[-0.163, 0.163]"],  # z / 12: ten ties, and two halves of either sign
    ]
    assert found[4:7] == [["round 1, A", "0.800", "0.800"], ["B", "0.300", "0.500"], ["B − A", "-0.500", "-0.300"]]
    assert re.fullmatch(r"\[-0.\d+, -0.\d+\]", found[7][1])
    assert "B − A is paired over the 10 prompts" in out
    assert "A: " in out and "finished" in out and "ended without a word" in out

    # What differs, and what does not
    assert ["training.learning_rate", "-", "1e-06"] in found
    assert ["rounds", "1", "2"] in found
    assert not [row for row in found if row[0] in ("output_dir", "seed", "versions.trl")]
    assert ["drafts and refinements", "1 min 00 s", "1 min 00 s"] in found
    assert ["tokens of evaluation", "80", "120"] in found  # 10 × (3 + 3) and 10 × (1 + 1) tokens, or twice the former


def test_the_interval_is_of_the_differences(runs, capsys):
    """As the report's: the change of the same prompts from one run's scores to the other's."""
    from trl_ext.aries.results.report_data import change
    from trl_ext.aries.scoring.evaluation import of_turn

    found = change(of_turn(AFTER, 1), of_turn(BEFORE, 1), samples=200, seed=42)
    low, high = found.interval
    assert f"[{low:.3f}, {high:.3f}]" in compared(runs, capsys)


def test_other_prompts_are_not_compared(tmp_path, runs, capsys):
    other = make_run(tmp_path / "c", TEXTS, [BEFORE, AFTER], prompt="Another question?")
    out = compared((runs[0], other), capsys)
    assert "The evaluation prompts are not the same (A has 10, B 10, 0 in common), so no differences are shown" in out
    assert "B − A" not in out and ["B", "0.800", "0.800"] in rows(out)


def test_other_scorers_are_not_compared(tmp_path, runs, capsys):
    """The same verifier's name with another content counts as another."""
    resolved = json.loads(runs[1].resolved.read_text())
    resolved["inputs"]["scores.verifier"] = "0" * 64
    runs[1].resolved.write_text(json.dumps(resolved))
    out = compared(runs, capsys)
    assert "The scorers are not the same" in out and "B − A" not in out


def test_judges_are_not_compared(tmp_path, capsys):
    scores = {"scores": {"judge": {"base_url": "http://judge/v1", "model": "m"}}}
    runs = [make_run(tmp_path / name, TEXTS, [BEFORE, AFTER], settings=scores) for name in "ab"]
    out = compared(runs, capsys)
    assert "A judge's scores compare the answers of a chain, not those of two runs" in out and "B − A" not in out


def test_a_run_without_scores(tmp_path, runs, capsys):
    for number in (0, 1):
        runs[1].round(number).metrics.unlink()
    assert "One of them has not been evaluated yet" in compared(runs, capsys)
    for number in (0, 1):
        runs[0].round(number).metrics.unlink()
    assert "No round of either has been evaluated" in compared(runs, capsys)


def test_errors_and_long_values(tmp_path, runs):
    with pytest.raises(RecipeError, match="nowhere is no run directory"):
        compare(runs[0].path, tmp_path / "nowhere")
    assert shown("a" * 30 + "b" * 31 + "c" * 30) == "a" * 24 + "…" + "c" * 24
