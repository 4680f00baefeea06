import json
import random
from dataclasses import fields

import pytest

from trl_ext.aries.config import DatasetConfig, PromptsConfig
from trl_ext.aries.data.prompts import load_prompts, prompts_per_round, select_prompts
from trl_ext.aries.data.records import write_jsonl
from trl_ext.recipe import RecipeError


def write(path, *rows):
    lines = (json.dumps(row) if isinstance(row, dict) else row for row in rows)
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return str(path)


def test_rounds_see_different_prompts_in_an_order_the_seed_settles(tmp_path):
    file = write(tmp_path / "p.jsonl", *({"prompt": f"p{i}"} for i in range(10)))
    prompts = load_prompts([DatasetConfig(file)], "prompts.dataset")
    rounds = [list(select_prompts(prompts, number, 3, seed=0)) for number in (1, 2, 3)]
    ids = [row["prompt_id"] for a_round in rounds for row in a_round]
    assert len(set(ids)) == 9
    assert rounds[1] == list(select_prompts(prompts, 2, 3, seed=0))
    assert rounds[0] != list(select_prompts(prompts, 1, 3, seed=1))


def test_rows_are_read_from_their_files_as_if_all_were_in_memory(tmp_path):
    """
    Oracle: the mixture as a list, shuffled as a list; the bytes of `prompts.jsonl` are compared.
    """
    from datasets import Dataset

    texts = [{"prompt": f"p{i} é\u2028", "prompt_id": f"own-{i}", "n": i / 7, "unused": i} for i in range(2000)]
    write(tmp_path / "a.jsonl", *texts)
    table = [{"prompt": f"q{i}", "n": None if i % 3 else i / 3, "tags": [f"t{i}"]} for i in range(3000)]
    Dataset.from_list(table).to_parquet(tmp_path / "b.parquet")
    entries = [
        DatasetConfig(str(tmp_path / "a.jsonl"), columns=["prompt", "prompt_id", "n"], fraction=1.0),
        DatasetConfig(str(tmp_path / "b.parquet"), fraction=2.0),
    ]
    expected = [
        {"prompt_id": f"a-{i + 1:07d}", "prompt": row["prompt"], "dataset_prompt_id": row["prompt_id"], "n": row["n"]}
        for i, row in enumerate(texts[:1500])
    ]
    expected += [{"prompt_id": f"b-{i + 1501:07d}", **row} for i, row in enumerate(table)]
    prompts = load_prompts(entries, "prompts.datasets")
    assert len(prompts) == 4500 and list(prompts) == expected
    assert prompts[1499:1501] == expected[1499:1501] and prompts[-1] == expected[-1]
    with pytest.raises(IndexError):
        prompts[4500]

    order = list(range(4500))
    random.Random(3).shuffle(order)
    write_jsonl(tmp_path / "prompts.jsonl", select_prompts(prompts, 2, 2000, seed=3))
    lines = [json.dumps(expected[i], ensure_ascii=False) + "\n" for i in order[2000:4000]]
    assert (tmp_path / "prompts.jsonl").read_text(encoding="utf-8") == "".join(lines)


def test_rows_of_json_lines_are_as_they_are_in_the_file(tmp_path):
    """
    Dates stay text, large integers keep their digits, a column may be absent or of several types; `datasets` would change all but the last.
    What happens to the file afterwards makes no difference.
    """
    rows = [
        {"prompt": "a", "date": "2026-02-28", "at": "2026-02-28T01:02:03", "n": 10**30, "mixed": 1},
        {"prompt": "b", "tags": [], "mixed": "x", "nested": {"x": None}},
        {"prompt": "c", "nested": {"y": 0.1}, "mixed": [1.5]},
    ]
    prompts = load_prompts([DatasetConfig(write(tmp_path / "p.jsonl", *rows))], "prompts.dataset")
    (tmp_path / "p.jsonl").unlink()
    assert list(prompts) == [{"prompt_id": f"p-{i:07d}", **row} for i, row in enumerate(rows, start=1)]


def test_ids_lead_back_to_the_row(tmp_path):
    file = write(tmp_path / "train.jsonl", {"prompt": "a", "solution": 1}, {"prompt": "b", "solution": 2})
    assert load_prompts([DatasetConfig(file)], "prompts.dataset")[1] == {
        "prompt_id": "train-0000002",
        "prompt": "b",
        "solution": 2,
    }


def test_a_dataset_s_own_ids_are_kept_under_another_name(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt_id": "x", "prompt": "a"}, {"prompt_id": "x", "prompt": "b"})
    rows = load_prompts([DatasetConfig(file)], "prompts.dataset")
    assert [(row["prompt_id"], row["dataset_prompt_id"]) for row in rows] == [("p-0000001", "x"), ("p-0000002", "x")]


def test_a_malformed_json_file_is_named(tmp_path):
    (tmp_path / "p.json").write_text('{"prompt": ')
    with pytest.raises(RecipeError, match=r"`prompts.dataset`: .*p\.json.*JSON"):
        load_prompts([DatasetConfig(str(tmp_path / "p.json"))], "prompts.dataset")


def test_parquet(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"prompt": "a"}]).to_parquet(tmp_path / "p.parquet")
    prompts = load_prompts([DatasetConfig(str(tmp_path / "p.parquet"))], "prompts.dataset")
    assert list(prompts) == [{"prompt_id": "p-0000001", "prompt": "a"}]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8-sig")
    assert [row["prompt"] for row in load_prompts([DatasetConfig(str(file))], "prompts.dataset")] == ["a", "b"]


