"""`load_pairs`: what migrated recipes need of it. Oracle: the rows that go in."""

import json
from pathlib import Path

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from trl_ext.recipe import RecipeError
from trl_ext.scripts.preference import load_pairs


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@pytest.fixture
def pairs(tmp_path):
    """Writes four rows, whose prompt is text, with these messages before every answer."""

    def write(before: list[dict]) -> ScriptArguments:
        rows = [
            {"prompt": f"q{i}", **{k: [*before, message("assistant", f"{k}{i}")] for k in ("chosen", "rejected")}}
            for i in range(4)
        ]
        path = Path(tmp_path) / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ScriptArguments(dataset_name=str(path))

    return write


def test_text_prompt_beside_conversations(pairs, capsys):
    """It repeats their first message; the columns that `DPOTrainer` can train on stay."""
    train, _ = load_pairs(pairs([message("user", "q")]), DatasetMixtureConfig(), evaluate=False, seed=0)
    assert train.column_names == ["chosen", "rejected"]
    assert "`prompt` is text beside conversations that begin with it" in capsys.readouterr().err


def test_text_prompt_beside_answers_in_messages(pairs):
    with pytest.raises(RecipeError, match="Make the prompt messages too"):
        load_pairs(pairs([]), DatasetMixtureConfig(), evaluate=False, seed=0)


@pytest.mark.parametrize(("size", "rows"), [(0.25, (3, 1)), (2.0, (2, 2))])
def test_size_of_the_evaluation_split(pairs, size, rows):
    """Below 1 a share, from 1 a number of rows, whole but declared as a float by TRL."""
    halves = load_pairs(
        pairs([message("user", "q")]), DatasetMixtureConfig(test_split_size=size), evaluate=True, seed=0
    )
    assert tuple(len(half) for half in halves) == rows
