"""Real child processes, each running a small module written by the test."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from trl_ext.aries.children import ChildError, run_child
from trl_ext.recipe import RecipeError


@dataclass
class Job:
    n: int = 0
    file: str = ""


HEAD = """
from trl_ext.aries.children import child_main
from tests.aries.test_children import Job
from trl_ext.recipe import RecipeError
import os, subprocess, sys, time
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Run `main(job, progress)` with the given body as a child; returns its progress reports."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))

    def run(body: str, **job):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "stage.py").write_text(f"{HEAD}\ndef main(job, progress):\n{lines}\n\nchild_main(main, Job)\n")
        reports = []
        run_child("stage", Job(**job), tmp_path / "logs" / "stage.log", lambda *report: reports.append(report))
        return reports

    return run


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_progress_comes_back_and_prints_go_to_the_log(child, tmp_path):
    reports = child("print('from Python')\nos.system('echo from the shell')\nprogress(job.n, 2)\nprogress(2, 2)", n=1)
    assert reports == [(1, 2), (2, 2)]
    log = (tmp_path / "logs" / "stage.log").read_text()
    assert "from Python" in log and "from the shell" in log


def test_notes_come_back(child, tmp_path):
    reports = child("progress(0, 1)\nprogress.note('a server is lost')\nprogress(1, 1)")
    assert reports == [(0, 1), (1, 1)]
    notes = []
    run_child("stage", Job(), tmp_path / "stage.log", lambda *report: None, on_note=notes.append)
    assert notes == ["a server is lost"]


def test_prints_at_import_time_go_to_the_log_too(child, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HEAD", HEAD + "print('a banner')\n")
    assert child("progress(1, 1)") == [(1, 1)]
    assert "a banner" in (tmp_path / "logs" / "stage.log").read_text()


def test_a_failure_shows_the_end_of_the_log_and_where_it_is(child, tmp_path):
    with pytest.raises(ChildError, match="exit code 1(.|\n)*stage.log(.|\n)*the reason"):
        child("raise RuntimeError('the reason')")


def test_bad_input_comes_back_as_itself(child):
    with pytest.raises(RecipeError, match="^recipe.yaml:3: wrong$"):
        child("raise RecipeError('recipe.yaml:3: wrong')")


def test_what_the_child_started_ends_with_it(child, tmp_path):
    child("p = subprocess.Popen(['sleep', '600'])\nopen(job.file, 'w').write(str(p.pid))", file=str(tmp_path / "pid"))
    assert wait_until_dead(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("place", ["at work", "while it imports"])
def test_the_child_dies_with_its_parent(tmp_path, place):
    """The parent is killed with SIGKILL, so nothing of it can clean up; a stage spends its first seconds on imports."""
    pid_file = tmp_path / "pid"
    lines = [f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))", "time.sleep(600)"]
    work, imports = (lines, []) if place == "at work" else (["pass"], lines)
    body = "\n".join(
        [*imports, "def main(job, progress):", *(f"    {line}" for line in work), "child_main(main, Job)"]
    )
    (tmp_path / "stage.py").write_text(f"{HEAD}\n{body}\n")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path; from trl_ext.aries.children import run_child; from tests.aries.test_children import Job;"
            f"run_child('stage', Job(), Path({str(tmp_path / 'stage.log')!r}), print)",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    assert is_alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until_dead(pid)
