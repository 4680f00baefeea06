"""
The task of `make quickstart-real`: its rows and its verifier.

The oracle of the verifier is the sentence: each case breaks one thing that can be seen by reading it.
"""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

from trl_ext.aries.data.templates import compile_template, refinement_prompt
from trl_ext.aries.scoring.verifier import load_verifier


TASK = Path(__file__).parents[1] / "recipes" / "quickstart-real"
SIZES = ("--sft=60", "--train=40", "--evaluation=20")


def make(directory: Path, *arguments: str) -> dict[str, list[dict]]:
    command = [sys.executable, str(TASK / "prepare.py"), f"--output={directory}", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in directory.iterdir()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    return make(tmp_path_factory.mktemp("rows"), *SIZES)


@pytest.fixture(scope="module")
def score():
    return load_verifier(f"{TASK}/verifier.py:share_kept")


def test_no_prompt_comes_twice(rows):
    assert {name: len(found) for name, found in rows.items()} == {"sft": 120, "train": 40, "eval": 20}
    direct = [row for row in rows["sft"] if "draft" not in row]
    prompts = [row["prompt"] for row in chain(direct, rows["train"], rows["eval"])]
    assert len(direct) == 60 and len(set(prompts)) == len(prompts)


def test_rows_are_those_of_the_seed(rows, tmp_path):
    assert make(tmp_path / "again", *SIZES) == rows
    assert make(tmp_path / "other", *SIZES, "--seed=1") != rows


def test_half_of_the_evaluation_combines_other_kinds(rows):
    kinds = {
        name: {frozenset(constraint["kind"] for constraint in row["constraints"]) for row in found}
        for name, found in rows.items()
    }
    seen, unseen = (
        {frozenset(c["kind"] for c in row["constraints"]) for row in rows["eval"] if row["unseen"] == which}
        for which in (False, True)
    )
    assert all(len(pair) == 2 for pair in chain(*kinds.values()))
    assert sum(row["unseen"] for row in rows["eval"]) == 10
    assert not unseen & (kinds["train"] | kinds["sft"] | seen)


def test_what_the_warm_start_teaches(rows, score):
    """Direct answers and drafts of every quality, refinements that keep to both constraints, and no change to a draft that does."""

    def scored(text: str, row: dict) -> float:
        return score(completions=[text], thing=[row["thing"]], constraints=[row["constraints"]])[0]

    refinements = [row for row in rows["sft"] if "draft" in row]
    direct = {scored(row["completion"], row) for row in rows["sft"] if "draft" not in row}
    drafts = [scored(row["draft"], row) for row in refinements]
    assert set(drafts) == direct == {0.0, 0.5, 1.0}
    assert {scored(row["completion"], row) for row in refinements} == {1.0}
    kept = [row["draft"] == row["completion"].strip() for row in refinements]
    assert kept == [value == 1.0 for value in drafts]
    # The space belongs to the answer, and the EOS token ends it
    assert all(row["completion"] == " " + row["completion"].strip() for row in rows["sft"])


@pytest.mark.parametrize(
    ("answer", "constraints", "expected"),
    [
        ("Today the old river sings again.", {"start": "today", "end": "again"}, 1.0),
        ("  Today the old river sings again. ", {"start": "today", "count": "6"}, 1.0),
        ("Today the old river sings again.", {"start": "now", "count": "6"}, 0.5),
        ("Today the old river sings again.", {"include": "golden", "mark": "?"}, 0.0),
        ("Today the golden river sings again?", {"include": "golden", "mark": "?"}, 1.0),
        ("The goldenrod river sings again today.", {"include": "golden", "end": "today"}, 0.5),
        ("TODAY THE OLD RIVER SINGS!", {"capitals": "", "mark": "!"}, 1.0),
        ("TODAY THE OLD RIVER sings!", {"capitals": "", "mark": "!"}, 0.5),
        ("Today the old lake sings again.", {"start": "today", "end": "again"}, 0.0),  # about something else
        ("Today the river again.", {"start": "today", "end": "again"}, 0.0),  # four words
        ("Today the river" + " sings" * 17 + " again.", {"start": "today", "end": "again"}, 0.0),  # 21
        ("Today the old river\nsings again.", {"start": "today", "end": "again"}, 0.0),  # two lines
        ("", {"start": "today", "capitals": ""}, 0.0),
    ],
)
def test_verifier(score, answer, constraints, expected):
    asked = [{"kind": kind, "value": value} for kind, value in constraints.items()]
    assert score(completions=[answer], thing=["wide river"], constraints=[asked]) == [expected]


def test_the_recipe_and_the_rows_fit(tmp_path):
    """There are prompts for all rounds, and the template has the draft where an answer would be."""
    recipe = yaml.safe_load((TASK / "aries.yaml").read_text())
    rows = make(tmp_path)
    assert len(rows["train"]) >= recipe["rounds"] * recipe["prompts"]["per_round"]
    prompt, template = rows["train"][0]["prompt"], compile_template(recipe["refinements"]["template"])
    assert refinement_prompt(prompt, [" It is. "], template).startswith(f"{prompt} It is.\n")
