"""
`answers.jsonl.part`, by an engine that answers at once: what is in it when, and that any beginning of it is continued to the same file.
"""

import json
import os
import re
from dataclasses import replace

import pytest

from trl_ext.aries.config import RefinementsConfig
from trl_ext.aries.data.records import Chain, read_jsonl, write_jsonl
from trl_ext.aries.generation.chains import Task, answer_task
from trl_ext.aries.generation.refinements import Strategy


TURNS = 3
STRATEGIES = {
    "chain": {},
    "parallel": {},
    "self_evaluation": {
        "evaluation_template": "{{ draft }} ?",
        "template": "{{ question }} {{ draft }} {{ critique }}",
    },
}


class TextOfTheRequest:
    """
    Answers each request with a text that is made from it, one chain earlier than the other: `steps` counts, and an odd step leaves half
    of them waiting. In some texts there is no answer, and some chains stop before a request.
    """

    prompt_tokens = cached_tokens = 0
    window = 3

    def __init__(self, part):
        self._part = part
        self._running = []
        self._steps = 0
        self.requests = []

    def start(self, task):
        self._strategy = task.strategy

    def submit(self, chain: Chain) -> bool:
        if chain.answers or chain.unanswered:  # what it has is on the disk before it goes on
            last = [row for row in read_jsonl(self._part) if row["prompt_id"] == chain.prompt_id][-1]
            assert last == chain.to_row() | {"stopped": last["stopped"]}
        if chain.prompt_id == "too long" or (chain.prompt_id == "long" and chain.answers):
            chain.stopped = "prompt_too_long"
            return False
        request = self._strategy.next_request(chain)
        if request is not None:
            self._running.append((chain, request))
        return request is not None

    def step(self) -> list[Chain]:
        self._steps += 1
        half = len(self._running) // 2 if self._steps % 2 else 0
        running, self._running = self._running[half:], self._running[:half]
        for chain, request in running:
            self.requests.append((chain.prompt_id, request.turn, request.is_critique))
            found = "" if (chain.prompt_id, request.turn) == ("none", 2) else "A: "
            text = f'{found}{request.turn} of "{request.prompt}" é\u2028]\n'
            self._strategy.add(chain, request, text, len(text), "stop")
        return [chain for chain, _ in running]


@pytest.fixture(params=list(STRATEGIES))
def task(request, tmp_path):
    """Eight prompts: one has no second answer, one is too long for it, and one is too long for a first."""
    ids = ["a", 'b", "answers": []', "none", "c", "long", "é", "too long", "d"]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt_id": id_, "prompt": f"{i} ?"} for i, id_ in enumerate(ids)])
    config = RefinementsConfig(strategy=request.param, turns=TURNS, **STRATEGIES[request.param])
    strategy = Strategy(config, answer_pattern=r"(?s)A: (.*)")
    return Task(tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", strategy, [], (0,))


@pytest.fixture
def part(task):
    return task.answers.with_name("answers.jsonl.part")


class Looked:
    """In the place of an intake: the row of each finished chain, as it is in memory."""

    def __init__(self):
        self.rows = {}

    def begun(self, chains):
        return chains

    def look(self, chain):
        self.rows[chain.prompt_id] = chain.to_row()


def run(task, part, intake=None) -> TextOfTheRequest:
    engine = TextOfTheRequest(part)
    answer_task(engine, replace(task, intake=intake), lambda done: None)
    return engine


def count_answered(content: bytes) -> int:
    """Whole rows with a new text; a row may also add why the chain stopped."""
    texts, count = {}, 0
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            row = json.loads(line)
            found = row["answers"], row.get("unanswered")
            count += row["answers"] != [] and texts.get(row["prompt_id"]) != found
            texts[row["prompt_id"]] = found
    return count


def test_any_beginning_of_the_file_is_continued_to_the_same_answers(task, part, tmp_path):
    """
    Cut around each end of a line and in many places between. Oracle: the run that nothing interrupted, byte for byte, and no request
    whose answer is in a whole line is made again.
    """
    part.touch()
    os.link(part, tmp_path / "kept")  # a second name for what is appended
    requests = run(task, part).requests
    expected, content = task.answers.read_bytes(), (tmp_path / "kept").read_bytes()
    assert count_answered(content) == len(requests) == len(set(requests))

    ends = {match.end() for match in re.finditer(b"\n", content)}
    cuts = {0, *(end + shift for end in ends for shift in (-2, -1, 0, 1)), *range(0, len(content), 29)}
    for cut in sorted(cut for cut in cuts if cut <= len(content)):
        task.answers.unlink()
        part.write_bytes(content[:cut])
        again = run(task, part)
        assert task.answers.read_bytes() == expected, cut
        assert sorted(again.requests) == sorted(requests[count_answered(content[:cut]) :]), cut
        assert not part.exists()


def test_the_final_rows_are_those_of_the_chains(task, part):
    """Oracle: the chains in memory."""
    looked = Looked()
    run(task, part, looked)
    assert read_jsonl(task.answers) == [looked.rows[row["prompt_id"]] for row in read_jsonl(task.prompts)]
    rows = looked.rows
    assert {id_: (row["stopped"], len(row["answers"])) for id_, row in rows.items() if row["stopped"]} == {
        "none": ("no_answer_found", 2 if task.strategy.name == "parallel" else 1),
        "long": ("prompt_too_long", 1),
        "too long": ("prompt_too_long", 0),
    }
    assert [entry["turn"] for entry in rows["none"]["unanswered"]] == [2]
    has_critique = ["critique" in answer for answer in rows["a"]["answers"]]
    assert has_critique == [task.strategy.name == "self_evaluation"] * (TURNS - 1) + [False]
