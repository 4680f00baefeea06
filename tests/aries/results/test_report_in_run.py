"""The loop and its report: written by a process of its own, never a reason to fail, and there when an error stops the run."""

import io
import json
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS
from tests.made_run import make_run

import trl_ext
from trl_ext.aries.children import ChildError
from trl_ext.aries.config import AriesConfig
from trl_ext.aries.results.progress import RunProgress
from trl_ext.aries.results.state import read_state
from trl_ext.aries.rounds import Rounds
from trl_ext.recipe import load_yaml, parse_section


@pytest.fixture
def loop(tmp_path) -> Rounds:
    """The loop of a run of two rounds, of which one is done; what it prints is kept."""
    run = make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER], rounds=2)
    progress = RunProgress(2, Console(file=io.StringIO(), width=80))
    return Rounds(parse_section(load_yaml(run.recipe), AriesConfig), None, progress)


def printed(loop: Rounds) -> str:
    return loop.progress.console.file.getvalue()


@pytest.mark.parametrize("scorer, said", [("verifier", True), ("judge", False)])
def test_closing_a_round_says_what_became_worse(tmp_path, scorer, said):
    """
    Of ten direct answers eight were right and three of them still are: five lose and none wins, 5 / 2 / 10 = 0.25. Of the refined ones three lose: a
    resample has none of them with 0.7^10 = 0.028, so the interval reaches one half. A judge's scores do not compare rounds.
    """
    run = make_run(tmp_path / "run", TEXTS, [AFTER, BEFORE], rounds=1)
    run.round(1).manifest.unlink()
    for file in (run.round(1).prompts, run.round(1).answers):  # of which the cost is counted
        file.write_text("")
    recipe = load_yaml(run.recipe)
    if scorer == "judge":
        recipe.mapping["scores"] = {"judge": {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}}
    progress = RunProgress(1, Console(file=io.StringIO(), width=300))
    Rounds(parse_section(recipe, AriesConfig), None, progress).close(1)
    note = "round 1: y1 loses against the same answers of the round before: y1 wins 0.25 of the comparisons"
    text = progress.console.file.getvalue()
    assert (note in text) == said and "y2" not in text
    notes = [event["note"] for event in run.read_events() if event["event"] == "note"]
    assert [line.startswith(note) for line in notes] == [True] * said


def test_a_run_that_goes_on(loop):
    loop.write_report(running=True)
    assert printed(loop) == ""
    html = loop.dir.report.read_text(encoding="utf-8")
    assert '<span class="badge running">' in html and f"trl-ext aries report {loop.dir.path}" in html
    assert (loop.dir.path / "logs" / "report.job.json").exists()


def test_a_report_that_fails_is_said_in_one_line(loop):
    loop.dir.round(1).guard.write_text("{")
    loop.write_report(running=True)
    (line,) = printed(loop).splitlines()
    assert "report.html was not written: " in line and "round_01/guard.json: not valid JSON" in line
    assert not loop.dir.report.exists()


def test_without_matplotlib_one_line_says_so_once(loop, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for _ in range(2):
        loop.write_report(running=True)
    (line,) = printed(loop).splitlines()
    assert "no report.html: the report needs matplotlib" in line


def test_an_error_that_stops_the_run(loop):
    """It is in the log and in the report, and goes on to the command line."""
    with pytest.raises(ChildError, match="training failed"), loop.stops_reported():
        loop.at = (2, "training (tdpo)")
        raise ChildError("training failed\nsee the log")
    state = read_state(loop.dir, 2)
    assert (state.kind, state.round, state.stage) == ("stopped", 2, "training (tdpo)")
    html = loop.dir.report.read_text(encoding="utf-8")
    assert "The run stopped in round 2, training (tdpo)" in html and "training failed\nsee the log" in html


def test_an_interrupt(loop):
    """It makes no report, but one that is there would go on saying that the run is running."""
    for report in (False, True):
        if report:
            loop.write_report(running=True)
        with pytest.raises(KeyboardInterrupt), loop.stops_reported():
            loop.at = (2, "training (tdpo)")
            raise KeyboardInterrupt
        assert read_state(loop.dir, 2).error == "interrupted"
        assert loop.dir.report.exists() == report
    html = loop.dir.report.read_text(encoding="utf-8")
    assert "The run was interrupted in round 2, training (tdpo)" in html
    assert f"trl-ext aries run {loop.dir.path}" in html
    for gone in ('<span class="badge running">', 'http-equiv="refresh"', "<pre>interrupted"):
        assert gone not in html


def test_an_error_before_any_work_leaves_no_report(tmp_path, loop):
    """A setting that the check refuses: the error is enough."""
    config = json.loads(loop.dir.recipe.read_text()) | {"output_dir": str(tmp_path / "new")}
    (tmp_path / "new").mkdir()
    (tmp_path / "r.yaml").write_text(json.dumps(config))
    new = Rounds(parse_section(load_yaml(tmp_path / "r.yaml"), AriesConfig), None, loop.progress)
    with pytest.raises(ChildError), new.stops_reported():
        raise ChildError("unknown key")
    assert not new.dir.report.exists() and new.dir.read_events()[-1]["error"] == "unknown key"


def test_the_package_has_its_files():
    """Files that are not Python are among the package's data, or a wheel would not have them."""
    package = Path(trl_ext.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = {
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    data = {p.relative_to(package).as_posix() for pattern in settings["trl_ext"] for p in package.glob(pattern)}
    assert {file for file in files if not file.endswith(".py")} == data
