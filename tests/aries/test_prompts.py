import json

import pytest

from trl_ext.aries.prompts import load_prompts, prompts_per_round, select_prompts
from trl_ext.recipe import RecipeError


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_rounds_see_different_prompts_in_an_order_the_seed_settles():
    rows = [{"prompt_id": str(i), "prompt": f"p{i}"} for i in range(10)]
    rounds = [select_prompts(rows, number, 3, seed=0) for number in (1, 2, 3)]
    ids = [row["prompt_id"] for a_round in rounds for row in a_round]
    assert len(set(ids)) == 9
    assert rounds[1] == select_prompts(rows, 2, 3, seed=0)
    assert rounds[0] != select_prompts(rows, 1, 3, seed=1)


def test_ids_lead_back_to_the_row(tmp_path):
    file = write(tmp_path / "train.jsonl", {"prompt": "a", "solution": 1}, {"prompt": "b", "solution": 2})
    assert load_prompts(file, "train", "prompts.dataset")[1] == {
        "prompt_id": "train-0000002",
        "prompt": "b",
        "solution": 2,
    }


def test_a_dataset_s_own_ids_are_kept_under_another_name(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt_id": "x", "prompt": "a"}, {"prompt_id": "x", "prompt": "b"})
    rows = load_prompts(file, "train", "prompts.dataset")
    assert [(row["prompt_id"], row["dataset_prompt_id"]) for row in rows] == [("p-0000001", "x"), ("p-0000002", "x")]


def test_a_malformed_json_file_is_named(tmp_path):
    (tmp_path / "p.json").write_text('{"prompt": ')
    with pytest.raises(RecipeError, match=r"`prompts.dataset`: cannot load .*p.json.*JSON parse error"):
        load_prompts(str(tmp_path / "p.json"), "train", "prompts.dataset")


def test_parquet(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"prompt": "a"}]).to_parquet(tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet"), "train", "prompts.dataset") == [
        {"prompt_id": "p-0000001", "prompt": "a"}
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], r"row 1: no column `prompt`; its columns are \['question'\]"),
        ([{"prompt": "a"}, {"prompt": "  "}], "row 2: the prompt is empty"),
        ([{"prompt": []}], "row 1: `prompt` must be text or a non-empty list of messages"),
        ([{"prompt": [{"role": "user"}]}], "row 1: `prompt` must be text or"),
        (
            [{"prompt": [{"role": "assistant", "content": "a"}]}],
            "must end with the user's, these end with the assistant's",
        ),
        ([{"prompt": "a"}, "{broken"], r"p\.jsonl:2: not valid JSON"),
        ([{"prompt": "a"}, ""], r"p\.jsonl:2: the line is empty"),
        (["[" * 100_000], r"p\.jsonl:1: not valid JSON \(maximum recursion"),
        (['{"prompt": ' + "1" * 5000 + "}"], r"p\.jsonl:1: not valid JSON \(Exceeds the limit"),
        (['{"prompt": "\\ud83d"}'], r"p\.jsonl:1: not UTF-8 text .*surrogates"),
        (
            [{"prompt": [{"role": "system", "content": 5}, {"role": "user", "content": "a"}]}],
            "row 1: `prompt` must be",
        ),
        ([{"prompt": [{"role": 7, "content": "a"}, {"role": "user", "content": "a"}]}], "row 1: `prompt` must be"),
        (["[1]"], r"p\.jsonl:1: expected a JSON object, found list"),
        ([], "has no rows"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "row 2: text and messages are mixed"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(RecipeError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", *rows), "train", "prompts.dataset")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(RecipeError, match=r"p\.jsonl:2: not UTF-8 text .*byte 0xff.* Save the file as UTF-8"):
        load_prompts(str(tmp_path / "p.jsonl"), "train", "prompts.dataset")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """The kernel refuses to read this process's memory at address 0, for root too."""
    (tmp_path / "p.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(RecipeError, match=r"`prompts.dataset`: cannot read .*p\.jsonl: Input/output error"):
        load_prompts(str(tmp_path / "p.jsonl"), "train", "prompts.dataset")


@pytest.mark.parametrize("file", ["none.jsonl", "none.parquet", f"{'x' * 300}.jsonl", "./no_such_directory"])
def test_a_missing_file_is_named_with_its_key(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="prompts.dataset.*no"):
        load_prompts(str(tmp_path / file), "train", "prompts.dataset")


def test_the_size_of_a_round():
    assert prompts_per_round(10, None, 3) == 3
    assert prompts_per_round(10, 2, 3) == 2
    with pytest.raises(RecipeError, match="3 rounds of 4 fresh prompts need 12 rows, and the dataset has 10"):
        prompts_per_round(10, 4, 3)
    with pytest.raises(RecipeError, match="the dataset has 2"):
        prompts_per_round(2, None, 3)
