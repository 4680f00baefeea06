"""
Rows on their way into a trainer. Oracle: TRL's own preparation of the same rows in TRL's form, written by hand in `shapes.py`; for what is
left out, the number of the row.
"""

import contextlib
import gzip
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from datasets import Dataset, IterableDataset, disable_progress_bars
from PIL import Image
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.rows.shapes import CONVERTED, MESSAGES, ODD, REFUSED, TEXT, assistant, system, user
from trl_ext import SelfRefineDPOTrainer
from trl_ext.recipe import RecipeError
from trl_ext.rows import pairs
from trl_ext.rows.formats import Columns, read_pair
from trl_ext.rows.judge import TOKENS
from trl_ext.trainers.prepared import _Preparing, prepared_pairs


@pytest.fixture
def args(tmp_path) -> DPOConfig:
    return DPOConfig(str(tmp_path), use_cpu=True, bf16=False)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def ids(rows: list[dict], tokenizer, args: DPOConfig) -> dict[str, list]:
    prepared = DPOTrainer._prepare_dataset(
        _Preparing(tokenizer), Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, args, "train"
    )
    return {name: prepared[name][:] for name in TOKENS}


@pytest.mark.parametrize("shape", CONVERTED)
def test_one_meaning_is_converted(shape, tokenizer, args):
    published, standard = CONVERTED[shape]
    prepared, account = prepared_pairs(Dataset.from_list(published, on_mixed_types="use_json"), tokenizer, args)
    assert {name: prepared[name][:] for name in TOKENS} == ids(standard, tokenizer, args)
    assert not account.findings.dropped
    said = account.conversion or ""
    assert bool(said) == (published is not standard and shape != "whole conversations")


@pytest.mark.parametrize("shape", CONVERTED)
def test_streams_too(shape, tokenizer, args):
    published, standard = CONVERTED[shape]
    stream = IterableDataset.from_generator(lambda: iter(published))
    rows = list(prepared_pairs(stream, tokenizer, args)[0])
    assert {name: [row[name] for row in rows] for name in TOKENS} == ids(standard, tokenizer, args)


def test_what_is_in_trl_s_form_goes_through_unchanged(tokenizer, args):
    """Columns of others stay, and nothing is said."""
    dataset = Dataset.from_list([{**row, "turn": 1} for row in MESSAGES])
    prepared, account = prepared_pairs(dataset, tokenizer, args)
    assert prepared.select_columns(dataset.column_names).to_list() == dataset.to_list()
    assert account.lines == []


@pytest.mark.parametrize("shape", REFUSED)
def test_other_kinds_are_refused_by_name(shape, tokenizer, args):
    rows, message = REFUSED[shape]
    with pytest.raises(RecipeError) as info:
        prepared_pairs(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, args)
    assert message in str(info.value)


@pytest.mark.parametrize("kind", ODD)
def test_odd_rows_are_left_out_and_counted(kind, tokenizer, args):
    """The first of three rows, so that no decision can be taken from it alone; two of three are refused."""
    row, message = ODD[kind]
    prepared, account = prepared_pairs(Dataset.from_list([row, *MESSAGES], on_mixed_types="use_json"), tokenizer, args)
    assert {name: prepared[name][:] for name in TOKENS} == ids(MESSAGES, tokenizer, args)
    (line,) = account.findings.drops
    assert (
        line.startswith("Left out: 1 of 3 rows of the train dataset ") and message in line and "first: row 1" in line
    )
    with pytest.raises(RecipeError, match="2 in all: more than 50% of them"):
        prepared_pairs(Dataset.from_list([row, row, MESSAGES[0]], on_mixed_types="use_json"), tokenizer, args)
    with pytest.raises(RecipeError, match="1 in all: nothing is left"):
        prepared_pairs(Dataset.from_list([row], on_mixed_types="use_json"), tokenizer, args)


