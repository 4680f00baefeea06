"""The GSM8K recipes' data script, on rows in the dataset's format, and their verifier."""

import json
import runpy
from pathlib import Path

import pytest

from trl_ext.aries.config import DatasetConfig, ScorerConfig
from trl_ext.aries.data.prompts import load_prompts
from trl_ext.aries.scoring.verifier import Verifier, load_verifier


RECIPES = Path(__file__).parents[1] / "recipes"
VERIFIER = f"{RECIPES}/gsm8k/verifier.py:correct_number"
ROWS = [
    {"question": "Ann has 2 bags of 3 eggs. How many? ", "answer": "2 * 3 = <<2*3=6>>6 eggs\n#### 6"},
    {"question": "500 twice?", "answer": "500 + 500 = <<500+500=1000>>1000\n#### 1,000"},
]


@pytest.mark.parametrize(
    ("text", "solution", "score"),
    [
        ("2 * 3 = 6\n#### 6", "6", 1.0),
        ("#### 6\nNo.\n#### 7", "6", 0.0),  # the last one counts
        ("#### 6\nNo.\n#### 7", "7", 1.0),
        ("#### $1,000.00", "1000", 1.0),
        ("#### **18**", "18", 1.0),
        (r"so \boxed{-3}", "-3", 1.0),
        (r"so \boxed{\$42}.", "42", 1.0),
        ("#### 3.5", "35", 0.0),
        ("#### .5", "0.5", 1.0),
        ("#### 6 eggs", "6", 1.0),
        ("It is 6.", "6", 0.0),  # the prompt asks for ####
        ("2 * 3 = 6, so ####", "6", 0.0),  # cut off
        ("", "6", 0.0),
    ],
)
def test_verifier(text, solution, score):
    verifier = load_verifier(VERIFIER)
    assert verifier(["?"], [text], solution=[solution]) == [score]
    assert verifier(["?"], [[{"role": "assistant", "content": text}]], solution=[solution]) == [score]


def test_prepared_prompts_are_what_the_loop_reads(tmp_path):
    """From a local copy of the dataset to prompts that the loop's loader and the verifier take."""
    copy, output = tmp_path / "gsm8k", tmp_path / "build"
    copy.mkdir()
    for split in ("train", "test"):
        (copy / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main = runpy.run_path(str(RECIPES / "gsm8k" / "prepare.py"))["main"]
    main(["--dataset", str(copy), "--output", str(output)])
    prompts = load_prompts([DatasetConfig(str(output / "train.jsonl"))], "prompts.dataset")
    assert [row["solution"] for row in prompts] == ["6", "1000"]
    [message] = prompts[0]["prompt"]
    assert message["role"] == "user" and message["content"].startswith("Ann has 2 bags of 3 eggs. How many?\n\n")
    assert "####" in message["content"]
    Verifier(ScorerConfig(verifier=VERIFIER)).check([prompts])


def test_another_dataset_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "4"}) + "\n")
    main = runpy.run_path(str(RECIPES / "gsm8k" / "prepare.py"))["main"]
    with pytest.raises(ValueError, match="not GSM8K's format"):
        main(["--dataset", str(tmp_path), "--output", str(tmp_path / "build")])
