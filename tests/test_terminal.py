"""What reaches a terminal: nothing that a terminal would obey. Oracle: ECMA-48's control characters and sequences."""

import io
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trl_ext import cli
from trl_ext.aries.results.progress import RunProgress
from trl_ext.terminal import no_weight_bars, printable, quiet_imports


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain text, ünïcode 漢字 😀\n\ttab", "plain text, ünïcode 漢字 😀\n\ttab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hhome", "home"),
        ("\x1b]0;new title\x07after", "after"),
        ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bP1$r0m\x1b\\dcs", "dcs"),
        ("\x9b31mC1", "C1"),
        ("error: all is well\rerror: it is not", "error: all is wellerror: it is not"),
        ("back\b\b\b\bspace\x7f\x00", "backspace"),
        ("\x1bcreset", "reset"),
        ("unfinished \x1b[", "unfinished "),
        ("unfinished \x1b]0;title", "unfinished 0;title"),
    ],
)
def test_sequences_are_stripped(text, left):
    assert printable(text) == left


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x9b[]0;m\x07\\P"))))
def test_nothing_is_left_that_a_terminal_obeys(text):
    left = printable(text)
    assert not [c for c in left if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    assert printable(left) == left


def test_what_a_run_says():
    stream = io.StringIO()
    RunProgress(1, Console(file=stream)).say("an answer: \x1b]0;owned\x07[bold]4[/bold]\x1b[2J")
    assert stream.getvalue() == "an answer: [bold]4[/bold]\n"


def test_errors_of_the_command_line(tmp_path, capsys):
    """The key is the file's, and the error quotes it."""
    (tmp_path / "r.yaml").write_text('"\\e[31mkey\\e]0;owned\\a": 1\n')
    assert cli.main(["aries", "run", "--config", str(tmp_path / "r.yaml")]) == 2
    err = capsys.readouterr().err
    assert "unknown key `key`" in err and "\x1b" not in err and "\x07" not in err


def test_imports_are_quiet():
    """Importing bitsandbytes and TRL as `trl-ext` does says nothing, whatever kernels this CPU could have."""
    code = "from trl_ext.terminal import quiet_imports; quiet_imports(); import bitsandbytes, trl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_level_that_was_set_stays(monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "level", logging.INFO)
    quiet_imports()
    assert logger.level == logging.INFO


def test_bars_of_downloads_stay():
    """transformers' switch also turns the Hub's bars off."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    shown = not are_progress_bars_disabled()
    no_weight_bars()
    assert not transformers_logging.is_progress_bar_enabled()
    assert shown == (not are_progress_bars_disabled())