def test_a_prompt_that_texts_share(tokenizer, args):
    """Plain texts without a prompt column: what both begin with, as TRL has it, whatever else becomes of the rows."""
    shared = [{key: f"{row['prompt']}{row[key]}" for key in ("chosen", "rejected")} for row in TEXT]
    expected = ids(shared, tokenizer, args)
    assert [len(prompt) for prompt in expected["prompt_ids"]] == [6, 7]  # "because" is the beginning of both answers
    listed = [{key: [text] for key, text in row.items()} for row in shared]
    for rows in (shared, listed, [*shared, {"chosen": "a", "rejected": None}]):
        prepared, _ = prepared_pairs(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, args)
        assert {name: prepared[name][:] for name in TOKENS} == expected


def test_roles_that_the_template_drops_or_refuses(tokenizer, args):
    """Templates made for it: one knows two roles only, one wants them to alternate."""
    two_users = {"prompt": [user("a"), user("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    narrator = {**two_users, "prompt": [{"role": "narrator", "content": "a"}, user("b")]}
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role in ('user', 'assistant') %}<{{ m.role }}> {{ m.content }} </s> {% endif %}{% endfor %}"
    )
    _, account = prepared_pairs(Dataset.from_list([*MESSAGES, *MESSAGES, two_users, narrator]), tokenizer, args)
    assert account.findings.dropped == {"role": 2}
    assert (
        "first: row 5: roles user, user | assistant; the template refuses them: roles must alternate"
        in (account.findings.drops[0])
    )
    _, account = prepared_pairs(Dataset.from_list([*MESSAGES, narrator]), tokenizer, args)
    assert "roles narrator, user | assistant; the template drops `narrator`" in account.findings.drops[0]


def test_tokens_decide(tokenizer, args):
    """Answers that differ in white space only, differ behind `max_length` only, or whose prompt fills it; ids without embeddings."""
    same = {"prompt": "what runs ?", "chosen": " the fox", "rejected": "  the  fox"}
    late = {
        "prompt": "what runs ?",
        "chosen": " the fox runs and the fox sleeps",
        "rejected": " the fox runs and the fox jumps",
    }
    long = {"prompt": "what runs ? " * 3, "chosen": " a", "rejected": " b"}
    args.max_length = 8
    _, account = prepared_pairs(Dataset.from_list([*TEXT, *TEXT, same, late, long]), tokenizer, args, vocabulary=1000)
    assert account.findings.dropped == {"identical ids": 2, "too long": 1}
    assert account.findings.first["identical ids"][0] == 5 and account.findings.first["too long"][0] == 7
    plain = {"prompt": "the fox runs", "chosen": " the", "rejected": " fox"}
    question = {**plain, "prompt": "the fox runs ?"}
    number = tokenizer.convert_tokens_to_ids("?")
    _, account = prepared_pairs(Dataset.from_list([plain, question]), tokenizer, args, vocabulary=number)
    assert account.findings.dropped == {"no embedding": 1}
    assert (
        f"first: row 2: the text '?' is {number}, and the model has {number} embeddings" in account.findings.drops[0]
    )


def test_text_and_a_chat_template(tokenizer, args):
    """Plain text is trained as it is, and said to be; so is text that somebody rendered."""
    _, account = prepared_pairs(Dataset.from_list(TEXT), tokenizer, args)
    assert account.findings.warned == {"plain text": 2}
    rendered = [{**row, "prompt": f"<user> {row['prompt']} </s>"} for row in TEXT]
    _, account = prepared_pairs(Dataset.from_list(rendered), tokenizer, args)
    assert account.findings.warned == {"rendered": 2}
    with pytest.raises(RecipeError, match="Sr-DPO's prompt"):
        prepared_pairs(
            Dataset.from_list(rendered), tokenizer, args, takes_rendered=SelfRefineDPOTrainer.takes_rendered
        )
    tokenizer.chat_template = None
    _, account = prepared_pairs(Dataset.from_list(TEXT), tokenizer, args)
    assert account.lines == []
    with pytest.raises(RecipeError, match="no chat template"):
        prepared_pairs(Dataset.from_list(MESSAGES), tokenizer, args)
    with pytest.raises(RecipeError, match="no chat template"):
        prepared_pairs(Dataset.from_list(CONVERTED["Orca"][0]), tokenizer, args)


def test_what_a_template_raises_has_its_row(tokenizer, args):
    """An error of the template's own code, on one row's content."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ 1 / (0 if m.content == 'four .' else 1) }} {% endfor %}"
    )
    with pytest.raises(RecipeError, match=r"row 2 cannot be rendered: ZeroDivisionError: .*`rejected` is .*four \."):
        prepared_pairs(Dataset.from_list([MESSAGES[1], MESSAGES[0]]), tokenizer, args)


def write(path: Path, rows: list[dict]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        file.write(lines)
    return str(path)


class TestFiles:
    """Files of other kinds, and mixtures. Oracle: the rows that were written."""

    def load(self, tokenizer=None, **kwargs):
        from trl import DatasetMixtureConfig, ScriptArguments

        from trl_ext.scripts.preference import load_pairs

        datasets = kwargs.pop("datasets", [])
        options = {name: kwargs.pop(name) for name in ("test_split_size", "streaming") if name in kwargs}
        mixture = DatasetMixtureConfig(datasets=datasets, **options)
        return load_pairs(ScriptArguments(**kwargs), mixture, evaluate=False, seed=0, processing_class=tokenizer)[0]

    @pytest.mark.parametrize("name", ["p.jsonl.gz", "p.ndjson", "p.ndjson.gz"])
    def test_lines(self, tmp_path, name):
        assert self.load(dataset_name=write(tmp_path / name, MESSAGES)).to_list() == MESSAGES

    def test_tsv(self, tmp_path):
        path = tmp_path / "p.tsv"
        lines = ["\t".join(TEXT[0]), *("\t".join(row.values()) for row in TEXT)]
        path.write_text("\n".join(lines) + "\n")
        assert self.load(dataset_name=str(path)).to_list() == TEXT

    @pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
    def test_words_that_pandas_reads_as_missing(self, tmp_path, name):
        """In a file and in a directory of files, alone and in a mixture."""
        separator = "," if name.endswith(".csv") else "\t"
        rows = [{"prompt": "a", "chosen": "None", "rejected": "N/A"}]
        (tmp_path / name).write_text("\n".join(map(separator.join, (rows[0], rows[0].values()))))
        for path in map(str, (tmp_path / name, tmp_path)):
            assert self.load(dataset_name=path).to_list() == self.load(datasets=[{"path": path}]).to_list() == rows

    def test_a_mixture_of_shapes(self, tmp_path, tokenizer, args):
        """Each dataset in its own shape, the second without its first row, whose answers are equal."""
        orca, standard = CONVERTED["Orca"]
        spoilt = {**orca[0], "chosen": orca[0]["rejected"]}
        files = [
            write(tmp_path / "a.jsonl", MESSAGES),
            write(tmp_path / "b.jsonl", [spoilt, *orca]),
            write(tmp_path / "c.jsonl", CONVERTED["ShareGPT"][0]),
        ]
        train = self.load(tokenizer, datasets=[{"path": file} for file in files])
        prepared, account = prepared_pairs(train, tokenizer, args)
        expected = ids([*MESSAGES, *standard, *MESSAGES], tokenizer, args)
        assert {name: prepared[name][:] for name in TOKENS} == expected and not account.findings.dropped

    def test_a_streamed_mixture_has_one_form(self, tmp_path, tokenizer, args, monkeypatch):
        """Columns that nothing reads may differ. Others would make all later rows unusable, and these are not counted."""
        monkeypatch.setattr(pairs, "STREAMED_ROWS", 2)
        argilla = [{"instruction": r["prompt"], **{k: r[k] for k in ("chosen", "rejected")}} for r in TEXT]
        scored = write(tmp_path / "b.jsonl", [{**row, "score": 1} for row in TEXT])
        files = [{"path": write(tmp_path / "a.jsonl", TEXT)}, {"path": scored}]
        stream = self.load(tokenizer, datasets=files, streaming=True)
        assert len(list(prepared_pairs(stream, tokenizer, args)[0])) == 4
        files.append({"path": write(tmp_path / "c.jsonl", argilla)})
        with pytest.raises(
            RecipeError, match="`instruction`, `chosen`, `rejected` and `prompt`, `chosen`, `rejected`"
        ):
            self.load(tokenizer, datasets=files, streaming=True)

    def test_a_mixture_keeps_its_images(self, tmp_path, tokenizer):
        """Of datasets whose other columns differ. Oracle: the pixels that were written."""
        files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
        for number, (file, row) in enumerate(zip(files, MESSAGES, strict=True)):
            image = Image.new("RGB", (1, 1), (number, 0, 0))
            Dataset.from_list([{**row, "images": [image], "score" * (number + 1): 1}]).to_parquet(file)
        train = self.load(tokenizer, datasets=[{"path": file} for file in files])
        assert [row["images"][0].getpixel((0, 0))[0] for row in train] == [0, 1]

    def test_fractions_are_trl_s(self, tmp_path):
        """By hand: of 6 and 2 rows in equal shares, 2 and 2."""
        files = [write(tmp_path / "a.jsonl", TEXT * 3), write(tmp_path / "b.jsonl", TEXT)]
        train = self.load(datasets=[{"path": file, "fraction": 0.5} for file in files])
        assert train.to_list() == TEXT * 2


JSON_ANSWER = {"prompt": "what runs ?", "chosen": '{"role": "fox", "company": "two"}', "rejected": '{"value": 3}'}
SET_NOTATION = {"prompt": "what runs ?", "chosen": "{{1,2},{3}}", "rejected": " no"}


@pytest.mark.parametrize(
    "row", [JSON_ANSWER, SET_NOTATION, {**TEXT[0], "chosen": ["a", "b"]}], ids=["JSON", "set", "list"]
)
def test_no_row_makes_messages_of_the_others(row, tokenizer, args):
    """Answers that are JSON but no messages, and a row that is left out anyway: the others stay plain text, as TRL has them."""
    rows = [*TEXT, *TEXT, row]
    prepared, account = prepared_pairs(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, args)
    kept = rows[: len(prepared)]
    assert {name: prepared[name][:] for name in TOKENS} == ids(kept, tokenizer, args)
    assert account.findings.dropped.total() == len(rows) - len(kept) == isinstance(row["chosen"], list)


def test_a_text_that_begins_as_the_prompt_by_chance():
    rows = [
        {"prompt": "one", "chosen": "oneself", "rejected": "ones"},
        {"prompt": "two", "chosen": "twofold", "rejected": "twos"},
    ]
    assert not any(read_pair(row, Columns.of(list(row)), cut_prompt=True).done for row in rows)


DOUBLED = {
    "system in the answers": (
        [user("what runs ?")],
        [system("brief"), user("what runs ?"), assistant("red")],
        [system("brief"), user("what runs ?"), assistant("blue")],
    ),
    "system in the prompt": (
        [system("brief"), user("what runs ?")],
        [user("what runs ?"), assistant("red")],
        [user("what runs ?"), assistant("blue")],
    ),
}


@pytest.mark.parametrize("shape", DOUBLED)
def test_a_prompt_is_not_doubled(shape, tokenizer, args):
    """By hand: the system's message once, the question once."""
    prompt, chosen, rejected = DOUBLED[shape]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    standard = {
        "prompt": [system("brief"), user("what runs ?")],
        "chosen": [assistant("red")],
        "rejected": [assistant("blue")],
    }
    prepared, _ = prepared_pairs(Dataset.from_list([row]), tokenizer, args)
    assert {name: prepared[name][:] for name in TOKENS} == ids([standard], tokenizer, args)


UNUSABLE = {
    "the answer in the prompt": {
        "messages": [user("what runs ?"), assistant("brief")],
        "chosen": [assistant("brief")],
        "rejected": [assistant("red")],
    },
    "another question": {
        "prompt": [user("what runs ?")],
        "chosen": [user("brief"), assistant("red")],
        "rejected": [user("brief"), assistant("blue")],
    },
    "a word of the system's": {
        "prompt": "red",
        "chosen": [system("redder"), assistant("brief")],
        "rejected": [system("redder"), assistant("red")],
    },
    "a prompt beside dialogues": {
        "prompt": "You are red .",
        "chosen": "\n\nHuman: what runs ?\n\nAssistant: red",
        "rejected": "\n\nHuman: what runs ?\n\nAssistant: blue",
    },
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_would_train_on_something_else_is_left_out(kind, tokenizer, args):
    with pytest.raises(RecipeError, match="do not begin with|ends with an assistant message"):
        prepared_pairs(Dataset.from_list([UNUSABLE[kind]]), tokenizer, args)


def test_questions_that_are_not_read_are_named(tokenizer, args):
    for name in ("input", "context"):
        _, account = prepared_pairs(Dataset.from_list([{**MESSAGES[0], name: "dog"}, MESSAGES[1]]), tokenizer, args)
        assert account.findings.warned == {"unread": 1} and f"first: row 1: `{name}`" in account.findings.warnings[0]
    repeated = [
        {
            **MESSAGES[0],
            **{
                k: [assistant("what is one plus two ? " + word)]
                for k, word in (("chosen", "red"), ("rejected", "blue"))
            },
        }
    ]
    _, account = prepared_pairs(Dataset.from_list(repeated), tokenizer, args)
    assert account.findings.warned == {"repeated": 1}
    earlier = {"instruction": "what runs ?", "chosen": " red", "rejected": " blue"}
    for history in ('[["why ?", "because ."]]', [user("why ?"), assistant("because .")]):  # not pairs of texts
        _, account = prepared_pairs(Dataset.from_list([{**earlier, "history": history}]), tokenizer, args)
        assert account.findings.warned["unread"] == 1 and "first: row 1: `history`" in str(account.findings.warnings)


@pytest.mark.parametrize("row", [{"task": "what runs ?"}, {"prompt": " "}], ids=["another column", "blank"])
def test_answers_without_a_question_are_named(row, tokenizer, args):
    rows = [{**row, "chosen": good, "rejected": bad} for good, bad in (("red", "blue"), ("yes", "no"))]
    _, account = prepared_pairs(
        Dataset.from_list([*rows, {**row, "chosen": "a b", "rejected": "a c"}]), tokenizer, args
    )
    assert account.findings.warned["no question"] == (3 if "prompt" in row else 2)


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def call(name: str, **arguments) -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


TOOLS = [
    {**MESSAGES[0], "chosen": [call("plus", one=1)], "tools": [tool("plus", one={"type": "number"})]},
    {**MESSAGES[1], "chosen": [call("why", sky="blue")], "tools": [tool("why", sky={"type": "string"})]},
]


@pytest.mark.parametrize("streamed", [False, True])
def test_keys_that_other_rows_have(streamed, tmp_path, tokenizer, args):
    """Arrow gives every row the keys of all rows, as nulls. Oracle: the rows as they were written, whose nulls are their own."""
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool }} {% endfor %}{% for message in messages %}{{ message }} </s> {% endfor %}"
        "{% if add_generation_prompt %}{'role': 'assistant'{% endif %}{{ nothing | default(option is defined) }}"
    )
    rows = [{**TOOLS[0], "chat_template_kwargs": {"option": 1}}, {**TOOLS[1], "chat_template_kwargs": {"other": 1}}]
    dataset = Dataset.from_list([*rows, {**TOOLS[1], "tools": [], "chat_template_kwargs": None}])
    assert "None" in str(dataset[0]["tools"]) and "None" in str(dataset[0]["chosen"])
    prepared, account = prepared_pairs(dataset.to_iterable_dataset() if streamed else dataset, tokenizer, args)
    rows.append({**TOOLS[1], "tools": None, "chat_template_kwargs": {}})
    expected = ids(rows, tokenizer, args)
    prepared = list(prepared)
    assert {name: [row[name] for row in prepared] for name in TOKENS} == expected
    own = [{**TOOLS[0], "chosen": [call("plus", one=None)]}, TOOLS[1]]
    prepared, account = prepared_pairs(Dataset.from_list(own, on_mixed_types="use_json"), tokenizer, args)
    assert {name: prepared[name][:] for name in TOKENS} == ids(own, tokenizer, args) and not account.conversion


