"""Which pairs a report shows, and how; the pages that have them are in test_report.py."""

from collections import Counter
from types import SimpleNamespace

import pytest

from trl_ext.aries.data.records import write_jsonl
from trl_ext.aries.results.report_pairs import PAIRS, answer_text, pairs_of, round_pairs


def rows(pairs):
    """Three rows for each pair, its prompt's number and turns given."""
    for i, chosen, rejected in pairs:
        row = {"prompt_id": f"p-{i}", "chosen_turn": chosen, "rejected_turn": rejected, "chosen_score": 1.0}
        row |= {"rejected_score": 0.0, "chosen": "a c", "rejected": "a b"}
        yield from ({**row, "prompt": f"{asked} {i}", "turn": asked != "x"} for asked in ("x", "refine", "refine"))


def read(path, pairs, number=1, seed=0):
    write_jsonl(path, rows(pairs))
    return round_pairs(SimpleNamespace(number=number, files=SimpleNamespace(pairs=path)), seed)


def test_by_hand(tmp_path):
    """Two pairs of one prompt, and one of another: y2 over y1 twice, y3 over y2 once."""
    found = read(tmp_path / "pairs.jsonl", [(0, 2, 1), (0, 3, 2), (1, 2, 1)])
    assert (found["pairs"], found["chosen"], found["rejected"]) == (3, [2, 3], [1, 2])
    assert found["counts"] == [[2, 0], [0, 1]]
    assert [pair["messages"] for pair in found["shown"]] == [
        [{"role": None, "text": (f"x {i}", 0)}] for i in (0, 0, 1)
    ]
    chosen, rejected = found["shown"][1]["sides"]
    assert (chosen["name"], chosen["turn"], chosen["score"]) == ("chosen", 3, 1.0)
    assert (rejected["name"], rejected["turn"], rejected["score"]) == ("rejected", 2, 0.0)
    assert chosen["parts"] == [("same", "a"), ("new", " c")] and rejected["parts"] == [("same", "a"), ("old", " b")]


def test_the_draw_is_seeded_and_fair(tmp_path):
    """
    Of 16 pairs 8 are shown, the same ones for the same seed, in the order of the file. Over 400 seeds each is shown in a half of them; five standard
    deviations are 50.
    """
    pairs = [(i, 2, 1) for i in range(2 * PAIRS)]

    def shown(seed):
        return [pair["prompt_id"] for pair in read(tmp_path / "pairs.jsonl", pairs, seed=seed)["shown"]]

    assert shown(1) == shown(1) != shown(2)
    assert shown(1) == sorted(shown(1), key=lambda name: int(name[2:])) and len(set(shown(1))) == PAIRS
    counts = Counter(name for seed in range(400) for name in shown(seed))
    assert len(counts) == 2 * PAIRS and all(abs(count - 200) < 50 for count in counts.values())


def test_rows_without_sources(tmp_path):
    """Each row of a file from elsewhere counts as a pair; there are no turns to count."""
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"prompt": "x", "chosen": "a", "rejected": "b"}] * 2)
    assert len(list(pairs_of(path))) == 2
    found = round_pairs(SimpleNamespace(number=1, files=SimpleNamespace(pairs=path)), 0)
    assert (found["pairs"], found["chosen"], found["counts"]) == (2, [], [])


@pytest.mark.parametrize("answer", ["text", [{"role": "assistant", "content": "text"}]])
def test_answers_are_text_or_messages(answer):
    assert answer_text(answer) == "text"


def test_a_large_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    """Its prompts are in random order, so that the first ones stand for all."""
    monkeypatch.setattr("trl_ext.aries.results.report_pairs.READ_PAIRS", 10)
    found = read(tmp_path / "pairs.jsonl", [(i, 2, 1) for i in range(20)])
    assert found["pairs"] == 10 and found["counts"] == [[10]]
    assert all(int(pair["prompt_id"][2:]) < 10 for pair in found["shown"])
