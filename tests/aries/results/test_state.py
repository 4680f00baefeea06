"""Whether a run goes on, has finished or has stopped, and where, read off directories in each of these states."""

import fcntl
import json

import pytest
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS
from tests.made_run import make_run

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.results.state import read_progress, read_state, recorded
from trl_ext.aries.results.status import status
from trl_ext.aries.run_dir import RunDir
from trl_ext.recipe import load_yaml, parse_section


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A run of two rounds, one of them done."""
    return make_run(tmp_path / "run", TEXTS, [BEFORE, AFTER], rounds=2)


def printed(run: RunDir, capsys) -> str:
    assert status(parse_section(load_yaml(run.recipe), AriesConfig)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    return out


def test_not_started(tmp_path):
    assert str(read_state(RunDir(tmp_path / "nowhere"), 3)) == "not started"


def test_running(run, capsys):
    run.log_event(event="start", round=2, stage="parity")
    with open(run.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read_state(run, 2)
        assert (state.kind, state.in_stage) == ("running", True)
        assert f"{run.path}: running: round 2, parity (20" in printed(run, capsys)
        assert "To continue" not in printed(run, capsys)


def test_how_far_a_running_stage_is(run, capsys, monkeypatch):
    """100 of 300 answers were there when it was continued; 50 in 60 s leave 150, which is 3 minutes."""
    clock, shown = iter([0.0, 1.0, 60.0]), []
    monkeypatch.setattr("trl_ext.aries.results.state.time.monotonic", lambda: next(clock))
    update = recorded(lambda *counts: shown.append(counts), run, 2, "drafts and refinements")
    update(100, 300)
    assert str(read_progress(run)) == "100 of 300"
    update(101, 300)  # too soon to be written
    assert read_progress(run).done == 100
    update(150, 300)
    assert shown == [(100, 300), (101, 300), (150, 300)]
    run.log_event(event="start", round=2, stage="drafts and refinements")
    assert "150 of 300" not in printed(run, capsys)  # nothing is running
    with open(run.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "  150 of 300, about 3 min 00 s to go\n" in printed(run, capsys)
        run.log_event(event="start", round=2, stage="parity")  # another stage's
        assert "150 of 300" not in printed(run, capsys)


def test_an_engine_that_starts(run, capsys):
    run.log_event(event="start", round=2, stage="drafts and refinements")
    assert "the engine is starting" not in printed(run, capsys)  # nothing is running
    with open(run.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "  the engine is starting\n" in printed(run, capsys)


def test_died_in_a_stage(run, capsys):
    """The lock went with its process; the log ends in the middle of a stage."""
    run.log_event(event="start", round=2, stage="training (tdpo)")
    out = printed(run, capsys)
    assert f"{run.path}: not running: it ended without an error, round 2, training (tdpo) (20" in out
    assert f"To continue: trl-ext aries run {run.path}" in out


def test_died_between_stages(run):
    assert "it ended without an error, after round 1, training (tdpo)" in str(read_state(run, 2))
    run.log_event(event="note", round=1, stage="scores", note="unheard")
    assert "after round 1, training (tdpo)" in str(read_state(run, 2))


def test_stopped_by_an_error(run, capsys):
    run.log_event(event="stopped", round=2, stage="guard", error="round 2 would train\nTry: ...")
    out = printed(run, capsys)
    assert "stopped: round 2, guard (20" in out and "round 2 would train\n" in out and "Try" not in out
    assert f"To continue: trl-ext aries run {run.path}" in out


def test_finished(run, capsys):
    assert read_state(run, 1).kind == "finished"
    assert read_state(run, 1, running=True).kind == "running"
    recipe = json.loads(run.recipe.read_text()) | {"rounds": 1}
    run.recipe.write_text(json.dumps(recipe))
    out = printed(run, capsys)
    assert f"{run.path}: finished\n" in out and "To continue" not in out
    assert "Mean score of each answer on 10 held-out prompts" in out