def test_empty_tools_of_a_stream(tokenizer, args):
    """As a CSV file has them: no tools, rather than an error of the JSON parser."""
    rows = [{**MESSAGES[0], "tools": json.dumps([tool("plus")])}, {**MESSAGES[1], "tools": ""}]
    prepared = list(prepared_pairs(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, args)[0])
    expected = ids([rows[0], {**MESSAGES[1], "tools": None}], tokenizer, args)
    assert {name: [row[name] for row in prepared] for name in TOKENS} == expected


def test_a_template_without_tools(tokenizer, args):
    """The tests' own template shows tools and drops tool calls, which would leave an empty answer; another shows neither."""
    for template, warned in (
        (tokenizer.chat_template, {}),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", {"tools": 1}),
    ):
        tokenizer.chat_template = template
        rows = [TOOLS[0], {**MESSAGES[0], "tools": TOOLS[0]["tools"]}]
        prepared, account = prepared_pairs(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, args)
        assert len(prepared) == 1 and account.findings.dropped == {"role": 1} and account.findings.warned == warned
        assert (
            "first: row 1: roles user | assistant; the template drops the tool calls of `assistant`"
            in (account.findings.drops[0])
        )


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_a_thought_that_the_template_does_not_write(key, tokenizer, args):
    tokenizer.chat_template = "{% for m in messages %}{{ m.thinking }} {{ m.content }} {% endfor %}"
    rows = [{**MESSAGES[0], "chosen": [{**assistant("red"), key: "because it is"}]}, MESSAGES[1]]
    _, account = prepared_pairs(Dataset.from_list(rows), tokenizer, args)
    assert account.findings.warned == ({} if key == "thinking" else {"thought": 1})
    assert all("first: row 1: `reasoning_content`" in line for line in account.findings.warnings)


