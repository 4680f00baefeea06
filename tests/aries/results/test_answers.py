"""`trl-ext aries answers`, on a run directory written by hand."""

import json

import pytest
import yaml

from trl_ext.aries.data.records import write_jsonl
from trl_ext.cli import main


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def recipe(tmp_path):
    """Round 0 has been evaluated on two prompts: one answered twice, one whose chain ended after its draft."""
    run = tmp_path / "my-run"
    (run / "round_00").mkdir(parents=True)
    prompts = [
        {"prompt_id": "e-1", "prompt": CONVERSATION, "dataset": "helpful_base"},
        {"prompt_id": "e-2", "prompt": "Q: 1+1?\nA:", "dataset": "koala"},
    ]
    write_jsonl(run / "evaluation_prompts.jsonl", prompts)

    def answer(turn, text):
        return {"turn": turn, "text": text, "tokens": 1, "finish_reason": "stop"}

    rows = [
        {"prompt_id": "e-1", "answers": [answer(1, "Hello."), answer(2, "Hello!")], "stopped": None},
        {"prompt_id": "e-2", "answers": [answer(1, " 2")], "stopped": "prompt_too_long"},
    ]
    write_jsonl(run / "round_00" / "evaluation.jsonl", rows)
    file = tmp_path / "r.yaml"
    settings = {
        "output_dir": str(run),
        "model": {"model_name_or_path": "m"},
        "prompts": {"dataset": "p.jsonl"},
        "evaluation": {"dataset": "e.jsonl"},
        "scores": {"verifier": "v.py:f"},
        "refinements": {"turns": 2},
        "training": {"trainer": "dpo"},
    }
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_alpaca_eval(recipe, tmp_path, capsys):
    """The format of AlpacaEval's model outputs: a list, one generator, the instruction as the user wrote it."""
    output = tmp_path / "answers.json"
    assert main(["aries", "answers", "--config", recipe, "--output", str(output)]) == 0
    generator = "my-run-round-0-y1"
    assert json.loads(output.read_text()) == [
        {"instruction": "Hi", "output": "Hello.", "generator": generator, "dataset": "helpful_base"},
        {"instruction": "Q: 1+1?\nA:", "output": " 2", "generator": generator, "dataset": "koala"},
    ]
    assert capsys.readouterr().out == f"2 answers y1 of round 0 in {output}\n"


def test_messages_of_a_refined_answer(recipe, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    flags = ["--round", "0", "--turn", "2", "--format", "jsonl", "--output", str(output)]
    assert main(["aries", "answers", "--config", recipe, *flags]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {
            "prompt_id": "e-1",
            "messages": [*CONVERSATION, {"role": "assistant", "content": "Hello!"}],
            "generator": "my-run-round-0-y2",
        }
    ]
    assert "1 answers y2 of round 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--round", "1"], "is not evaluated; 0 can be named"),
        (["--turn", "3"], "`--turn` must be between 1, the direct answer, and 2; got 3."),
        (["--output", "nowhere/a.json"], "`--output`: cannot write nowhere/a.json: No such file or directory."),
        (["--output_dir", "elsewhere"], "elsewhere has no evaluated round yet."),
        (["--turns", "3"], "command line: unknown key `turns`"),
    ],
)
def test_errors(recipe, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["aries", "answers", "--config", recipe, "--output", "a.json", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("name", ["mine.json", "mine.json.tmp"])
def test_a_file_that_is_there_is_not_overwritten(recipe, tmp_path, capsys, name):
    """Under its name, or under the one that it has while it is written."""
    (tmp_path / name).write_text("mine")
    assert main(["aries", "answers", "--config", recipe, "--output", str(tmp_path / "mine.json")]) == 2
    assert f"error: --output: {tmp_path / name} is there already, and is not overwritten." in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("flags", [[], ["--output", "a", "--format", "csv"], ["--output", "a", "--turn", "last"]])
def test_usage_errors(recipe, flags):
    with pytest.raises(SystemExit) as info:
        main(["aries", "answers", "--config", recipe, *flags])
    assert info.value.code == 2
