import datetime
import json

import numpy as np
import pytest

from trl_ext.aries.data.records import (
    Answer,
    Chain,
    decode,
    encode,
    encoder,
    read_jsonl,
    recover_jsonl,
    sha256,
    to_line,
    write_jsonl,
)


CORNERS = [
    {"a": [1, 2.5, -0.0, 1e300, 1e-7, True, None]},
    {"a": [float("nan"), float("inf"), -float("inf"), 2**64, -(10**400), np.float64(0.1)]},
    {"a": 'half \ud800 \udfff, \u2028 \x85 \x00 \x1f \x7f \\ " / é \U0001f600'},
    {"b": 1, "a": {"z": (), "y": [], "x": {}}, "\ud800": datetime.date(2026, 2, 28)},
    {1: "int", 2.5: "float", 10**30: "huge"},
    {None: 0},
    {True: 0},
    {"a": {"deep": {"er": [[[[datetime.datetime(2026, 2, 28, 1), datetime.timedelta(1)]]]]}}, "set": {1}},
    {(1, 2): "no key"},
    {
        "a": {
            1,
        },
        "b": {"c": object},
    },
]


@pytest.mark.parametrize("sort_keys", [False, True])
@pytest.mark.parametrize(
    "value", [*CORNERS, *(value for row in CORNERS for value in row.values())], ids=lambda v: ascii(v)[:40]
)
def test_lines_are_those_of_the_json_module(value, sort_keys):
    """Oracle: `json.dumps`, text or error, for keys too."""

    def result(function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            return str(error)

    expected = result(json.dumps, value, ensure_ascii=False, default=str, sort_keys=sort_keys)
    assert result(encoder(sort_keys), value) == expected
    assert sort_keys or result(to_line, value) in (expected, expected + "\n")


@pytest.mark.parametrize("make", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_what_is_too_deep_is_the_error_that_it_was(make):
    value = make(0)
    for _ in range(100_000):
        value = make(value)
    with pytest.raises(RecursionError):
        to_line({"a": value})
    with pytest.raises(RecursionError):
        decode("[" * 100_000)
    while isinstance(value, list | dict):  # or its end is too deep, too
        value = value.popitem()[1] if isinstance(value, dict) else value.pop()


@pytest.mark.parametrize(
    "line",
    ["{}\n", "{}", ' {"a": 1} \r\n', '\t{"a": 1}\t', "{}\r\n", '{"a": 1, "a": 2}\n', '{"a": NaN, "b": -Infinity}\n', "1" * 400 + "\n"]
    + ['{"a": "\\ud800"}\n', "[1]\n", '"a"\n', "null\n", '{"a": "\u2028"}\n']
    + ["", "\n", " \n", "{} {}\n", "{}{}\n", "{}x\n", "{}\xa0\n", "{}\x0b\n", "\xa0{}\n", "\ufeff{}\n", '{"a": 1', "{'a': 1}\n", '{"a": "\t"}\n', "1" * 5000],
    ids=lambda line: ascii(line)[:30],
)  # fmt: skip
def test_lines_are_read_as_by_the_json_module(line):
    """Oracle: `json.loads`, value or error."""

    def result(function):
        try:
            return repr(function(line))
        except ValueError as error:
            return str(error)

    assert result(decode) == result(json.loads)


def test_a_torn_last_line_is_cut_off_and_appending_continues(tmp_path):
    """A process killed inside a write leaves half a line; what came before it is whole."""
    part = tmp_path / "answers.jsonl.part"
    part.write_text(to_line({"a": 1}) + to_line({"a": "ü"}) + '{"a": 3, "b')
    assert list(recover_jsonl(part)) == [{"a": 1}, {"a": "ü"}]
    with open(part, "a", encoding="utf-8") as file:
        file.write(to_line({"a": 4}))
    assert read_jsonl(part) == [{"a": 1}, {"a": "ü"}, {"a": 4}]


@pytest.mark.parametrize("torn", [b"", b"x", b"x" * 200_000])
@pytest.mark.parametrize("whole", [0, 1, 40_000])
def test_a_torn_line_of_any_length_behind_any_number_of_lines(tmp_path, whole, torn):
    """Longer than the block that is looked at in one go, and with nothing before it."""
    part = tmp_path / "a.part"
    part.write_bytes(b'{"a": 1}\n' * whole + torn)
    assert len(list(recover_jsonl(part))) == whole
    assert part.read_bytes() == b'{"a": 1}\n' * whole


def test_nothing_to_recover(tmp_path):
    assert list(recover_jsonl(tmp_path / "none")) == []


def test_a_failed_write_leaves_no_file_under_the_final_name(tmp_path):
    def rows():
        yield {"a": 1}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "pairs.jsonl", rows())
    assert not (tmp_path / "pairs.jsonl").exists()


def test_line_separators_in_answers_stay_inside_their_row(tmp_path):
    """U+2028 and friends end lines for `str.splitlines`, not for JSON lines."""
    row = {"text": "a\u2028b\x85c\n d"}
    write_jsonl(tmp_path / "x.jsonl", [row])
    assert read_jsonl(tmp_path / "x.jsonl") == [row]
    assert list(recover_jsonl(tmp_path / "x.jsonl")) == [row]


def test_sha256_of_a_directory_covers_names_and_contents(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = sha256(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert sha256(tmp_path / "d") != first


def test_chains_of_the_first_version_are_read_and_written_as_they_were():
    row = {
        "prompt_id": "train-0000001",
        "answers": [{"turn": 1, "text": "1 2", "tokens": 2, "finish_reason": "stop"}],
        "stopped": "prompt_too_long",
    }
    chain = Chain.from_row(row, "x")
    assert chain == Chain("train-0000001", "x", [Answer(1, "1 2", 2, "stop")], "prompt_too_long")
    assert to_line(chain.to_row()) == to_line(row)


@pytest.mark.parametrize("stopped", [None, "no_answer_found", 'a "reason"'])
@pytest.mark.parametrize("unanswered", [[], [Answer(3, "", 7, "length", "no [] \ud800")]])
@pytest.mark.parametrize("answers", [0, 1, 3])
@pytest.mark.parametrize("prompt_id", ["train-0000001", 'a", "answers": [], é\u2028\\'])
def test_a_line_around_encoded_answers(prompt_id, answers, unanswered, stopped):
    """Oracle: the line of the whole row."""
    texts = ["1 2", "], [\n", ""]
    made = [Answer(i + 1, texts[i], i, "stop", critique=("c}" if i else None)) for i in range(answers)]
    chain = Chain(prompt_id, "x", made, stopped, unanswered)
    assert chain.to_line([encode(answer.to_row()) for answer in made]) == to_line(chain.to_row())