def test_later_rows_of_a_stream(tokenizer, args, monkeypatch):
    """Beyond the rows that are looked at, what cannot be used is left out, and what can is converted."""
    monkeypatch.setattr(pairs, "STREAMED_ROWS", 2)
    sharegpt = CONVERTED["ShareGPT"][0]
    later = [
        {**MESSAGES[0], "chosen": [assistant(" ")]},
        {**MESSAGES[0], "chosen": None},
        {"prompt": None, **sharegpt[0]},
    ]
    stream = IterableDataset.from_generator(lambda: iter([*MESSAGES, *later]))
    rows = list(prepared_pairs(stream, tokenizer, args)[0])
    assert {name: [row[name] for row in rows] for name in TOKENS} == ids([*MESSAGES, MESSAGES[0]], tokenizer, args)


def test_formats_of_a_dataset(tokenizer, args):
    """A view in NumPy's or pandas' types is read as the rows it shows; a transform would be applied to the tokens again."""
    for kind in ("numpy", "pandas", "arrow"):
        prepared, _ = prepared_pairs(Dataset.from_list(TEXT).with_format(kind), tokenizer, args)
        assert {name: prepared[name][:] for name in TOKENS} == ids(TEXT, tokenizer, args)
    with pytest.raises(RecipeError, match="has a transform"):
        prepared_pairs(Dataset.from_list(TEXT).with_transform(lambda batch: batch), tokenizer, args)


