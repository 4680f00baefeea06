"""Rows on disk: what is written is read back, a torn last line is cut off, and no file is half written under its final name."""

import datetime

import pytest

from trl_ext.aries.data.records import (
    Answer,
    Chain,
    append_lines,
    read_jsonl,
    recover_jsonl,
    sha256,
    to_line,
    write_jsonl,
)


@pytest.mark.parametrize("torn", [b"", b"x", b'{"a": "\xc3', b"x" * 200_000])
@pytest.mark.parametrize("whole", [0, 1, 40_000])
def test_a_torn_last_line_is_cut_off_and_appending_continues(tmp_path, whole, torn):
    """A process killed inside a write leaves a part of a line; what came before it is whole."""
    part = tmp_path / "a.part"
    part.write_bytes(b'{"a": 1}\n' * whole + torn)
    assert len(list(recover_jsonl(part))) == whole
    assert part.read_bytes() == b'{"a": 1}\n' * whole
    part.write_bytes(b'{"a": 1}\n' * whole + torn)
    append_lines(part, [to_line({"a": "ü"})])
    assert read_jsonl(part) == [{"a": 1}] * whole + [{"a": "ü"}]


def test_nothing_to_recover(tmp_path):
    assert list(recover_jsonl(tmp_path / "none")) == []


def test_a_failed_write_leaves_no_file_under_the_final_name(tmp_path):
    def rows():
        yield {"a": 1}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "pairs.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_back_as_they_were(tmp_path):
    """U+2028 and its like end lines for `str.splitlines`, not for JSON lines. Dates become text."""
    row = {"text": "a\u2028b\x85c\n d é", "n": [1, 2.5, 2**64, None]}
    assert write_jsonl(tmp_path / "x.jsonl", [row, {"date": datetime.date(2026, 2, 28)}]) == 2
    assert read_jsonl(tmp_path / "x.jsonl") == [row, {"date": "2026-02-28"}]
    assert "é" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")


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
