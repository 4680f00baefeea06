"""`trl-ext aries init` and `try-verifier`: a task that runs as it stands."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from trl_ext.aries.config import AriesConfig
from trl_ext.aries.inputs import read_inputs
from trl_ext.aries.scoring.try_verifier import try_verifier
from trl_ext.cli import main
from trl_ext.new_task import EVALUATION_PROMPTS, PROMPTS, SFT_ROWS, init
from trl_ext.recipe import RecipeError, load_yaml, parse_section


@pytest.fixture(params=[False, True], ids=["chat", "text"])
def task(request, tmp_path, monkeypatch) -> AriesConfig:
    monkeypatch.chdir(tmp_path)
    init(Path("my-task"), model="me/my-model", text=request.param)
    return parse_section(load_yaml("my-task/recipe.yaml"), AriesConfig)


def test_rows(task):
    """All rows are read as prompts and SFT rows; no two have the same words, whichever file they are in."""
    inputs = read_inputs(task)
    assert (len(inputs.prompts), len(inputs.evaluation_prompts)) == (PROMPTS, EVALUATION_PROMPTS)
    assert (len(inputs.sft_rows), inputs.sft_dropped) == (SFT_ROWS, {})
    answers = [row["answer"] for row in [*inputs.prompts, *inputs.evaluation_prompts]]
    answers += [
        row["answer"]
        for row in map(json.loads, Path("my-task/sft.jsonl").read_text().splitlines())
        if "draft" not in row
    ]
    assert len(set(answers)) == len(answers) == PROMPTS + EVALUATION_PROMPTS + SFT_ROWS // 2
    for answer in answers:
        assert answer.split(", ") == sorted(answer.split(", "))


def test_try_verifier(task):
    """By hand: an empty answer has no word in its place, a draft has two of five out of place."""
    console = Console(record=True, width=200)
    assert try_verifier(task, console) == 0
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    scores = {}
    for _, answer, score in lines:
        scores.setdefault(answer.strip().partition(":")[0], set()).add(score.strip())
    assert scores == {"empty": {"0"}, "`completion`": {"1"}, "`answer`": {"1"}, "`draft`": {"0.6"}}


def test_what_a_verifier_raises_is_shown(task):
    Path("my-task/verifier.py").write_text(
        "def score(completions, **kwargs):\n    return [1 / len(c) for c in completions]\n"
    )
    console = Console(record=True, width=200)
    code = try_verifier(task, console)
    if isinstance(json.loads(Path("my-task/prompts.jsonl").read_text().splitlines()[0])["prompt"], str):
        assert code == 2 and "ZeroDivisionError" in console.export_text()
    else:  # a list with one message
        assert code == 0


def test_without_a_verifier(task):
    task.scores.verifier = None
    with pytest.raises(RecipeError, match=r"scores\.verifier"):
        try_verifier(task)


@pytest.mark.parametrize("task", [False], ids=["chat"], indirect=True)
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [{"from": "human", "value": "q"}], "completion": [{"from": "gpt", "value": "a"}]}, "the text 'a'"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": []}, "`answer`"),
        ({"question": "q", "completion": "a"}, None),
    ],
    ids=["sharegpt", "empty", "no prompt"],
)
def test_sft_rows_are_tried_as_a_run_reads_them(task, row, expected):
    """Turns of ShareGPT are messages, a row without an answer is left out, and an unusable one is named as a run would name it."""
    Path("my-task/sft.jsonl").write_text(json.dumps(row | {"answer": "a"}) + "\n")
    if expected is None:
        with pytest.raises(RecipeError, match=r"sft\.jsonl, row 1: no column `prompt`"):
            try_verifier(task)
        return
    console = Console(record=True, width=200)
    assert try_verifier(task, console) == 0
    assert expected in console.export_text()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["aries", "init", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_verifiers_are_found_at_home(task, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    shutil.move("my-task/verifier.py", "verifier.py")
    task.scores.verifier = "~/verifier.py:score"
    assert try_verifier(task, Console(record=True)) == 0


def test_the_readme_of_a_text_task_does_not_ask_for_text(task):
    text = isinstance(json.loads(Path("my-task/prompts.jsonl").read_text().splitlines()[0])["prompt"], str)
    assert ("init --text" in Path("my-task/README.md").read_text()) != text