def test_words_that_pandas_reads_as_missing(tmp_path):
    """In a CSV file and in a directory of them."""
    (tmp_path / "train.csv").write_text("prompt,answer\nNone,N/A\n")
    for path in (tmp_path / "train.csv", tmp_path):
        [row] = load_prompts([DatasetConfig(str(path))], "prompts.dataset")
        assert (row["prompt"], row["answer"]) == ("None", "N/A")


def test_a_mixture_is_trl_s(tmp_path):
    """The same rows as TRL's `get_dataset`, fractions, columns and data files included."""
    from datasets import Dataset
    from trl import DatasetMixtureConfig, get_dataset
    from trl.scripts.utils import DatasetConfig as TRLDatasetConfig

    write(tmp_path / "a.jsonl", *({"prompt": f"a{i}", "answer": i} for i in range(12)))
    (tmp_path / "b").mkdir()
    Dataset.from_list([{"prompt": f"b{i}", "answer": i, "other": 0} for i in range(9)]).to_parquet(
        tmp_path / "b/train.parquet"
    )
    b = {"path": str(tmp_path / "b"), "columns": ["prompt", "answer"]}
    for fractions in ((None, None), (1.0, 3.0), (0.75, 0.25)):
        entries = [{"path": str(tmp_path / "a.jsonl"), "fraction": fractions[0]}, {**b, "fraction": fractions[1]}]
        ours = load_prompts(
            PromptsConfig(datasets=[DatasetConfig(**e) for e in entries]).entries(), "prompts.datasets"
        )
        entries[0] |= {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
        theirs = get_dataset(DatasetMixtureConfig(datasets=[TRLDatasetConfig(**entry) for entry in entries]))["train"]
        assert [{"prompt": row["prompt"], "answer": row["answer"]} for row in ours] == theirs.to_list()
        assert len({row["prompt_id"] for row in ours}) == len(ours) and ours[-1]["prompt_id"].startswith("b-0")


def test_entries_have_trl_s_keys():
    from trl.scripts.utils import DatasetConfig as TRLDatasetConfig

    def keys(cls):
        return [(field.name, field.default) for field in fields(cls)]

    assert keys(DatasetConfig) == keys(TRLDatasetConfig)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "`dataset` is missing"),
        ({"dataset": "a", "datasets": [DatasetConfig("b")]}, "are both given. Remove one"),
        (
            {"datasets": [DatasetConfig("a", fraction=0.5), DatasetConfig("b")]},
            "give a `fraction` to every dataset",
        ),
    ],
)
def test_one_dataset_or_a_whole_mixture(given, key):
    with pytest.raises(ValueError, match=key):
        PromptsConfig(**given)


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([{"question": "a"}], r"row 1: .*`prompt`.*question"),
        ([{"prompt": "a"}, {"prompt": "  "}], "row 2: "),
        ([{"prompt": []}], "row 1: "),
        ([{"prompt": [{"role": "user"}]}], "row 1: "),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "row 1: .*assistant's"),
        ([{"prompt": [{"role": "system", "content": 5}, {"role": "user", "content": "a"}]}], "row 1: "),
        ([{"prompt": [{"role": 7, "content": "a"}, {"role": "user", "content": "a"}]}], "row 1: "),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "row 2: "),
        ([{"prompt": "a"}, "{broken"], r"p\.jsonl:2: .*JSON"),
        ([{"prompt": "a"}, ""], r"p\.jsonl:2: .*empty"),
        (["[" * 100_000], r"p\.jsonl:1: .*recursion"),
        (['{"prompt": ' + "1" * 5000 + "}"], r"p\.jsonl:1: "),
        (['{"prompt": "\\ud83d"}'], r"p\.jsonl:1: .*UTF-8"),
        ([{"prompt": "a"}, b'{"prompt": "\xff"}'], r"p\.jsonl:2: .*UTF-8.*0xff"),
        (["[1]"], r"p\.jsonl:1: .*list"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, place):
    with pytest.raises(RecipeError, match=f"`prompts.dataset`: .*{place}"):
        load_prompts([DatasetConfig(write(tmp_path / "p.jsonl", *rows))], "prompts.dataset")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """The kernel refuses to read this process's memory at address 0, for root too."""
    (tmp_path / "p.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(RecipeError, match=r"`prompts.dataset`: .*p\.jsonl: Input/output error"):
        load_prompts([DatasetConfig(str(tmp_path / "p.jsonl"))], "prompts.dataset")


@pytest.mark.parametrize("file", ["none.jsonl", "none.parquet", f"{'x' * 300}.jsonl", "./no_such_directory"])
def test_a_missing_file_is_named_with_its_key(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="prompts.dataset.*no"):
        load_prompts([DatasetConfig(str(tmp_path / file))], "prompts.dataset")


def test_the_size_of_a_round():
    assert prompts_per_round(10, None, 3) == 3
    assert prompts_per_round(10, 2, 3) == 2
    for rows, per_round in ((10, 4), (2, None)):
        with pytest.raises(RecipeError, match="`prompts.per_round`: 3 rounds"):
            prompts_per_round(rows, per_round, 3)


def test_places_of_a_mixture(tmp_path):
    """File and row of each, whatever its number in the mixture; `samples` takes the first ones."""
    files = [write(tmp_path / name, {"prompt": "a"}, {"prompt": "b"}) for name in ("p.jsonl", "q.jsonl")]
    prompts = load_prompts([DatasetConfig(file) for file in files], "prompts.datasets", samples=3)
    assert len(prompts) == 3
    assert [(place, row["prompt"]) for place, row in prompts.placed()] == [
        (f"{files[0]}, row 1", "a"),
        (f"{files[0]}, row 2", "b"),
        (f"{files[1]}, row 1", "a"),
    ]
