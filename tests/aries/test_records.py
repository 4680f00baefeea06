import pytest

from trl_ext.aries.records import Answer, Chain, read_jsonl, recover_jsonl, sha256, to_line, write_jsonl


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