CONTENT = st.one_of(
    st.none(),
    st.text(max_size=4),
    st.integers(),
    st.lists(st.text(max_size=3), max_size=2),
    st.just([{"type": "image"}]),
)
MESSAGE = st.one_of(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), CONTENT, max_size=3),
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "gpt", "x"]),
        CONTENT,
    ),
)
VALUE = st.one_of(
    CONTENT, MESSAGE, st.lists(MESSAGE, max_size=3), st.lists(st.one_of(MESSAGE, st.text(max_size=3)), max_size=2)
)


@hypothesis.given(
    st.lists(
        st.fixed_dictionaries(
            {"chosen": VALUE, "rejected": VALUE},
            optional={"prompt": VALUE, "system": VALUE, "tools": VALUE, "chat_template_kwargs": VALUE},
        ),
        min_size=1,
        max_size=3,
    )
)
@hypothesis.settings(
    max_examples=100, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck)
)
def test_no_row_ends_in_a_foreign_error(tokenizer, args, rows):
    """Whatever is in the columns: it trains, or a `RecipeError` says why not."""
    try:
        dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    except (TypeError, ValueError, OverflowError):
        return  # no dataset
    disable_progress_bars()
    with contextlib.suppress(RecipeError):
        prepared, account = prepared_pairs(dataset, tokenizer, args, vocabulary=len(tokenizer))
        assert len(prepared) + account.findings.dropped.total() == len(rows)
        assert all(row["chosen_ids"] and row["rejected_ids"] for row in prepared)
