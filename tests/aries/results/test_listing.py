"""`trl-ext aries list`: directories of made runs, and what is said of each."""

import pytest
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS, Page, flat_text
from tests.made_run import make_run

from trl_ext.aries.results.listing import best_score, list_runs, run_directories
from trl_ext.aries.results.report import write_report
from trl_ext.aries.results.report_data import read_run
from trl_ext.recipe import RecipeError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run with a report, one in a folder that stopped, a judged one, a broken one, and what is not a run."""
    path = tmp_path_factory.mktemp("somewhere") / "runs"
    write_report(make_run(path / "a b", TEXTS, [BEFORE, AFTER]).path)
    stopped = make_run(path / "group" / "stopped", TEXTS, [BEFORE, AFTER], rounds=3)
    stopped.log_event(event="stopped", round=2, stage="guard", error="round 2 would train\nmore")
    judge = {"scores": {"judge": {"base_url": "http://judge/v1", "model": "m"}}}
    make_run(path / "judged", TEXTS, [BEFORE, AFTER], settings=judge)
    make_run(path / "broken", TEXTS, [BEFORE, AFTER]).round(1).metrics.write_text("{")
    (path / "other").mkdir()
    (path / "notes.txt").write_text("mine")
    return path


def test_runs_are_found_at_any_depth(runs):
    assert [str(path.relative_to(runs)) for path in run_directories(runs)] == [
        "a b",
        "broken",
        "group/stopped",
        "judged",
    ]
    assert list(run_directories(runs / "judged")) == [runs / "judged"]
    assert list(run_directories(runs, depth=1)) == [runs / "a b", runs / "broken", runs / "judged"]


def test_what_is_said_of_them(runs, capsys):
    assert list_runs(runs) == 0
    out = capsys.readouterr().out
    for part in ("4 runs in", "a b", "group/stopped", "1 of 3", "stopped: ", "0.800", "index.html"):
        assert part in out
    page = Page((runs / "index.html").read_text(encoding="utf-8"))
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a" and not attrs["href"].startswith("#")]
    assert links == ["a%20b/report.html"] and (runs / "a b/report.html").exists()
    text = flat_text(page)
    assert "some/model, tdpo" in text and "1 of 3" in text and "0.800 round 1, y1" in text
    assert "broken" in text and "metrics.json" in text  # what is wrong with it
    assert page.open == []
    list_runs(runs)  # over its own page


def test_best_score(runs):
    """AFTER has 0.8 on both turns, and the first is named; a judge's scores compare the answers of a chain only."""
    assert best_score(read_run(runs / "a b")) == {"score": 0.8, "where": "round 1, y1"}
    assert best_score(read_run(runs / "judged")) is None


def test_errors(runs, tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        list_runs(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="other holds no run"):
        list_runs(runs / "other")
    make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(RecipeError, match="index.html"):
        list_runs(tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"
