"""
The pairs of a run as a dataset: loaded back by `datasets`, taken by a trainer, and sent to a Hub on loopback that speaks the part
of the Hub's API that its client uses.
"""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from tests.aries.hub_stand_in import running_hub

from trl_ext.aries.data.records import to_line
from trl_ext.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run with pairs in three rounds: 1 and 2 trained, 3 left out by the guard."""
    monkeypatch.chdir(tmp_path)
    recipe = {
        "output_dir": "run",
        "rounds": 3,
        "model": {"model_name_or_path": "me/base", "use_peft": True},
        "prompts": {"datasets": [{"path": "prompts.jsonl"}, {"path": "trl-lib/math"}], "per_round": 2},
        "evaluation": {"dataset": "unused"},
        "pairs": {"selection": "rule_based"},
        "training": {},
        "env": {"HF_HOME": "/somewhere/of/mine"},
    }
    for number in (1, 2, 3):
        directory = Path(f"run/round_{number:02d}")
        directory.mkdir(parents=True)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"question {number}.{i}"}],
                "chosen": [{"role": "assistant", "content": "good"}],
                "rejected": [{"role": "assistant", "content": "bad"}],
                "turn": i % 2,
                "draft": None if i % 2 == 0 else "rejected",
                "weight": 1,
            }
            for i in range(number + 1)
        ]
        (directory / "pairs.jsonl").write_text("".join(map(to_line, rows)))
        (directory / "guard.json").write_text(json.dumps({"decision": "skipped" if number == 3 else "trained"}))
        if number < 3:
            (directory / "adapter").mkdir()
    Path("prompts.jsonl").write_text("")
    for file in ("r.yaml", "run/recipe.yaml"):
        Path(file).write_text(yaml.safe_dump(recipe))
    return tmp_path / "run"


def test_datasets_loads_what_was_trained_on(run, tmp_path, capsys):
    assert main(["aries", "pairs", "--config", "r.yaml", "--output", "deep/my-pairs"]) == 0
    assert "deep/my-pairs: 5 rows of 2 rounds." in capsys.readouterr().out
    rows = datasets.load_dataset("deep/my-pairs", split="train", cache_dir=str(tmp_path / "cache")).to_list()
    expected = [
        {**json.loads(line), "round": number}
        for number in (1, 2)
        for line in (run / f"round_{number:02d}/pairs.jsonl").read_text().splitlines()
    ]
    assert rows == expected
    one = datasets.load_dataset("deep/my-pairs", "round_02", split="train", cache_dir=str(tmp_path / "cache"))
    assert one.to_list() == expected[2:]
    card = Path("deep/my-pairs/README.md").read_text()
    for text in (
        "# my-pairs\n",
        "5 preference rows",
        "- `prompts.jsonl`\n- `trl-lib/math`\n",
        "selection: rule_based",
    ):
        assert text in card
    assert "/somewhere/of/mine" not in card


def test_the_pairs_can_be_trained_on(run):
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_ext.scripts.preference import load_pairs

    main(["aries", "pairs", "--config", "r.yaml", "--output", "my-pairs"])
    train, _ = load_pairs(
        ScriptArguments(dataset_name="my-pairs"), DatasetMixtureConfig(), evaluate=False, seed=0, processing_class=None
    )
    assert len(train) == 5 and train[0]["chosen"] == [{"role": "assistant", "content": "good"}]


def test_errors(run, capfd):
    Path("full").mkdir()
    Path("full/kept").write_text("")
    assert main(["aries", "pairs", "--config", "r.yaml", "--output", "full"]) == 2
    assert "error: --output: full is there already, and is not overwritten." in capfd.readouterr().err
    assert main(["aries", "pairs", "--config", "r.yaml", "--output", "new", "--output_dir", "elsewhere"]) == 2
    assert "error: elsewhere has no trained round" in capfd.readouterr().err
    assert main(["aries", "pairs", "--config", "r.yaml", "--output", "new", "--push_to_hub", "not a name"]) == 2
    assert "error: --push_to_hub: Repo id must" in capfd.readouterr().err
    assert not Path("new").exists()


def test_that_there_are_no_pairs_is_said_at_once(run):
    """Without torch and transformers, which take seconds and are for the card."""
    code = (
        "import sys; from trl_ext.cli import main; code = main(sys.argv[1:]);"
        "print(code, *sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    command = ["aries", "pairs", "--config", "r.yaml", "--output", "new", "--output_dir", "elsewhere"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert "error: elsewhere has no trained round" in done.stderr
    assert done.stdout == "2\n"


def test_an_upload_is_what_lies_here(run, monkeypatch, capfd):
    def push(output: str, token: str) -> tuple[int, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        code = main(["aries", "pairs", "run", "--output", output, "--push_to_hub", "me/my-pairs", "--private"])
        return code, capfd.readouterr().err

    with running_hub() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        assert push("my-pairs", "hf_right")[0] == 0
        assert hub.repos["dataset/me/my-pairs"]["visibility"] == "private"
        assert {
            name: content for name, content in hub.files["dataset/me/my-pairs"].items() if name != ".gitattributes"
        } == {file.name: file.read_bytes() for file in Path("my-pairs").iterdir()}
        assert 'load_dataset("me/my-pairs"' in Path("my-pairs/README.md").read_text()

        code, error = push("other", "hf_wrong")  # before any work
        assert code == 2 and not Path("other").exists()
        assert "error: --push_to_hub: the dataset me/my-pairs cannot be made: " in error
        assert "`hf auth login`" in error and "hf_wrong" not in error

        hub.refuse = 403  # the files stay
        code, error = push("kept", "hf_right")
        assert code == 1 and Path("kept/round_01.jsonl").exists()
        assert "hf upload me/my-pairs kept --repo-type dataset" in error
